from __future__ import annotations

import copy
import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from transferkit._seeding import seeded_torch
from transferkit.errors import BackboneError, ConfigError, FreezeError, WeightsError
from transferkit.images import Preprocess
from transferkit.models import (
    BackboneSpec,
    Classifier,
    FreezePlan,
    HeadSpec,
    build_model,
    register_backbone,
)
from transferkit.models.registry import _BACKBONES


def test_name_spec_and_network_are_taken(tiny_spec: BackboneSpec) -> None:
    register_backbone("tiny", lambda: tiny_spec)
    try:
        named = build_model("tiny", 3, weights=None)
    finally:
        _BACKBONES.remove("tiny")
    specified = build_model(tiny_spec, 3, weights=None)
    for name, value in named.state_dict().items():
        assert torch.equal(specified.state_dict()[name], value)
    for model in (named, specified):
        assert model.backbone_name == "tiny"
        assert model.num_features == 16
        assert model.num_classes == 3
        assert model.preprocess is tiny_spec.preprocess
        assert model.training
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 3)


def test_own_network_is_taken_as_it_is() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 6))
    before = network.get_parameter("1.weight").clone()
    model = build_model(network, 2, num_features=6)
    assert model.backbone is network
    assert torch.equal(network.get_parameter("1.weight"), before)
    assert model.backbone_name == "Sequential"
    assert model.preprocess == Preprocess()
    assert model(torch.rand(2, 3, 4, 4)).shape == (2, 2)


def test_own_network_takes_a_file_too(tmp_path: Path) -> None:
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(48, 6)) for _ in range(2)]
    network, other = networks
    torch.save(other.state_dict(), tmp_path / "weights.pth")
    build_model(network, 2, num_features=6, weights=tmp_path / "weights.pth")
    assert torch.equal(network.get_parameter("1.weight"), other.get_parameter("1.weight"))


def test_preprocess_can_be_replaced(tiny_spec: BackboneSpec) -> None:
    preprocess = Preprocess(crop_size=16, resize_size=20)
    model = build_model(tiny_spec, 2, weights=None, preprocess=preprocess)
    assert model.preprocess is preprocess
    own = build_model(nn.Flatten(), 2, num_features=6, preprocess=preprocess)
    assert own.preprocess is preprocess


def test_freezing_is_part_of_building(tiny_spec: BackboneSpec) -> None:
    plan = FreezePlan(("backbone.conv1.*",))
    model = build_model(tiny_spec, 2, weights=None, freeze=plan)
    assert model.freeze_plan is plan
    frozen = [name for name, each in model.named_parameters() if not each.requires_grad]
    assert frozen == ["backbone.conv1.weight", "backbone.conv1.bias"]
    adapting = build_model(tiny_spec, 2, weights=None, freeze="backbone", bn="adapt")
    assert adapting.freeze_plan == FreezePlan(("backbone.*",), "adapt")
    assert adapting.backbone.get_submodule("bn1").training


def test_seed_rules_all_random_weights_and_the_callers_state_is_untouched(
    tiny_spec: BackboneSpec,
) -> None:
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    first, second, other = (
        build_model(tiny_spec, 2, weights=None, seed=seed).state_dict() for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert not torch.equal(first["backbone.conv1.weight"], other["backbone.conv1.weight"])
    assert random.getstate() == states[0]
    assert str(np.random.get_state()) == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_default_weights_are_those_of_the_spec(tiny_spec: BackboneSpec) -> None:
    torch.manual_seed(9)
    state = tiny_spec.build().state_dict()
    spec = BackboneSpec(
        name="tiny",
        build=tiny_spec.build,
        head_path="fc",
        preprocess=tiny_spec.preprocess,
        load_weights=lambda: state,
    )
    found = build_model(spec, 2).backbone.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found.items())


def test_backbone_without_default_weights_is_an_error(tiny_spec: BackboneSpec) -> None:
    with pytest.raises(WeightsError) as error:
        build_model(tiny_spec, 2)
    assert str(error.value) == (
        "Backbone `tiny` has no default weights. Pass a file as `weights=PATH` or keep random "
        "weights with `weights=None`."
    )


