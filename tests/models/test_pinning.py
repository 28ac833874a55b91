from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
from torch import nn

from transferkit.models import BackboneSpec, FreezePlan, build_model
from transferkit.models.pinning import find_pinned

# Which modules are pinned


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


def test_modules_without_parameters_are_pinned_with_their_stage(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    frozen = FreezePlan.parse("until:layer1").frozen_names(model, model.stages)
    names = ["conv1", "bn1", "layer1"]
    assert find_pinned(model, frozen) == ["backbone"]
    first = FreezePlan.parse("until:conv1").frozen_names(model, model.stages)
    assert find_pinned(model, first, model.stages) == ["backbone.conv1", "backbone.bn1"]
    last = frozen - first
    assert find_pinned(model, last) == ["backbone.layer1"]
    assert find_pinned(model, last, model.stages) == [
        f"backbone.{name}" for name in (*names[2:], "drop", "fc")
    ]
    part = last - {"backbone.layer1.0.bias"}
    assert find_pinned(model, part, model.stages) == ["backbone.layer1.1"]


def test_module_that_shares_its_parameters_is_pinned_with_them() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert find_pinned(model, {"0.weight"}) == ["0", "1"]


# What is inert


@pytest.mark.parametrize(
    ("freeze", "bn", "number"),
    [
        ("none", "frozen", 0),
        ("none", "fixed", 0),
        ("until:conv1", "frozen", 1),
        ("until:conv1", "fixed", 1),
        ("until:conv1", "adapt", 0),
        ("until:conv1", "train", 0),
        ("until:layer1", "frozen", 2),
        ("backbone", "frozen", 2),
        ("backbone", "adapt", 0),
        ("*", "frozen", 2),
        ("head.*", "frozen", 0),
        ("backbone.layer1.*", "frozen", 0),
        ("backbone.conv1.*", "frozen", 0),
        (["backbone.conv1.*", "backbone.bn1.weight"], "frozen", 0),
        (["backbone.conv1.*", "backbone.bn1.*"], "frozen", 1),
        (["backbone.conv1.*", "backbone.bn1.*", "backbone.layer1.0.*"], "frozen", 1),
    ],
)
def test_stages_are_inert_where_all_of_them_is_frozen_and_still(
    tiny_spec: BackboneSpec, freeze: Any, bn: Any, number: int
) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze=freeze, bn=bn)
    assert model.num_inert_stages == number


@pytest.mark.parametrize("bn", ["adapt", "train"])
def test_stages_without_batchnorm_are_inert_whatever_it_does(bn: Any) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    network.append(nn.BatchNorm1d(4))
    model = build_model(network, 2, num_features=4, freeze="backbone", bn=bn)
    assert [stage.name for stage in model.stages] == ["1", "3"]
    assert model.num_inert_stages == 1


def test_batchnorm_without_statistics_is_never_inert() -> None:
    network = nn.Sequential(
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.Linear(4, 4),
        nn.BatchNorm1d(4, track_running_stats=False),
    )
    model = build_model(network, 2, num_features=4, freeze="backbone")
    assert model.num_inert_stages == 1


def test_parameters_that_somebody_else_stopped_are_not_inert(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    model.backbone.requires_grad_(False)  # Its BatchNorm and dropout go on.
    assert model.is_backbone_frozen
    assert model.num_inert_stages == 0
    assert model.split() is None


def test_parameters_that_somebody_else_lets_train_are_not_inert(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze="backbone")
    model.backbone.get_parameter("layer1.0.bias").requires_grad_(True)
    assert model.num_inert_stages == 1


def test_head_module_does_not_make_a_module_of_that_name_inert() -> None:
    network = nn.Sequential(OrderedDict(head=nn.Linear(4, 4)))
    model = build_model(network, 2, num_features=4, freeze="head.*")
    assert model.num_inert_stages == 0
