from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from transferkit.artifacts import load_artifact, save_artifact
from transferkit.artifacts.self_test import _sample
from transferkit.errors import ArtifactError, ArtifactWarning, ConfigError
from transferkit.images import Preprocess, decode
from transferkit.inference import Predictor
from transferkit.models import BackboneSpec, Classifier, build_model

Forge = Callable[..., None]
Load = Callable[..., Any]

REMEDY = (
    "The installed libraries compute something else; compare their versions, or pass "
    "`self_test=False` to load it all the same."
)


def drift_of(path: Path, stages: str) -> str:
    return (
        rf"^The artifact `{re.escape(str(path))}` does not give what it gave when it was saved "
        rf"\({stages}\)\. {re.escape(REMEDY)}$"
    )


LOGITS = r"the logits differ by [\d.e-]+, allowed are 0\.001"


def change_logits(monkeypatch: pytest.MonkeyPatch, amount: float) -> None:
    forward = Classifier.forward
    monkeypatch.setattr(Classifier, "forward", lambda self, images: forward(self, images) + amount)


@pytest.fixture(params=["load_artifact", "Predictor.load"])
def load(request: pytest.FixtureRequest) -> Load:
    return load_artifact if request.param == "load_artifact" else Predictor.load


def test_nothing_is_said_where_all_is_as_it_was(
    saved: Path, tiny_spec: BackboneSpec, load: Load
) -> None:
    load(saved, backbone=tiny_spec, strict=True)