@pytest.mark.parametrize("number", [1, 0, -2, True, 2.0, "2", None])
def test_number_of_classes_that_cannot_work_is_an_error(
    tiny_spec: BackboneSpec, number: Any
) -> None:
    with pytest.raises(ConfigError) as error:
        build_model(tiny_spec, number, weights=None)
    assert str(error.value) == (
        f"`num_classes` should be an integer of at least 2, found {number!r}."
    )


def test_own_network_without_its_number_of_features_is_an_error() -> None:
    with pytest.raises(ConfigError) as error:
        build_model(nn.Flatten(), 2)
    assert str(error.value) == (
        "A network of your own needs `num_features`, the D of its features (N, D)."
    )


@pytest.mark.parametrize("name", [True, False])
def test_number_of_features_of_a_known_backbone_is_an_error(
    tiny_spec: BackboneSpec, name: bool
) -> None:
    with pytest.raises(ConfigError) as error:
        build_model("resnet18" if name else tiny_spec, 2, num_features=512)
    assert str(error.value) == (
        "`num_features` is for a network of your own; a named backbone knows it. Leave it out."
    )


@pytest.mark.parametrize("backbone", [None, 18, nn.Flatten])
def test_backbone_of_another_kind_is_an_error(backbone: Any) -> None:
    with pytest.raises(ConfigError) as error:
        build_model(backbone, 2)
    assert str(error.value) == (
        f"`backbone` should be a name, a BackboneSpec or an nn.Module, "
        f"found {type(backbone).__name__}."
    )


def test_other_arguments_are_checked(tiny_spec: BackboneSpec) -> None:
    with pytest.raises(ConfigError, match=r"^`seed` should be "):
        build_model(tiny_spec, 2, weights=None, seed=-1)
    with pytest.raises(FreezeError, match=r"^`bn` should be "):
        build_model(tiny_spec, 2, weights=None, freeze="backbone", bn="x")  # type: ignore[arg-type]


GREY = Preprocess(crop_size=32, resize_size=32, mean=(0.4,), std=(0.3,))


def test_number_of_channels_adapts_network_and_preprocess(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None, num_channels=1)
    assert model.preprocess.mean == pytest.approx((0.449,))
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 2)
    same = build_model(tiny_spec, 2, weights=None, num_channels=3)
    assert same.preprocess is tiny_spec.preprocess
    assert same(torch.rand(2, 3, 32, 32)).shape == (2, 2)


@pytest.mark.parametrize("num_channels", [None, 1, np.int64(1)])
def test_preprocess_may_say_the_number_of_channels(
    tiny_spec: BackboneSpec, num_channels: Any
) -> None:
    model = build_model(tiny_spec, 2, weights=None, preprocess=GREY, num_channels=num_channels)
    assert model.preprocess is GREY
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 2)


def test_loaded_weights_are_adapted(tiny_spec: BackboneSpec, tmp_path: Path) -> None:
    state = tiny_spec.build().state_dict()
    torch.save(state, tmp_path / "rgb.pth")
    model = build_model(tiny_spec, 2, weights=tmp_path / "rgb.pth", num_channels=1)
    expected = state["conv1.weight"].sum(dim=1, keepdim=True)
    assert torch.equal(model.backbone.get_parameter("conv1.weight"), expected)
    assert torch.equal(model.backbone.get_parameter("layer1.0.weight"), state["layer1.0.weight"])


