from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import transferkit as tk
from transferkit.artifacts import save_artifact
from transferkit.errors import ConfigError, ExportError, MissingDependencyError, OutputError
from transferkit.exporting import export_onnx, export_openvino, export_program
from transferkit.exporting import subject as subject_module
from transferkit.images import Preprocess
from transferkit.models import BackboneSpec, Classifier, HeadSpec, build_model, register_backbone
from transferkit.models.registry import _BACKBONES

Export = Callable[..., Path]

FORMATS: dict[str, tuple[Export, str, str]] = {
    "onnx": (export_onnx, ".onnx", "onnxruntime"),
    "openvino": (export_openvino, ".xml", "openvino"),
    "program": (export_program, ".pt2", "torch"),
}
NAMES = ["Ameise & Co. <ä>", '"bees"']


@pytest.fixture(autouse=True)
def _registered(tiny_spec: BackboneSpec) -> Iterator[None]:
    register_backbone("tiny", lambda: tiny_spec)
    yield
    _BACKBONES.remove("tiny")


@pytest.fixture
def model() -> Classifier:
    """A small model in training mode, whose BatchNorm has seen pictures."""
    model = build_model("tiny", 2, weights=None)
    model(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    nn.init.normal_(model.head.weight)  # type: ignore[arg-type]
    return model


@pytest.fixture(params=list(FORMATS))
def kind(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(FORMATS[request.param][2])
    return str(request.param)


def export(kind: str, folder: Path, source: Any, **options: Any) -> Path:
    function, suffix, _ = FORMATS[kind]
    if isinstance(source, Classifier):
        options = {"class_names": NAMES, **options}
    return function(source, folder / f"model{suffix}", **options)


def run(path: Path, images: Tensor) -> tuple[Tensor, dict[str, str], str | None]:
    """Return what an exported model gives, its metadata, and the name of its output."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        values = session.run(None, {"images": images.numpy()})[0]
        metadata = session.get_modelmeta().custom_metadata_map
        return torch.from_numpy(values), metadata, session.get_outputs()[0].name
    if path.suffix == ".xml":
        from transferkit.models.openvino_engine import _core

        model: Any = _core().read_model(path)
        info = model.get_rt_info(["transferkit"]).value
        metadata = {
            key: each if isinstance(each, str) else each.value for key, each in info.items()
        }
        values = _core().compile_model(model, "CPU")({"images": images.numpy()})[0]
        return torch.from_numpy(values), metadata, model.outputs[0].any_name
    files = {"transferkit.json": ""}
    program = torch.export.load(path, extra_files=files)
    with torch.no_grad():
        return program.module()(images), json.loads(files["transferkit.json"]), None


def evaluate(model: Classifier, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = copy.deepcopy(model).eval()(images)
    return logits


@pytest.mark.parametrize("count", [1, 2, 5])
def test_exported_models_give_what_the_model_gives(
    kind: str, count: int, model: Classifier, tmp_path: Path
) -> None:
    path = export(kind, tmp_path, model)
    images = torch.randn(count, 3, 32, 32)
    found, _, name = run(path, images)
    torch.testing.assert_close(found, evaluate(model, images), rtol=1e-4, atol=1e-5)
    assert name in ("logits", None)


def test_probabilities(kind: str, model: Classifier, tmp_path: Path) -> None:
    images = torch.randn(4, 3, 32, 32)
    found, metadata, name = run(export(kind, tmp_path, model, outputs="probabilities"), images)
    torch.testing.assert_close(found, evaluate(model, images).softmax(1), rtol=1e-4, atol=1e-5)
    assert metadata["outputs"] == "probabilities"
    assert name in ("probabilities", None)


@pytest.mark.parametrize("head", ["mlp", "cosine", HeadSpec(dropout=0.5)])
def test_heads(kind: str, head: Any, tmp_path: Path) -> None:
    model = build_model("tiny", 2, weights=None, head=head)
    images = torch.randn(4, 3, 32, 32)
    found = run(export(kind, tmp_path, model), images)[0]
    torch.testing.assert_close(found, evaluate(model, images), rtol=1e-4, atol=1e-5)


def test_metadata_has_what_prediction_needs(kind: str, model: Classifier, tmp_path: Path) -> None:
    _, metadata, _ = run(export(kind, tmp_path, model), torch.zeros(1, 3, 32, 32))
    assert set(metadata) == {
        "class_names", "preprocess", "preprocess_in_words", "outputs", "backbone",
        "transferkit_version",
    }  # fmt: skip
    assert json.loads(metadata["class_names"]) == NAMES
    assert Preprocess.from_dict(json.loads(metadata["preprocess"])) == model.preprocess
    assert metadata["preprocess_in_words"] == model.preprocess.describe()
    assert metadata["outputs"] == "logits"
    assert metadata["backbone"] == "tiny"
    assert metadata["transferkit_version"] == tk.__version__


def test_artifacts_are_exported_with_their_own_names(
    kind: str, model: Classifier, tmp_path: Path
) -> None:
    artifact = save_artifact(tmp_path / "model.safetensors", model, class_names=NAMES)
    images = torch.randn(3, 3, 32, 32)
    found, metadata, _ = run(export(kind, tmp_path, artifact), images)
    torch.testing.assert_close(found, evaluate(model, images), rtol=1e-4, atol=1e-5)
    assert json.loads(metadata["class_names"]) == NAMES


def test_pictures_of_other_channels(kind: str, tmp_path: Path) -> None:
    model = build_model("tiny", 2, weights=None, num_channels=1)
    images = torch.randn(3, 1, 32, 32)
    found = run(export(kind, tmp_path, model), images)[0]
    torch.testing.assert_close(found, evaluate(model, images), rtol=1e-4, atol=1e-5)


def test_model_and_random_state_stay_as_they_were(
    kind: str, model: Classifier, tmp_path: Path
) -> None:
    model.freeze("backbone")
    before, modes = copy.deepcopy(model.state_dict()), [each.training for each in model.modules()]
    trained = [each.requires_grad for each in model.parameters()]
    state = torch.get_rng_state()
    export(kind, tmp_path, model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [each.training for each in model.modules()] == modes
    assert [each.requires_grad for each in model.parameters()] == trained
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_export_says_nothing(
    kind: str, model: Classifier, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export(kind, tmp_path, model)
    assert capfd.readouterr() == ("", "")


def test_export_returns_the_path_and_leaves_nothing_else(
    kind: str, model: Classifier, tmp_path: Path
) -> None:
    for _ in range(2):  # The second takes the place of the first.
        path = export(kind, tmp_path, model)
    expected = {path.name} | ({"model.bin"} if kind == "openvino" else set())
    assert {each.name for each in tmp_path.iterdir()} == expected


# What cannot be exported


class Switch(nn.Module):
    """A backbone whose forward pass depends on the number of images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layer(images.mean(dim=(2, 3)))
        return features if len(images) == 2 else features + 1


class Sorted(nn.Module):
    """A backbone that takes numbers out of its tensors."""

    def forward(self, images: Tensor) -> Tensor:
        values = images.mean(dim=(2, 3))
        is_large = float(values.detach().sum().item() > 1000)
        features: Tensor = values * is_large + torch.special.bessel_j0(values)
        return features


def own(network: nn.Module) -> Classifier:
    preprocess = Preprocess(crop_size=8, resize_size=8)
    return build_model(network, 2, num_features=3, preprocess=preprocess)


@pytest.mark.parametrize(("kind", "library"), [("onnx", "ONNX Runtime"), ("openvino", "OpenVINO")])
def test_other_values_are_an_error_and_the_old_files_stay(
    kind: str, library: str, model: Classifier, tmp_path: Path
) -> None:
    pytest.importorskip(FORMATS[kind][2])
    export(kind, tmp_path, model)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    message = (
        rf"The exported model gives other values in {library} than in PyTorch: relative to the "
        r"largest they differ by [0-9.]+, allowed are 0\.0001\. Nothing was written\. Its forward "
        r"pass may depend on the values or the number of images; write it without such branches\."
    )
    with pytest.raises(ExportError, match=f"^{message}$"):
        export(kind, tmp_path, own(Switch()))
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


def test_programs_are_compared_too(
    model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject_module, "TOLERANCE", -1.0)
    message = (
        "The exported model gives other values in a program of `torch.export` than in PyTorch: "
        "relative to the largest they differ by 0, allowed are -1. Nothing was written. Its "
        "forward pass may depend on the values or the number of images; write it without such "
        "branches."
    )
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        export("program", tmp_path, model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "onnx",
            "The model cannot be converted to ONNX: Exporting the operator "
            "'aten::special_bessel_j0' to ONNX opset version 18 is not supported. Another format "
            "may take it.",
        ),
        (
            "openvino",
            "The model cannot be converted to OpenVINO: No conversion rule found for operations: "
            "aten::special_bessel_j0. Another format may take it.",
        ),
    ],
)
def test_what_cannot_be_converted_is_named(
    kind: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(FORMATS[kind][2])
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        export(kind, tmp_path, own(Sorted()))
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_what_is_no_program_is_named(tmp_path: Path) -> None:
    pattern = r"The model cannot be converted to a program of `torch\.export`: .+\. Another format"
    with pytest.raises(ExportError, match=f"^{pattern} may take it\\.$"):
        export("program", tmp_path, own(Sorted()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("outputs", ["logits", "probabilities"])
def test_weights_that_are_not_finite(
    kind: str, outputs: str, model: Classifier, tmp_path: Path
) -> None:
    nn.init.constant_(model.head.bias, float("nan"))  # type: ignore[arg-type]
    message = (
        f"The model's {outputs} are not finite (NaN or infinite): its weights are broken. Train "
        f"again, perhaps with a smaller `lr`."
    )
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        export(kind, tmp_path, model, outputs=outputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"class_names": None},
            "`class_names` should be 2 different texts, one for each class of the model, found "
            "None.",
        ),
        (
            {"class_names": ["ants"]},
            "`class_names` should be 2 different texts, one for each class of the model, found "
            "['ants'].",
        ),
        (
            {"class_names": ["ants", "ants"]},
            "`class_names` should be 2 different texts, one for each class of the model, found "
            "['ants', 'ants'].",
        ),
        (
            {"class_names": ["ants", 1]},
            "`class_names` should be 2 different texts, one for each class of the model, found "
            "['ants', 1].",
        ),
        (
            {"outputs": "features"},
            '`outputs` should be "logits" or "probabilities", found \'features\'.',
        ),
    ],
)
def test_arguments_that_cannot_work(
    kind: str, options: dict[str, Any], message: str, model: Classifier, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        export(kind, tmp_path, model, **options)


def test_sources_that_are_none(kind: str, tmp_path: Path) -> None:
    message = "`source` should be a Classifier or an artifact, found Linear."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        export(kind, tmp_path, nn.Linear(2, 2))


def test_names_for_an_artifact(kind: str, model: Classifier, tmp_path: Path) -> None:
    artifact = save_artifact(tmp_path / "model.safetensors", model, class_names=NAMES)
    message = "`class_names` are for a model; an artifact has its own. Leave them out."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        export(kind, tmp_path, artifact, class_names=NAMES)


def test_paths_end_in_the_suffix_of_the_format(
    kind: str, model: Classifier, tmp_path: Path
) -> None:
    function, suffix, _ = FORMATS[kind]
    path = tmp_path / "model.bin"
    message = f"`path` should end in `{suffix}`, found `{path}`."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        function(model, path, class_names=NAMES)


def test_folders_that_there_are_not(kind: str, model: Classifier, tmp_path: Path) -> None:
    folder = tmp_path / "missing"
    path = folder / f"model{FORMATS[kind][1]}"
    message = f"Cannot write `{path}`: the folder `{folder}` does not exist. Create it first."
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        export(kind, folder, model)


@pytest.mark.parametrize(
    ("kind", "package", "extra"),
    [("onnx", "onnx", "onnx"), ("onnx", "onnxruntime", "onnx"), ("openvino",) * 3],
)
def test_packages_that_are_not_installed(
    kind: str,
    package: str,
    extra: str,
    model: Classifier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = (
        f"`export_{kind}` needs `{package}`, which is not installed: pip install "
        f'"transferkit[{extra}]"'
    )
    with pytest.raises(MissingDependencyError, match=f"^{re.escape(message)}$"):
        export(kind, tmp_path, model)


def test_a_stop_while_writing_leaves_no_mixed_model(
    model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    export("openvino", tmp_path, model)
    replaced: list[Path] = []
    replace = Path.replace

    def stop(self: Path, target: Path) -> None:
        replaced.append(target)
        if target.name == "model.xml":
            raise KeyboardInterrupt
        replace(self, target)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        export("openvino", tmp_path, own(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())))
    assert replaced[-2:] == [tmp_path / "model.bin", tmp_path / "model.xml"]
    assert [each.name for each in tmp_path.iterdir()] == ["model.bin"]
