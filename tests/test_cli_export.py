from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from transferkit.artifacts import save_artifact
from transferkit.cli import main
from transferkit.models import BackboneSpec, build_model, register_backbone
from transferkit.models.registry import _BACKBONES


@pytest.fixture(autouse=True)
def _registered(tiny_spec: BackboneSpec) -> Iterator[None]:
    register_backbone("tiny", lambda: tiny_spec)
    yield
    _BACKBONES.remove("tiny")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    model = build_model("tiny", 2, weights=None)
    return save_artifact(tmp_path / "model.safetensors", model, class_names=["ants", "bees"])


@pytest.mark.parametrize(
    ("name", "package", "suffixes"),
    [
        ("onnx", "onnxruntime", [".onnx"]),
        ("openvino", "openvino", [".xml", ".bin"]),
        ("torch", "torch", [".pt2"]),
    ],
)
def test_files_lie_beside_the_artifact_or_where_they_should(
    name: str,
    package: str,
    suffixes: list[str],
    artifact: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip(package)
    files = [artifact.with_suffix(suffix) for suffix in suffixes]
    assert main(["export", str(artifact), "--format", name]) == 0
    assert capsys.readouterr().out == f"Saved the model in {' and '.join(map(str, files))}\n"
    assert all(each.is_file() for each in files)
    out = tmp_path / f"other{suffixes[0]}"
    assert main(["export", str(artifact), "--format", name, "--out", str(out), "--json"]) == 0
    written = [str(out.with_suffix(suffix)) for suffix in suffixes]
    assert json.loads(capsys.readouterr().out) == {"format": name, "files": written}
    assert out.is_file()


def test_outputs_may_be_probabilities(artifact: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    assert main(["export", str(artifact), "--outputs", "probabilities"]) == 0
    session = onnxruntime.InferenceSession(artifact.with_suffix(".onnx"))
    assert session.get_outputs()[0].name == "probabilities"


def test_errors_are_one_line(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = artifact.with_suffix(".bin")
    assert main(["export", str(artifact), "--format", "torch", "--out", str(out)]) == 1
    assert capsys.readouterr().err == (
        f"transferkit: error: `path` should end in `.pt2`, found `{out}`.\n"
    )
