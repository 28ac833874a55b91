from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from transferkit.images import Preprocess
from transferkit.models import get_backbone
from transferkit.models.torchvision_backbones import (
    WEIGHTS_TERMS,
    imagenet_class_names,
    torchvision_names,
    torchvision_spec,
)


def smooth_picture() -> Tensor:
    coarse = torch.rand((1, 3, 9, 12), generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(coarse, (90, 120), mode="bilinear")
    return (smooth[0] * 255).round().to(torch.uint8)


def by_preprocess() -> list[Any]:
    """Return a name for each different preprocessing."""
    specs = {torchvision_spec(name).preprocess: name for name in torchvision_names()}
    return sorted(specs.values())


def test_every_classification_network_is_provided() -> None:
    assert torchvision_names() == models.list_models(module=models)


@pytest.mark.parametrize("name", by_preprocess())
def test_preprocess_agrees_with_the_transforms_of_the_weights(name: str) -> None:
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    preprocess = get_backbone(name).preprocess
    image = smooth_picture()
    found, expected = preprocess.eval()(image), transforms(image)
    assert found.shape == expected.shape
    std = torch.tensor(preprocess.std).view(3, 1, 1)
    # One step of 8 bits: bytes may be resampled in integers or in floats.
    assert float(((found - expected) * std * 255).abs().max()) < 1.01


@pytest.mark.parametrize("name", torchvision_names())
def test_spec_says_what_the_weights_say(name: str) -> None:
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    spec = get_backbone(name)
    assert spec.name == name
    assert spec.preprocess == Preprocess(
        crop_size=transforms.crop_size[0],
        resize_size=transforms.resize_size[0],
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )
    assert spec.load_weights is not None
    categories = models.get_model_weights(name).DEFAULT.meta["categories"]
    assert spec.find_class_names() == tuple(categories)


def test_licence_of_the_weights_is_carried() -> None:
    weights = models.ViT_H_14_Weights.DEFAULT
    assert get_backbone("vit_h_14").weights_license == weights.meta["license"]
    assert get_backbone("resnet18").weights_license == WEIGHTS_TERMS


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_input_is_rescaled_whether_or_not_weights_are_given(name: str) -> None:
    spec = get_backbone(name)
    network: Any = spec.build()
    assert network.transform_input is True
    assert network.aux_logits is False
    for side_head in spec.head_keys:
        assert getattr(network, side_head, None) is None


@pytest.mark.parametrize("name", ["vit_b_16", "vit_h_14"])
def test_vision_transformer_is_built_for_the_size_of_its_weights(name: str) -> None:
    spec = get_backbone(name)
    with torch.device("meta"):
        network: Any = spec.build()
    assert network.image_size == spec.preprocess.crop_size


def test_features_are_what_goes_into_the_head_of_torchvision() -> None:
    torch.manual_seed(0)
    whole = models.resnet18(weights=None).eval()
    network, num_features = get_backbone("resnet18").build_features()
    network.load_state_dict(
        {key: value for key, value in whole.state_dict().items() if not key.startswith("fc.")}
    )
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        features = network.eval()(images)
        assert features.shape == (2, num_features)
        assert torch.equal(whole.fc(features), whole(images))


def test_names_of_imagenet_are_a_thousand_different_ones() -> None:
    names = imagenet_class_names()
    assert len(set(names)) == len(names) == 1000
    assert (names[0], names[309], names[310], names[999]) == (
        "tench",
        "bee",
        "ant",
        "toilet tissue",
    )