def test_adapting_leaves_the_callers_random_state_alone(tiny_spec: BackboneSpec) -> None:
    class Drawing(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images + torch.rand(1)

    spec = BackboneSpec(
        name="drawing",
        build=lambda: nn.Sequential(tiny_spec.build(), Drawing()),
        num_features=10,
        preprocess=tiny_spec.preprocess,
    )
    state = torch.get_rng_state()
    build_model(spec, 2, weights=None, num_channels=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_spec_may_have_other_channels_of_its_own() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    spec = BackboneSpec(name="grey", build=build, num_features=6, preprocess=GREY)
    assert build_model(spec, 2, weights=None)(torch.rand(2, 1, 32, 32)).shape == (2, 2)
    model = build_model(spec, 2, weights=None, num_channels=3)
    assert model.preprocess.mean == (0.4, 0.4, 0.4)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 2)


def test_own_network_says_its_channels_by_preprocess() -> None:
    network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = network.get_parameter("0.weight").clone()
    for number in (None, 1):
        model = build_model(network, 2, num_features=6, preprocess=GREY, num_channels=number)
        assert model.preprocess is GREY
        assert torch.equal(network.get_parameter("0.weight"), before)
        assert model(torch.rand(2, 1, 32, 32)).shape == (2, 2)
    with pytest.raises(BackboneError) as error:
        build_model(network, 2, num_features=6, num_channels=1)
    assert str(error.value) == (
        "A network of your own is taken as it is and not adapted to `num_channels=1`. Where it "
        "reads so many, say so by `preprocess=`, with the mean and std of each channel."
    )


def test_numbers_of_channels_that_differ_are_an_error(tiny_spec: BackboneSpec) -> None:
    with pytest.raises(ConfigError) as error:
        build_model(tiny_spec, 2, weights=None, preprocess=GREY, num_channels=3)
    assert str(error.value) == (
        "`num_channels` is 3, `preprocess` has the mean and std of 1. Make them agree, or leave "
        "one of them out."
    )


@pytest.mark.parametrize("number", [0, -1, True, 1.0, "1"])
def test_number_of_channels_that_cannot_work_is_an_error(
    tiny_spec: BackboneSpec, number: Any
) -> None:
    with pytest.raises(ConfigError) as error:
        build_model(tiny_spec, 2, weights=None, num_channels=number)
    assert str(error.value) == (
        f"`num_channels` should be an integer of at least 1, found {number!r}."
    )


# Heads


def test_default_head_is_the_plain_layer_drawn_after_the_backbone(tiny_spec: BackboneSpec) -> None:
    with seeded_torch(3, torch.device("cpu")):
        network, num_features = tiny_spec.build_features()
        head = nn.Linear(num_features, 2)
    model = build_model(tiny_spec, 2, weights=None, seed=3)
    assert type(model.head) is nn.Linear
    assert model.head_spec == HeadSpec()
    for found, expected in ((model.head, head), (model.backbone, network)):
        for name, value in expected.state_dict().items():
            assert torch.equal(found.state_dict()[name], value)


@pytest.mark.parametrize(
    "head", ["linear", "mlp", "cosine", HeadSpec(kind="mlp", hidden=(4, 5), dropout=0.5)]
)
def test_head_is_the_one_that_was_asked_for(tiny_spec: BackboneSpec, head: Any) -> None:
    model = build_model(tiny_spec, 3, head=head, weights=None)
    assert model.head_spec == HeadSpec.parse(head)
    expected = model.head_spec.build(16, 3)
    assert type(model.head) is type(expected)
    shapes, wanted = (
        {name: each.shape for name, each in module.state_dict().items()}
        for module in (model.head, expected)
    )
    assert shapes == wanted
    plain = build_model(tiny_spec, 3, weights=None)
    for name, value in plain.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 3)


