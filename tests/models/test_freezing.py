from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from transferkit.errors import FreezeError
from transferkit.models import BackboneSpec, Classifier, FreezePlan, build_model
from transferkit.models.freezing import find_pinned

PATTERNS = st.lists(st.text(min_size=1), min_size=1, max_size=4).map(tuple)
PLANS = st.builds(FreezePlan, PATTERNS, st.sampled_from(["frozen", "adapt"])) | st.just(
    FreezePlan()
)


def train_steps(model: Classifier, number: int = 3) -> None:
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        images = torch.rand(4, 3, 32, 32, generator=generator)
        loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 0, 1]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed_names(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }


# The plan as data


@settings(deadline=None)
@given(PLANS)
def test_plan_survives_json(plan: FreezePlan) -> None:
    assert FreezePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    ("freeze", "patterns"),
    [
        ("none", ()),
        ("backbone", ("backbone.*",)),
        ("backbone.conv1.*", ("backbone.conv1.*",)),
        (["a*", "b*"], ("a*", "b*")),
        (("a*",), ("a*",)),
    ],
)
def test_what_can_be_passed_becomes_a_plan(freeze: Any, patterns: tuple[str, ...]) -> None:
    assert FreezePlan.parse(freeze) == FreezePlan(patterns)


def test_a_plan_is_returned_as_it_is() -> None:
    plan = FreezePlan(("backbone.*",), "adapt")
    assert FreezePlan.parse(plan) is plan
    assert FreezePlan.parse("backbone", bn="adapt") == plan


@pytest.mark.parametrize("freeze", [None, True, 3, [], ["a", 3], {"a"}])
def test_anything_else_is_an_error(freeze: Any) -> None:
    with pytest.raises(FreezeError) as error:
        FreezePlan.parse(freeze)
    assert str(error.value) == (
        f'`freeze` should be "none", "backbone", a glob over parameter names or a list of globs, '
        f"found {freeze!r}."
    )


def test_unknown_mode_of_batchnorm_is_an_error() -> None:
    with pytest.raises(FreezeError) as error:
        FreezePlan.parse("backbone", bn="train")  # type: ignore[arg-type]
    assert str(error.value) == '`bn` should be "frozen", "adapt" or "fixed", found \'train\'.'


def test_adapting_where_nothing_is_frozen_is_an_error() -> None:
    with pytest.raises(FreezeError) as error:
        FreezePlan.parse("none", bn="adapt")
    assert str(error.value) == (
        'bn="adapt" has no effect where nothing is frozen: BatchNorm trains anyway. '
        'Leave it out, or freeze something, such as freeze="backbone".'
    )


# Which names


def test_globs_choose_by_name_across_dots(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    plan = FreezePlan(("backbone.layer1.*", "*.bn1.bias"))
    assert plan.frozen_names(model) == {
        "backbone.layer1.0.weight",
        "backbone.layer1.0.bias",
        "backbone.layer1.1.weight",
        "backbone.layer1.1.bias",
        "backbone.bn1.bias",
    }


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("backbone.layer1", "Did you mean `backbone.layer1.*`?"),
        (
            "layer1.*",
            "The parameters' names start with: backbone.bn1, backbone.conv1, backbone.layer1, "
            "head.bias, head.weight.",
        ),
        (
            "",
            "The parameters' names start with: backbone.bn1, backbone.conv1, backbone.layer1, "
            "head.bias, head.weight.",
        ),
    ],
)
def test_pattern_that_matches_nothing_is_an_error_and_changes_nothing(
    tiny_spec: BackboneSpec, pattern: str, hint: str
) -> None:
    with pytest.raises(FreezeError) as error:
        build_model(tiny_spec, 2, weights=None, freeze=pattern)
    assert str(error.value) == f"The freeze pattern `{pattern}` matches no parameter. {hint}"
    model = build_model(tiny_spec, 2, weights=None, freeze="backbone")
    with pytest.raises(FreezeError):
        model.freeze(["head.*", pattern])
    assert model.freeze_plan == FreezePlan.parse("backbone")
    assert model.is_backbone_frozen
    assert model.head.weight.requires_grad


def test_topmost_frozen_modules_are_pinned() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.Linear(2, 2))),
        nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
        nn.Linear(2, 2),
    )
    frozen = {name for name, _ in model.named_parameters() if name.startswith(("0.", "1.1."))}
    assert find_pinned(model, frozen) == ["0", "1.1"]
    assert find_pinned(model, frozen - {"0.2.0.bias"}) == ["0.0", "1.1"]
    assert find_pinned(model, set()) == []


# What frozen means


@pytest.mark.parametrize("disturb", [False, True])
def test_frozen_backbone_is_byte_identical_after_training(
    tiny_spec: BackboneSpec, disturb: bool
) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze="backbone")
    before = snapshot(model)
    if disturb:
        model.train()
        model.backbone.train()
        model.backbone.requires_grad_(False)
    train_steps(model)
    assert changed_names(model, before) == {"head.weight", "head.bias"}


def test_partly_frozen_backbone_changes_only_where_it_is_not_frozen(
    tiny_spec: BackboneSpec,
) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze=["backbone.conv1.*", "backbone.bn1.*"])
    before = snapshot(model)
    train_steps(model)
    expected = {name for name in before if not name.startswith(("backbone.conv1", "backbone.bn1"))}
    assert changed_names(model, before) == expected


def test_frozen_dropout_stands_still(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze="backbone")
    images = torch.rand(4, 3, 32, 32)
    assert torch.equal(model(images), model(images))
    model.freeze("none")
    assert not torch.equal(model(images), model(images))


def test_adapting_agrees_with_a_plain_loop_that_only_stops_gradients(
    tiny_spec: BackboneSpec,
) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze="backbone", bn="adapt")
    oracle = nn.Sequential(copy.deepcopy(model.backbone), copy.deepcopy(model.head)).train()
    oracle[0].requires_grad_(False)
    for module in oracle.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    before = snapshot(model.backbone)
    optimizer = torch.optim.SGD(oracle[1].parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        images = torch.rand(4, 3, 32, 32, generator=generator)
        loss = nn.functional.cross_entropy(oracle(images), torch.tensor([0, 1, 0, 1]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    train_steps(model)
    found, expected = model.state_dict(), oracle.state_dict()
    for name, value in zip(found, expected.values(), strict=True):
        assert torch.equal(found[name], value), name
    assert changed_names(model.backbone, before) == {
        f"{layer}.{buffer}"
        for layer in ("bn1", "layer1.1")
        for buffer in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_unfreezing_lets_everything_train_again(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze="backbone")
    assert model.freeze("none") is model
    assert all(module.training for module in model.modules())
    before = snapshot(model)
    train_steps(model)
    assert changed_names(model, before) == set(before)


def test_freezing_drops_gradients(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    model.freeze("backbone")
    assert all(each.grad is None for each in model.backbone.parameters())
    assert model.head.weight.grad is not None
