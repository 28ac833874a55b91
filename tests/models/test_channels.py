from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision import models

from transferkit.artifacts import load_artifact, save_artifact
from transferkit.errors import BackboneError
from transferkit.images import Preprocess
from transferkit.models import BackboneSpec, Classifier, build_model, get_backbone
from transferkit.models.channels import adapt_channels, adapt_preprocess, adapt_weight
from transferkit.testing import check_backbone

FIRST = {
    "resnet18": "conv1",
    "mobilenet_v3_small": "features.0.0",
    "efficientnet_b0": "features.0.0",
    "efficientnet_lite0": "conv_stem",
    "vit_b_16": "conv_proj",
    "densenet121": "features.conv0",
    "squeezenet1_1": "features.0",
    "swin_t": "features.0.0",
    "convnext_tiny": "features.0.0",
    "timm:test_vit": "patch_embed.proj",
    "timm:test_mambaout": "stem.conv1",
}
"""Where the convolution sits that reads the images."""

WAYS_OUT = (
    "Take another one, such as `resnet18`, or leave `num_channels` out: grey pictures are then "
    "read as RGB."
)


def smooth_pictures(size: int, num_images: int = 2) -> Tensor:
    """Return grey pictures, uint8 `(N, 1, size, size)`."""
    coarse = torch.rand((num_images, 1, 9, 9), generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return (smooth * 255).round().to(torch.uint8)


# Weights and descriptions


@pytest.mark.parametrize("num_channels", [1, 2, 3, 4, 6, 10])
def test_filters_are_those_of_timm(num_channels: int) -> None:
    weight = torch.rand(5, 3, 2, 2)
    kept = weight.clone()
    expected = timm.models.adapt_input_conv(num_channels, weight.clone())
    torch.testing.assert_close(adapt_weight(weight, num_channels), expected)
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("num_channels", [1, 3, 6, 9])
def test_equal_channels_give_what_they_gave(num_channels: int) -> None:
    weight, picture = torch.rand(5, 3, 2, 2), torch.rand(1, 1, 8, 8)
    found = nn.functional.conv2d(
        picture.expand(-1, num_channels, -1, -1), adapt_weight(weight, num_channels)
    )
    expected = nn.functional.conv2d(picture.expand(-1, 3, -1, -1), weight)
    torch.testing.assert_close(found, expected)


def test_filters_of_one_channel_are_spread_over_many() -> None:
    assert adapt_weight(torch.ones(1, 1, 1, 1), 4).flatten().tolist() == [0.25] * 4


def test_mean_and_std_follow() -> None:
    preprocess = Preprocess(
        crop_size=9, resize_size=9, mean=(0.1, 0.2, 0.6), std=(0.1, 0.2, 0.9), decoder="pillow"
    )
    one, four = (adapt_preprocess(preprocess, number) for number in (1, 4))
    assert one.mean == pytest.approx((0.3,))
    assert one.std == pytest.approx((0.4,))
    assert four.mean == (0.1, 0.2, 0.6, 0.1)
    assert four.std == (0.1, 0.2, 0.9, 0.1)
    assert {each.decoder for each in (one, four)} == {"pillow"}
    assert {each.crop_size for each in (one, four)} == {9}
    assert adapt_preprocess(preprocess, 3) is preprocess


# Networks


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("num_channels", [1, 5])
def test_families_are_adapted_where_they_read_the_images(name: str, num_channels: int) -> None:
    spec = get_backbone(name)
    plain = build_model(spec, 2, weights=None, seed=3)
    model = build_model(spec, 2, weights=None, seed=3, num_channels=num_channels).eval()
    assert model.preprocess == adapt_preprocess(spec.preprocess, num_channels)
    layer = model.backbone.get_submodule(FIRST[name])
    assert type(layer) is type(plain.backbone.get_submodule(FIRST[name]))
    assert layer.in_channels == num_channels
    before, after = dict(plain.named_parameters()), dict(model.named_parameters())
    assert list(before) == list(after)
    first = f"backbone.{FIRST[name]}.weight"
    for parameter, value in before.items():
        expected = adapt_weight(value, num_channels) if parameter == first else value
        assert torch.equal(after[parameter], expected), parameter
    size = spec.preprocess.crop_size
    with torch.inference_mode():
        assert model(torch.rand(2, num_channels, size, size)).shape == (2, 2)


def test_grey_pictures_give_the_features_that_they_gave_as_rgb() -> None:
    """The oracle: real weights, whose three channels share mean and std."""
    plain = build_model("efficientnet_lite0", 2).eval()
    grey = build_model("efficientnet_lite0", 2, num_channels=1).eval()
    six = build_model("efficientnet_lite0", 2, num_channels=6).eval()
    pixels = smooth_pictures(224)

    def features(model: Classifier) -> Tensor:
        channels = model.preprocess.num_channels
        with torch.inference_mode():
            return model.features(model.preprocess.normalize(pixels.expand(-1, channels, -1, -1)))

    expected = features(plain)
    for model in (grey, six):
        torch.testing.assert_close(features(model), expected, rtol=1e-3, atol=1e-4)


def test_grey_photographs_give_nearly_the_logits_of_rgb(photographs: Path) -> None:
    plain = build_model("efficientnet_lite0", 2).eval()
    grey = build_model("efficientnet_lite0", 2, num_channels=1).eval()
    path = sorted(photographs.glob("val/*/*.jpg"))[0]
    with Image.open(path) as image:
        picture = image.convert("L")
    with torch.inference_mode():
        expected, found = (
            model.features(model.preprocess.eval()(model.preprocess.decode(picture))[None])
            for model in (plain, grey)
        )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert expected.std() > 0.1


def test_tiny_network_keeps_the_contract_with_other_channels(tiny_spec: BackboneSpec) -> None:
    def build() -> nn.Module:
        network = tiny_spec.build()
        adapt_channels(network, 4, preprocess=tiny_spec.preprocess, name="tiny")
        return network

    preprocess = adapt_preprocess(tiny_spec.preprocess, 4)
    check_backbone(BackboneSpec(name="four", build=build, head_path="fc", preprocess=preprocess))


def test_modes_hooks_and_gradients_stay(tiny_spec: BackboneSpec) -> None:
    network = tiny_spec.build()
    network.get_submodule("bn1").eval()
    network.get_parameter("conv1.weight").requires_grad_(False)
    buffers = {name: each.clone() for name, each in network.named_buffers()}
    adapt_channels(network, 1, preprocess=tiny_spec.preprocess, name="tiny")
    assert network.training
    assert not network.get_submodule("bn1").training
    assert not network.get_parameter("conv1.weight").requires_grad
    assert all(torch.equal(each, buffers[name]) for name, each in network.named_buffers())
    assert not any(layer._forward_pre_hooks for layer in network.modules())


# Networks that cannot be adapted


class Changing(nn.Module):
    """A network that changes the images before it reads them."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.conv(self.change(images)).mean(dim=(2, 3))
        return features


class Twice(nn.Module):
    """A network whose second branch reads the images too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = (self.first(images) + self.second(images)).mean(dim=(2, 3))
        return features


def pooled(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


CHANGED = "its network changes the images before the first convolution"
FIXED = "its first convolution has groups or a parametrised weight"
REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (nn.Flatten, "it has no 2-D convolution that reads the images"),
    (lambda: Changing(lambda images: images / 2), CHANGED),
    (lambda: pooled(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), CHANGED),
    (lambda: pooled(nn.Conv2d(3, 6, 3, groups=3)), FIXED),
    (lambda: pooled(weight_norm(nn.Conv2d(3, 4, 3))), FIXED),
    (
        Twice,
        "on images of the shape (1, 5, 32, 32) its network raises RuntimeError: Given groups=1, "
        "weight of size [4, 3, 3, 3], expected input[1, 5, 32, 32] to have 3 channels, but got "
        "5 channels instead",
    ),
    (
        lambda: pooled(nn.Conv2d(4, 4, 3)),
        "on images of the shape (1, 3, 32, 32) its network raises RuntimeError: Given groups=1, "
        "weight of size [4, 4, 3, 3], expected input[1, 3, 32, 32] to have 4 channels, but got "
        "3 channels instead",
    ),
]


@pytest.mark.parametrize(("build", "reason"), REFUSED)
def test_network_that_cannot_be_adapted_is_an_error(
    build: Callable[[], nn.Module], reason: str
) -> None:
    spec = BackboneSpec(
        name="odd",
        build=build,
        num_features=4,
        preprocess=Preprocess(crop_size=32, resize_size=32),
    )
    with pytest.raises(BackboneError) as error:
        build_model(spec, 2, weights=None, num_channels=5)
    assert str(error.value) == (
        f"Backbone `odd` cannot be adapted to 5 channels: {reason}. {WAYS_OUT}"
    )


def test_error_without_words_has_its_class(tiny_spec: BackboneSpec) -> None:
    def fail(images: Tensor) -> Tensor:
        raise NotImplementedError

    with pytest.raises(BackboneError) as error:
        adapt_channels(Changing(fail), 1, preprocess=tiny_spec.preprocess, name="odd")
    assert str(error.value) == (
        f"Backbone `odd` cannot be adapted to 1 channel: on images of the shape (1, 3, 32, 32) "
        f"its network raises NotImplementedError. {WAYS_OUT}"
    )
    assert isinstance(error.value.__cause__, NotImplementedError)


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_networks_that_rescale_by_channel_are_an_error(name: str) -> None:
    with pytest.raises(BackboneError) as error:
        build_model(name, 2, weights=None, num_channels=1)
    assert str(error.value) == (
        f"Backbone `{name}` cannot be adapted to 1 channel: {CHANGED}. {WAYS_OUT}"
    )


def test_every_small_network_of_torchvision_is_adapted_or_refused_by_name() -> None:
    small = [
        name
        for name in models.list_models(module=models)
        if models.get_model_weights(name).DEFAULT.meta["num_params"] < 8_000_000
    ]
    assert len(small) > 10
    refused = []
    for name in small:
        try:
            build_model(name, 2, weights=None, num_channels=2)
        except BackboneError as error:
            assert str(error).endswith(WAYS_OUT)  # noqa: PT017
            refused.append(name)
    assert refused == ["googlenet"]


# Artifacts


@pytest.mark.parametrize("num_channels", [1, 6])
def test_artifact_of_a_named_backbone_needs_nothing_else(num_channels: int, tmp_path: Path) -> None:
    model = build_model("mnasnet0_5", 2, weights=None, num_channels=num_channels).eval()
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=["a", "b"])
    loaded = load_artifact(path).model
    assert loaded.preprocess == model.preprocess
    images = torch.rand(2, num_channels, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))


def options_of(model: Classifier) -> dict[str, Any]:
    return {name: each.requires_grad for name, each in model.named_parameters()}


def test_freezing_is_as_for_three_channels(tiny_spec: BackboneSpec) -> None:
    plain, grey = (
        build_model(tiny_spec, 2, weights=None, freeze="backbone.conv1.*", num_channels=number)
        for number in (3, 1)
    )
    assert options_of(grey) == options_of(plain)
    assert not grey.backbone.get_parameter("conv1.weight").requires_grad
