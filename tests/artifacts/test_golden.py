"""Files that older code wrote load to the same numbers, for good."""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from transferkit.artifacts import FORMAT_VERSION, load_artifact
from transferkit.errors import ArtifactError
from transferkit.inference import Predictor
from transferkit.models import HeadSpec, register_backbone
from transferkit.models.registry import _BACKBONES
from transferkit.training import History

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(GOLDEN.glob("*.safetensors"))

Forge = Callable[..., None]


@pytest.fixture(scope="module")
def script() -> Any:
    """Load the script that makes them."""
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN.parent / "make_golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _registered(script: Any) -> Iterator[None]:
    register_backbone("golden", script.golden_spec)
    yield
    _BACKBONES.remove("golden")


def data_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return dict(json.loads(file.metadata()["transferkit"]))


def test_there_is_one_of_each_version() -> None:
    assert {data_of(path)["format_version"] for path in FILES} == set(range(1, FORMAT_VERSION + 1))
    assert all(path.stat().st_size < 100_000 for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_artifact(path: Path, script: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of a drift: the logits below have a tolerance, too.
        artifact = load_artifact(path)
    expected = torch.tensor(json.loads(path.with_suffix(".json").read_text())["logits"])
    with torch.no_grad():
        logits = artifact.model(script.inputs())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert artifact.class_names == ("ants", "bees", "Hummel")
    assert artifact.model.backbone_name == "golden"
    assert artifact.model.freeze_plan.patterns == ("backbone.*",)
    assert artifact.preprocess.interpolation == "bicubic"
    assert (artifact.preprocess.crop_size, artifact.preprocess.resize_size) == (24, 32)
    assert artifact.history is not None
    history = History.from_dict(artifact.history)
    assert (len(history), history.best.epoch, history.settings["recipe"]) == (2, 1, "probe")
    assert artifact.versions["transferkit"] == "0.1.0"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_artifact_predicts(path: Path) -> None:
    picture = torch.arange(3 * 40 * 50).remainder(256).to(torch.uint8).view(3, 40, 50)
    prediction = Predictor.load(path, device="cpu").predict(picture)
    assert prediction.label in ("ants", "bees", "Hummel")


def test_version_1_had_neither_other_heads_nor_a_choice_of_decoder() -> None:
    path = GOLDEN / "version1.safetensors"
    assert "head" not in data_of(path)
    assert "decoder" not in data_of(path)["preprocess"]
    artifact = load_artifact(path)
    assert artifact.model.head_spec == HeadSpec()
    assert artifact.preprocess.decoder == "pillow"
    assert artifact.model.weights_license is None


def test_version_2_has_its_head() -> None:
    assert load_artifact(GOLDEN / "version2.safetensors").model.head_spec.kind == "mlp"


@pytest.mark.parametrize(
    ("stem", "has_stages"), [("version1", False), ("version2", False), ("version2-stages", True)]
)
def test_which_have_stages(stem: str, has_stages: bool) -> None:
    tensors = safetensors.torch.load_file(GOLDEN / f"{stem}.safetensors")
    assert ("self_test.model_logits" in tensors) == has_stages


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_next_version_says_to_upgrade(path: Path, tmp_path: Path, forge: Forge) -> None:
    newer = tmp_path / "newer.safetensors"
    newer.write_bytes(path.read_bytes())
    forge(newer, lambda data: data.update(format_version=FORMAT_VERSION + 1))
    message = (
        f"The artifact `{newer}` has format version {FORMAT_VERSION + 1}; this transferkit reads "
        f"up to {FORMAT_VERSION}. Upgrade transferkit: pip install --upgrade transferkit"
    )
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(newer)


def test_the_script_writes_what_is_read(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "FOLDER", tmp_path / "golden")
    script.make("new", head="mlp")
    path = tmp_path / "golden" / "new.safetensors"
    load_artifact(path, strict=True)
    newest = safetensors.torch.load_file(GOLDEN / "version2-stages.safetensors")
    assert safetensors.torch.load_file(path).keys() == newest.keys()
    assert data_of(path).keys() == data_of(GOLDEN / "version2-stages.safetensors").keys()
