from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from transferkit.images import Preprocess
from transferkit.models import BackboneSpec, Classifier, build_model
from transferkit.models.stages import Stage
from transferkit.training.groups import Rates, make_groups, regroup, set_option, stage_of


def staged(num_stages: int, **freezing: Any) -> Classifier:
    spec = BackboneSpec(
        name="staged",
        build=lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(num_stages))),
        num_features=4,
        preprocess=Preprocess(),
    )
    return build_model(spec, 2, weights=None, **freezing)


def named(model: Classifier, groups: list[dict[str, Any]]) -> dict[str, set[str]]:
    """Return the names of the parameters in each group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[each] for each in group["params"]} for group in groups}


def weights(model: Classifier, prefix: str) -> list[nn.Parameter]:
    return [each for name, each in model.named_parameters() if name.startswith(prefix)]


def step(model: Classifier, optimizer: Optimizer, times: int = 1) -> None:
    inputs = torch.linspace(-1, 1, 24).view(6, 4)
    for _ in range(times):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), torch.arange(6) % 2).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


# Who is in which group


def test_the_head_comes_first_then_the_last_stage() -> None:
    model = staged(3)
    groups = make_groups(model, None)
    assert [group["name"] for group in groups] == ["head", "2", "1", "0"]
    assert named(model, groups)["1"] == {"backbone.1.weight", "backbone.1.bias"}
    assert all(group.keys() == {"name", "params"} for group in groups)


def test_the_rates_of_stages_are_exact() -> None:
    rates = Rates(lr=0.3, backbone_lr_factor=0.1, stage_lr_factor=0.7)
    groups = make_groups(staged(4), rates)
    expected = [0.3, *(0.3 * 0.1 * 0.7**depth for depth in range(4))]
    assert [group["lr"] for group in groups] == expected


def test_a_frozen_stage_keeps_its_place_in_the_rates() -> None:
    model = staged(3, freeze="backbone.2.*")
    rates = Rates(lr=1.0, backbone_lr_factor=0.5, stage_lr_factor=0.5)
    groups = {group["name"]: group["lr"] for group in make_groups(model, rates)}
    assert groups == {"head": 1.0, "1": 0.25, "0": 0.125}


def test_only_what_trains_is_in_a_group() -> None:
    model = staged(2, freeze="*.bias")
    assert named(model, make_groups(model, None)) == {
        "head": {"head.weight"},
        "1": {"backbone.1.weight"},
        "0": {"backbone.0.weight"},
    }
    chosen = frozenset({"backbone.0.bias"})
    assert named(model, make_groups(model, None, chosen)) == {"0": {"backbone.0.bias"}}


def test_a_backbone_without_stages_is_one_group() -> None:
    model = Classifier(
        nn.Linear(4, 4),
        num_features=4,
        num_classes=2,
        backbone_name="plain",
        preprocess=Preprocess(),
    )
    head, backbone = make_groups(model, Rates(lr=1.0, backbone_lr_factor=0.5, stage_lr_factor=0.1))
    assert (head["name"], head["lr"]) == ("head", 1.0)
    assert (backbone["name"], backbone["lr"]) == ("backbone", 0.5)
    assert stage_of("backbone.weight", model) is None


def test_what_lies_in_no_stage_has_the_first_ones_rate() -> None:
    model = staged(3)
    model.stages = model.stages[1:]
    groups = make_groups(model, Rates(lr=1.0, stage_lr_factor=0.5))
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("head", 1.0),
        ("2", 1.0),
        ("1", 0.5),
        ("backbone", 0.5),
    ]


def test_a_stage_called_head_is_not_the_head() -> None:
    backbone = nn.Sequential()
    backbone.add_module("stem", nn.Linear(4, 4))
    backbone.add_module("head", nn.Linear(4, 4))
    model = Classifier(
        backbone,
        num_features=4,
        num_classes=2,
        backbone_name="odd",
        preprocess=Preprocess(),
        stages=[Stage("stem", ("stem",)), Stage("head", ("head",))],
    )
    assert named(model, make_groups(model, None)) == {
        "head": {"head.weight", "head.bias"},
        "backbone.head": {"backbone.head.weight", "backbone.head.bias"},
        "stem": {"backbone.stem.weight", "backbone.stem.bias"},
    }


def test_the_stage_of_a_parameter(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    assert stage_of("backbone.bn1.weight", model) == 0
    assert stage_of("backbone.layer1.0.weight", model) == 1
    assert stage_of("head.weight", model) is None


# What becomes of an optimizer when other things train

MAKERS: dict[str, Any] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "foreach": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("name", MAKERS)
def test_what_goes_on_keeps_its_identity(name: str) -> None:
    model = staged(3, freeze="backbone")
    optimizer = MAKERS[name](make_groups(model, Rates(lr=0.1)))
    step(model, optimizer, 3)
    groups, (head,) = optimizer.param_groups, optimizer.param_groups
    state = {key: dict(value) for key, value in optimizer.state.items()}
    model.unfreeze("from:1")
    regroup(optimizer, model, Rates(lr=0.2, backbone_lr_factor=0.5))
    assert optimizer.param_groups is groups
    assert optimizer.param_groups[0] is head
    assert [group["name"] for group in optimizer.param_groups] == ["head", "2", "1"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1, 0.1]
    assert optimizer.state.keys() == state.keys()  # What is new has no state yet.
    assert state
    for parameter, values in state.items():
        for key, value in values.items():
            assert optimizer.state[parameter][key] is value
    options = {key: value for key, value in head.items() if key not in ("name", "params", "lr")}
    for group in optimizer.param_groups[1:]:
        assert {key: group[key] for key in options} == options
    step(model, optimizer)
    assert len(optimizer.state) == 6


@pytest.mark.parametrize("name", MAKERS)
def test_refrozen_parameters_do_not_move_any_more(name: str) -> None:
    model = staged(2)
    optimizer = MAKERS[name](make_groups(model, Rates(lr=0.1)))
    step(model, optimizer, 3)
    model.freeze("until:0")
    regroup(optimizer, model, Rates(lr=0.1))
    assert [group["name"] for group in optimizer.param_groups] == ["head", "1"]
    frozen = [each.detach().clone() for each in weights(model, "backbone.0.")]
    trained = [each.detach().clone() for each in weights(model, "head.")]
    step(model, optimizer, 3)
    for before, after in zip(frozen, weights(model, "backbone.0."), strict=True):
        assert before.numpy().tobytes() == after.detach().numpy().tobytes()
    assert not torch.equal(trained[0], weights(model, "head.")[0])


@pytest.mark.parametrize("name", MAKERS)
def test_who_comes_back_has_no_state_of_the_past(name: str) -> None:
    model = staged(2)
    optimizer = MAKERS[name](make_groups(model, Rates(lr=0.1)))
    step(model, optimizer, 3)
    for what in ("until:0", "none"):
        model.freeze(what)
        regroup(optimizer, model, Rates(lr=0.1))
    back = set(weights(model, "backbone.0."))
    assert set(model.parameters()) - set(optimizer.state) == back
    held = [each for group in optimizer.param_groups for each in group["params"]]
    assert set(held) == set(model.parameters())
    assert len(held) == len(set(held))


def test_part_of_a_stage_joins_the_group_that_there_is() -> None:
    model = staged(1, freeze="backbone.0.weight")
    optimizer = torch.optim.SGD(make_groups(model, Rates(lr=0.1)), lr=0.1)
    group = optimizer.param_groups[1]
    model.unfreeze("all")
    regroup(optimizer, model, Rates(lr=0.1, backbone_lr_factor=0.5))
    assert optimizer.param_groups[1] is group
    assert named(model, [group]) == {"0": {"backbone.0.weight", "backbone.0.bias"}}
    assert group["lr"] == 0.05
    model.freeze("backbone.0.bias")
    regroup(optimizer, model, Rates(lr=0.1))
    assert optimizer.param_groups[1] is group
    assert named(model, [group]) == {"0": {"backbone.0.weight"}}


def test_the_head_is_first_however_late_it_comes() -> None:
    model = staged(2, freeze=["head.*", "backbone.1.*"])
    optimizer = torch.optim.SGD(make_groups(model, Rates(lr=0.1)), lr=0.1)
    model.unfreeze("all")
    regroup(optimizer, model, Rates(lr=0.1))
    assert [group["name"] for group in optimizer.param_groups] == ["head", "1", "0"]


def test_groups_of_ones_own_stay_and_what_is_new_joins_them() -> None:
    model = staged(2, freeze="backbone")
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.5)
    optimizer.param_groups[0]["momentum"] = 0.7
    own = optimizer.param_groups[0]
    model.unfreeze("1")
    regroup(optimizer, model, None)
    assert optimizer.param_groups[0] is own
    assert own["momentum"] == 0.7
    assert "name" not in own
    new = optimizer.param_groups[1]
    assert (new["name"], new["lr"], new["momentum"]) == ("1", 0.1, 0.5)  # The defaults.
    regroup(optimizer, model, None)
    assert optimizer.param_groups == [own, new]


def test_an_optimizer_of_named_parameters_keeps_their_names() -> None:
    model = staged(2, freeze="until:0")
    optimizer = torch.optim.SGD(
        [(name, each) for name, each in model.named_parameters() if each.requires_grad], lr=0.1
    )
    model.freeze("backbone.1.*")
    regroup(optimizer, model, None)
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["head.weight", "head.bias"],
        ["backbone.0.weight", "backbone.0.bias"],
    ]
    assert optimizer.state_dict()["param_groups"][1]["params"] == [2, 3]


def test_nothing_changes_where_nothing_changes() -> None:
    model = staged(2)
    optimizer = torch.optim.SGD(make_groups(model, Rates(lr=0.1)), lr=0.1)
    before = [(group, list(group["params"])) for group in optimizer.param_groups]
    regroup(optimizer, model, None)
    assert [(group, group["params"]) for group in optimizer.param_groups] == before


def test_a_rate_that_is_a_tensor_stays_the_same_tensor() -> None:
    rate = torch.tensor(0.5)
    group: dict[str, Any] = {"lr": rate, "momentum": 0.9}
    set_option(group, "lr", 0.25)
    set_option(group, "momentum", 0.5)
    assert group["lr"] is rate
    assert group == {"lr": torch.tensor(0.25), "momentum": 0.5}
