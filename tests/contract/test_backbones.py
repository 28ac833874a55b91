"""What holds for every backbone of torchvision, with random weights on tiny images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision import models

from transferkit.artifacts import load_artifact, save_artifact
from transferkit.images import Preprocess
from transferkit.models import Classifier, build_model, get_backbone
from transferkit.models.stages import Stage
from transferkit.models.torchvision_backbones import HEAD_PATHS, torchvision_names

NUM_CLASSES = 3
MAX_PARAMETERS = 30_000_000
"""Networks with more are only looked at, without memory, in the default run."""

FIXED_SIZES = {"maxvit_t": 224, "inception_v3": 75}
"""Smallest images of the networks that do not take 64 pixels; `vit_*` know their own."""


def num_parameters(name: str) -> int:
    number: int = models.get_model_weights(name).DEFAULT.meta["num_params"]
    return number


def image_size(name: str) -> int:
    if name.startswith("vit_"):
        return get_backbone(name).preprocess.crop_size
    return FIXED_SIZES.get(name, 64)


LARGE = [name for name in torchvision_names() if num_parameters(name) > MAX_PARAMETERS]
SMALLEST = {
    min((name for name in torchvision_names() if name.startswith(family)), key=num_parameters)
    for family in HEAD_PATHS
}
"""The smallest network of each family."""

ALL = [
    pytest.param(name, marks=pytest.mark.slow if name in LARGE else ())
    for name in torchvision_names()
]


def num_head_parameters(model: Classifier) -> int:
    """Return the number of parameters of the head, with a side head if there is one."""
    without_bias = model.num_features * 1000
    if model.backbone_name == "maxvit_t":
        return without_bias
    if model.backbone_name == "inception_v3":
        side_head: nn.Module = models.inception.InceptionAux(768, 1000)
        return without_bias + 1000 + sum(each.numel() for each in side_head.parameters())
    return without_bias + 1000


def make_images(name: str) -> Tensor:
    size = image_size(name)
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def make_model(name: str) -> Classifier:
    size = image_size(name)
    preprocess = Preprocess(crop_size=size, resize_size=size)
    return build_model(
        name, NUM_CLASSES, weights=None, freeze="backbone", preprocess=preprocess, seed=1
    ).eval()


@pytest.fixture(scope="module", params=ALL)
def model(request: pytest.FixtureRequest) -> Classifier:
    """A frozen model, built once for the tests below."""
    return make_model(request.param)


def test_features_and_logits_have_their_shapes(model: Classifier) -> None:
    images = make_images(model.backbone_name)
    with torch.inference_mode():
        features, logits = model.features(images), model(images)
        assert torch.equal(logits, model.head(features))
    assert features.shape == (2, model.num_features)
    assert logits.shape == (2, NUM_CLASSES)
    assert features.dtype == logits.dtype == torch.float32
    assert bool(torch.isfinite(logits).all())


def test_no_part_of_the_old_head_is_left(model: Classifier) -> None:
    own = sum(each.numel() for each in model.backbone.parameters())
    assert num_parameters(model.backbone_name) - own == num_head_parameters(model)


def take_steps(model: Classifier) -> None:
    """Train for two steps; before the second somebody puts the whole backbone into training."""
    images = make_images(model.backbone_name)
    optimizer = torch.optim.SGD(
        model.trainable_parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1
    )
    disturb: tuple[Callable[[], object], ...] = (model.train, model.backbone.train)
    for act in disturb:
        act()
        loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert model.training
    model.eval()


def test_frozen_backbone_is_byte_identical_after_training(model: Classifier) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    take_steps(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) is name.startswith("backbone."), name


def test_stages_share_out_the_parameters(model: Classifier) -> None:
    check_stages(model.backbone, model.stages)


def check_stages(network: nn.Module, stages: tuple[Stage, ...]) -> None:
    assert len(stages) >= 4
    for name, _ in network.named_parameters():
        assert sum(stage.holds(name) for stage in stages) == 1, name


def test_artifact_gives_the_same_logits(model: Classifier, tmp_path: Path) -> None:
    path = save_artifact(tmp_path / "model.safetensors", model, class_names=["a", "b", "c"])
    loaded = load_artifact(path).model
    images = make_images(model.backbone_name)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))
    expected = model.state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert loaded.freeze_plan == model.freeze_plan
    path.unlink()


def test_channels_last_gives_the_same_logits(model: Classifier) -> None:
    images = make_images(model.backbone_name)
    with torch.inference_mode():
        expected = model(images)
        model.to(memory_format=torch.channels_last)
        found = model(images.to(memory_format=torch.channels_last))
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SMALLEST - set(LARGE) else pytest.mark.slow)
        for name in torchvision_names()
    ],
)
def test_stages_up_to_the_middle_are_byte_identical_after_training(name: str) -> None:
    model = make_model(name)
    place = len(model.stages) // 2
    model.freeze(f"until:{model.stages[place - 1].name}")
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    take_steps(model)
    after = model.backbone.state_dict()
    changed = [name for name, value in before.items() if not torch.equal(after[name], value)]
    for number, stage in enumerate(model.stages):
        assert any(map(stage.holds, changed)) is (number >= place), stage.name


class WithoutMemory(TorchFunctionMode):
    """Make weights as tensors that have a shape and no memory."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty:
            options["device"] = "meta"
        return func(*args, **options)


@pytest.mark.parametrize("name", LARGE)
def test_large_networks_have_their_head_where_the_spec_says(name: str) -> None:
    with WithoutMemory():
        network, num_features = get_backbone(name).build_features()
    parameters = sum(each.numel() for each in network.parameters())
    # The head of some has no bias.
    assert num_parameters(name) - parameters in (num_features * 1000, (num_features + 1) * 1000)
    size = image_size(name)
    with torch.inference_mode():
        features = network.to("meta").eval()(torch.empty(2, 3, size, size, device="meta"))
    assert features.shape == (2, num_features)
    check_stages(network, get_backbone(name).find_stages(network))