def test_dropout_of_the_head_follows_the_mode(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, head=HeadSpec(dropout=0.9), weights=None, freeze="backbone")
    images = torch.rand(2, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("head", ["fc", None, 2, nn.Linear(16, 2)])
def test_head_of_another_kind_is_an_error_before_anything_is_built(head: Any) -> None:
    def fail() -> nn.Module:
        raise AssertionError

    spec = BackboneSpec(name="fails", build=fail, preprocess=GREY)
    with pytest.raises(ConfigError) as error:
        build_model(spec, 2, head=head)
    assert str(error.value) == (
        f'`head` should be "linear", "mlp", "cosine" or a HeadSpec, found {head!r}.'
    )


# The head that came with the weights

NAMES = tuple(f"class {index}" for index in range(10))


@pytest.fixture
def tiny_state(tiny_spec: BackboneSpec) -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    return dict(tiny_spec.build().state_dict())


@pytest.fixture
def named_spec(tiny_spec: BackboneSpec, tiny_state: dict[str, torch.Tensor]) -> BackboneSpec:
    """The tiny backbone with default weights and names for its ten classes."""
    return replace(tiny_spec, load_weights=lambda: tiny_state, class_names=lambda: NAMES)


@pytest.fixture
def pretrained(named_spec: BackboneSpec) -> Classifier:
    return build_model(named_spec, 2)


def test_head_of_the_default_weights_is_kept(
    pretrained: Classifier, tiny_state: dict[str, torch.Tensor]
) -> None:
    head = pretrained.pretrained_head
    assert head is not None
    assert head.class_names == NAMES
    assert torch.equal(head.weight, tiny_state["fc.weight"])
    assert torch.equal(head.bias, tiny_state["fc.bias"])


def test_head_of_the_weights_gives_the_logits_of_the_whole_network(
    pretrained: Classifier, tiny_spec: BackboneSpec, tiny_state: dict[str, torch.Tensor]
) -> None:
    whole = tiny_spec.build().eval()
    whole.load_state_dict(tiny_state)
    images = torch.rand(2, 3, 32, 32)
    head = pretrained.eval().pretrained_head
    assert head is not None
    logits = pretrained.features(images) @ head.weight.T + head.bias
    torch.testing.assert_close(logits, whole(images))


def test_head_of_the_weights_is_no_part_of_the_state(
    pretrained: Classifier, tiny_spec: BackboneSpec
) -> None:
    plain = build_model(tiny_spec, 2, weights=None)
    assert pretrained.state_dict().keys() == plain.state_dict().keys()
    assert pretrained.num_parameters == plain.num_parameters
    assert "pretrained" not in repr(pretrained)


def test_head_of_a_file_is_kept_without_the_names_of_the_spec(
    named_spec: BackboneSpec, tiny_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    tiny_state["fc.bias"] += 1
    torch.save(tiny_state, path)
    head = build_model(named_spec, 2, weights=path).pretrained_head
    assert head is not None
    assert torch.equal(head.bias, tiny_state["fc.bias"])
    assert head.class_names == tuple(f"class {row}" for row in range(10))
    torch.save(tiny_state | {"fc.weight": torch.zeros(7, 3), "fc.bias": torch.zeros(7)}, path)
    assert build_model(named_spec, 2, weights=path).pretrained_head is None


def test_without_weights_or_names_there_is_no_pretrained_head(
    named_spec: BackboneSpec, tiny_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    assert build_model(named_spec, 2, weights=None).pretrained_head is None
    nameless = replace(named_spec, class_names=())
    assert build_model(nameless, 2).pretrained_head is None
    network, num_features = named_spec.build_features()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    own = build_model(network, 2, num_features=num_features, weights=tmp_path / "weights.pth")
    assert own.pretrained_head is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_has_the_same_heads(pretrained: Classifier, copied: Any) -> None:
    twin = copied(pretrained)
    assert twin.head_spec == pretrained.head_spec
    for name, value in pretrained.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value)
    head, expected = twin.pretrained_head, pretrained.pretrained_head
    assert expected is not None
    assert head.class_names == NAMES
    assert torch.equal(head.weight, expected.weight)
    assert torch.equal(head.bias, expected.bias)


def test_pretrained_head_stays_where_it_is_when_the_model_moves(pretrained: Classifier) -> None:
    head = pretrained.pretrained_head
    moved = pretrained.to("meta")
    assert moved.head_spec == HeadSpec()
    assert moved.pretrained_head is head
    assert head is not None
    assert head.weight.device.type == "cpu"
    assert head.weight.dtype == torch.float32