def test_kernels_that_drift(
    saved: Path, tiny_spec: BackboneSpec, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_logits(monkeypatch, 0.01)
    expected = drift_of(saved, f"model: {LOGITS}; preprocess and model: {LOGITS}")
    with pytest.warns(ArtifactWarning, match=expected):
        load(saved, backbone=tiny_spec)
    with pytest.raises(ArtifactError, match=expected):
        load(saved, backbone=tiny_spec, strict=True)
    load(saved, backbone=tiny_spec, self_test=False)


def test_a_drift_within_tolerance(
    saved: Path, tiny_spec: BackboneSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_logits(monkeypatch, 0.0005)
    load_artifact(saved, backbone=tiny_spec, strict=True)


@pytest.mark.parametrize("amount", [0.2, float("nan"), float("inf")])
def test_useless_results_are_an_error_in_any_case(
    amount: float, saved: Path, tiny_spec: BackboneSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_logits(monkeypatch, amount)
    logits = LOGITS.replace(r"[\d.e-]+", f"({amount:.3g})")
    expected = drift_of(saved, f"model: {logits}; preprocess and model: {logits}")
    with pytest.raises(ArtifactError, match=expected):
        load_artifact(saved, backbone=tiny_spec)


def test_resizing_that_drifts(
    saved: Path, tiny_spec: BackboneSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    normalize = Preprocess.normalize
    # After resizing alone: the inputs of the model's own stage are of two pictures together.
    monkeypatch.setattr(
        Preprocess,
        "normalize",
        lambda self, pixels: normalize(self, pixels if pixels.dim() == 4 else pixels // 2 * 2 - 4),
    )
    levels = r"the levels of resized pixels differ by [\d.]+, allowed are 2"
    expected = drift_of(saved, rf"preprocess: {levels}(; preprocess and model: {LOGITS})?")
    with pytest.warns(ArtifactWarning, match=expected):
        load_artifact(saved, backbone=tiny_spec)


@pytest.mark.parametrize(("kind", "difference"), [("jpeg", 3), ("png", 5)])
def test_decoders_that_drift(
    kind: str,
    difference: int,
    saved: Path,
    tiny_spec: BackboneSpec,
    forge: Forge,
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        pixels = tensors[f"self_test.{kind}_pixels"]
        pixels += torch.where(pixels < 200, difference, 0).to(torch.uint8)

    forge(saved, change_tensors=change)
    words = f"the levels of pixels from a {kind.upper()} file"
    expected = drift_of(saved, f"decode: {words} differ by {difference}, allowed are 2")
    with pytest.warns(ArtifactWarning, match=expected):
        load_artifact(saved, backbone=tiny_spec)


def test_jpeg_and_png_are_decoded_as_pictures_of_the_user_are(
    saved: Path, tiny_spec: BackboneSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = []
    from_bytes = decode._from_bytes

    def record(data: bytes, *arguments: Any) -> Tensor:
        kinds.append(data[:4])
        return from_bytes(data, *arguments)

    monkeypatch.setattr(decode, "_from_bytes", record)
    load_artifact(saved, backbone=tiny_spec)
    assert kinds == [b"\xff\xd8\xff\xe0", b"\x89PNG"]


@pytest.mark.parametrize(
    ("size", "mode"), [(32, "shorter"), (7, "shorter"), (1, "squash"), (224, "squash")]
)
def test_any_size_of_images(size: int, mode: Any, tiny_spec: BackboneSpec, tmp_path: Path) -> None:
    preprocess = Preprocess(crop_size=size, resize_size=size, resize_mode=mode)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    model = build_model(network, 2, num_features=4, preprocess=preprocess)
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=("a", "b"))
    load_artifact(path, backbone=network, strict=True)
    side = min(size, 32)
    assert safetensors.torch.load_file(path)["self_test.preprocessed"].shape == (2, 3, side, side)


@pytest.mark.parametrize(("num_channels", "has_files"), [(1, True), (3, True), (5, False)])
def test_decoding_is_tested_where_pictures_come_as_files(
    num_channels: int, has_files: bool, tiny_spec: BackboneSpec, tmp_path: Path
) -> None:
    model = build_model(tiny_spec, 2, weights=None, num_channels=num_channels)
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=("a", "b"))
    assert ("self_test.jpeg" in safetensors.torch.load_file(path)) == has_files
    load_artifact(path, backbone=tiny_spec, strict=True)


def test_sample_has_the_corners() -> None:
    batch = torch.arange(100.0 * 100).view(1, 1, 100, 100)
    sample = _sample(batch)
    assert sample.shape == (1, 1, 32, 32)
    assert sample[0, 0, [0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [0, 99, 9900, 9999]


def test_strict_without_a_self_test(saved: Path, load: Load) -> None:
    message = "strict=True is about the self-test: leave `self_test=False` out."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        load(saved, self_test=False, strict=True)


@pytest.mark.parametrize("name", ["self_test", "strict"])
def test_switches_are_checked(name: str, saved: Path, load: Load) -> None:
    message = f"`{name}` should be True or False, found 'yes'."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        load(saved, **{name: "yes"})


# Files that are not as they should be


@pytest.mark.parametrize("name", ["self_test.images", "self_test.logits"])
def test_no_self_test_inside(name: str, saved: Path, tiny_spec: BackboneSpec, forge: Forge) -> None:
    forge(saved, change_tensors=lambda tensors: tensors.pop(name))
    message = f"The artifact `{saved}` has no self-test. Save it anew."
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(saved, backbone=tiny_spec)
    load_artifact(saved, backbone=tiny_spec, self_test=False)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("images", torch.zeros(1, 3, 10**5, 1, dtype=torch.uint8),
         "is torch.uint8 (1, 3, 100000, 1), expected torch.uint8 (2, 3, 48, 40)"),
        ("images", torch.zeros(2, 3, 48, 40),
         "is torch.float32 (2, 3, 48, 40), expected torch.uint8 (2, 3, 48, 40)"),
        ("logits", torch.zeros(2, 3), "is torch.float32 (2, 3), expected torch.float32 (2, 2)"),
        ("preprocessed", None, "is missing, expected torch.float32 (2, 3, 32, 32)"),
        ("model_logits", None, "is missing, expected torch.float32 (2, 2)"),
        ("jpeg_pixels", None, "is missing, expected torch.uint8 (3, 48, 40)"),
        ("png_pixels", torch.zeros(3, 10**3, 10**3, dtype=torch.uint8),
         "is torch.uint8 (3, 1000, 1000), expected torch.uint8 (3, 48, 40)"),
    ],
)  # fmt: skip
def test_tensors_of_other_sizes(
    name: str,
    value: Tensor | None,
    problem: str,
    saved: Path,
    tiny_spec: BackboneSpec,
    forge: Forge,
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        if value is None:
            del tensors[f"self_test.{name}"]
        else:
            tensors[f"self_test.{name}"] = value

    forge(saved, change_tensors=change)
    message = (
        f"The artifact `{saved}` is inconsistent: `self_test.{name}` of its self-test {problem}."
    )
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(saved, backbone=tiny_spec)


def test_pictures_that_cannot_be_decoded(
    saved: Path, tiny_spec: BackboneSpec, forge: Forge
) -> None:
    forge(
        saved,
        change_tensors=lambda tensors: tensors.update(
            {"self_test.jpeg": torch.zeros(9, dtype=torch.uint8)}
        ),
    )
    message = (
        f"The self-test of the artifact `{saved}` cannot be run (ImageError: Cannot read the "
        f"picture `9 bytes`: it is not a JPEG, PNG, WEBP, BMP, GIF or TIFF file, whatever its "
        f"name says.)."
    )
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(saved, backbone=tiny_spec)
