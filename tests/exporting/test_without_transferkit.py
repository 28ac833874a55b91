"""The programs of the page on exports, run where transferkit cannot be imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from transferkit.artifacts import save_artifact
from transferkit.exporting import export_onnx, export_openvino, export_program
from transferkit.inference import Predictor
from transferkit.models import build_model

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
NAMES = ["ant", "bee", "cicada", "dragonfly"]

BLOCKED = """
import sys

sys.modules["transferkit"] = None
"""
REPORT = """
print(json.dumps(torch.as_tensor(logits).tolist()))
"""


def programs() -> dict[str, str]:
    """Return the programs that print a label, by the heading above them."""
    found = {}
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        for code in re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
            if "print(" in code:
                found[section.splitlines()[0]] = code
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-18 in every format, and a picture that has to be turned upright."""
    folder = tmp_path_factory.mktemp("exports")
    model = build_model("resnet18", len(NAMES), weights=None)
    with torch.no_grad():
        model(torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(1)
    nn.init.normal_(model.head.get_parameter("weight"), std=0.05, generator=generator)
    artifact = save_artifact(folder / "model.safetensors", model, class_names=NAMES)
    export_onnx(artifact, folder / "model.onnx")
    export_openvino(artifact, folder / "model.xml")
    export_program(artifact, folder / "model.pt2")
    coarse = torch.rand((1, 3, 7, 9), generator=torch.Generator().manual_seed(2))
    pixels = nn.functional.interpolate(coarse, size=(301, 404), mode="bicubic").clamp(0, 1)
    picture = Image.fromarray((pixels[0].permute(1, 2, 0) * 255).byte().numpy())
    exif = Image.Exif()
    exif[0x0112] = 6  # Turned by a quarter.
    picture.save(folder / "picture.jpg", quality=95, exif=exif)
    return folder


@pytest.mark.parametrize(
    ("heading", "first", "tolerance"),
    [
        ("ONNX", None, 1e-3),
        ("OpenVINO", "ONNX", 1e-3),
        ("A program of `torch.export`", "ONNX", 1e-3),
        ("The artifact without transferkit", None, 1e-5),
    ],
)
def test_programs_of_the_page_find_the_label_of_the_predictor(
    heading: str, first: str | None, tolerance: float, folder: Path
) -> None:
    for package in ("onnxruntime", "onnx", "openvino"):
        pytest.importorskip(package)
    before = "" if first is None else programs()[first].rpartition("\n\nlogits = ")[0]
    # Each program alone has what it needs; the report of the logits is the test's.
    code = "\n".join([BLOCKED, before, programs()[heading], "import json, torch", REPORT])
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    label, logits = result.stdout.splitlines()
    predictor = Predictor.load(folder / "model.safetensors", device="cpu")
    expected = predictor.predict(folder / "picture.jpg")
    assert label == expected.label
    found = torch.tensor(json.loads(logits)[0]).softmax(0).tolist()
    by_index = {each.index: each.probability for each in expected.top_k}
    assert found == pytest.approx([by_index[i] for i in range(len(NAMES))], abs=tolerance)


def test_the_page_has_a_program_for_each_format() -> None:
    assert set(programs()) == {
        "ONNX", "OpenVINO", "A program of `torch.export`", "The artifact without transferkit",
    }  # fmt: skip


def test_programs_cannot_reach_transferkit(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"{BLOCKED}\nimport transferkit"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "ModuleNotFoundError: import of transferkit halted" in result.stderr
