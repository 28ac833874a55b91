from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from torch import nn

from transferkit.errors import ConfigError, FreezeError, UnknownNameError
from transferkit.images import Preprocess
from transferkit.models import BackboneSpec, Classifier, FreezePlan, build_model
from transferkit.training.phases import (
    Phase,
    count,
    resolve_phases,
    spread_epochs,
    to_plain,
    trainable_names,
)


def staged(num_stages: int) -> Classifier:
    """Return a model with so many stages, one linear layer each, named "0", "1" and so on."""
    spec = BackboneSpec(
        name="staged",
        build=lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(num_stages))),
        num_features=4,
        preprocess=Preprocess(),
    )
    return build_model(spec, 2, weights=None)


def stageless() -> Classifier:
    """Return a model with a backbone that has parameters, but no stages."""
    return Classifier(
        nn.Linear(4, 4),
        num_features=4,
        num_classes=2,
        backbone_name="plain",
        preprocess=Preprocess(),
    )


def phase(**given: Any) -> Phase:
    values: dict[str, Any] = {"name": "one", "epochs": 1}
    return Phase(**(values | given))


def open_stages(model: Classifier, *phases: Phase) -> list[int]:
    """Return how many of the last stages train in each phase."""
    numbers = []
    for each in resolve_phases(model, phases):
        places = {int(name.split(".")[1]) for name in each.trainable if name[:4] == "back"}
        first = min(places, default=len(model.stages))
        assert places == set(range(first, len(model.stages)))
        assert {"head.weight", "head.bias"} <= each.trainable
        numbers.append(len(places))
    return numbers


# What a phase may be told


def test_lists_and_numpy_numbers_become_plain() -> None:
    found = phase(
        epochs=np.int64(3),
        freeze=["a.*", "b.*"],
        unfreeze=["a.*"],
        lr=np.float32(0.5),
        scheduler="multistep",
        scheduler_options={"milestones": (1, 2), "gamma": np.float64(0.5)},
    )
    assert (found.epochs, found.lr) == (3, 0.5)
    assert type(found.epochs) is int
    assert type(found.lr) is float
    assert (found.freeze, found.unfreeze) == (("a.*", "b.*"), ("a.*",))
    assert found.scheduler_options == {"milestones": [1, 2], "gamma": 0.5}
    assert to_plain("text") == "text"


_FREEZE = (
    '`freeze` of a phase should be "none", "backbone", "until:<stage>", a glob or several, or a '
    "FreezePlan, found {}."
)
_UNFREEZE = (
    '`unfreeze` of a phase should be "all", "from:<stage>", a stage\'s name, a glob or several, '
    '"next", or a share of the stages in (0, 1], found {}.'
)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": 3}, "`name` should be a text, found int."),
        ({"name": ""}, "`name` should be a text that is not empty, found ''."),
        ({"epochs": 0}, "`epochs` should be an integer of at least 1, found 0."),
        ({"epochs": 1.5}, "`epochs` should be an integer of at least 1, found 1.5."),
        ({"freeze": 3}, _FREEZE.format("3")),
        ({"freeze": []}, _FREEZE.format("[]")),
        ({"freeze": ["a", 1]}, _FREEZE.format("['a', 1]")),
        ({"unfreeze": 0}, _UNFREEZE.format("0")),
        ({"unfreeze": 1.5}, _UNFREEZE.format("1.5")),
        ({"unfreeze": True}, _UNFREEZE.format("True")),
        ({"unfreeze": float("nan")}, _UNFREEZE.format("nan")),
        ({"unfreeze": ()}, _UNFREEZE.format("()")),
        ({"lr": 0}, "`lr` should be a finite number above 0, found 0."),
        (
            {"backbone_lr_factor": -1},
            "`backbone_lr_factor` should be a finite number above 0, found -1.",
        ),
        (
            {"stage_lr_factor": float("inf")},
            "`stage_lr_factor` should be a finite number above 0, found inf.",
        ),
        (
            {"scheduler": print},
            "`scheduler` should be the name of a scheduler, found builtin_function_or_method.",
        ),
        (
            {"scheduler": "step", "scheduler_options": [1]},
            "`scheduler_options` should be a dict of options, found list.",
        ),
        (
            {"scheduler_options": {"gamma": 0.5}},
            "The `scheduler_options` of the phase `one` belong to a `scheduler`, which it does "
            "not name. Name it, or leave them out.",
        ),
        (
            {"scheduler": "step", "scheduler_options": {"gamma": {1}}},
            "The `scheduler_options` of the phase `one` should be plain JSON data, which a "
            "checkpoint can hold, found {'gamma': {1}}.",
        ),
        (
            {"scheduler": "step", "scheduler_options": {"gamma": float("nan")}},
            "The `scheduler_options` of the phase `one` should be plain JSON data, which a "
            "checkpoint can hold, found {'gamma': nan}.",
        ),
        (
            {"warmup": 1.0},
            "`warmup` should be a finite number in [0, 1), a share of steps, found 1.0.",
        ),
    ],
)
def test_what_cannot_work_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        phase(**given)


def test_a_callable_is_no_data() -> None:
    def freeze(name: str, parameter: nn.Parameter) -> bool:
        return True

    message = (
        f"`freeze` of a phase is data and no callable, found {freeze!r}. Ask it beforehand: "
        f"freeze=FreezePlan.parse(callable, model=model)."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        phase(freeze=freeze)


@pytest.mark.parametrize(
    "given",
    [
        Phase(name="plain", epochs=2),
        Phase(name="globs", epochs=1, freeze=("a.*", "b.*"), unfreeze=("b.*",)),
        Phase(name="share", epochs=1, freeze="backbone", unfreeze=1),
        Phase(name="plan", epochs=1, freeze=FreezePlan(until="layer2", bn="adapt")),
        Phase(
            name="rates",
            epochs=1,
            lr=0.1,
            backbone_lr_factor=0.5,
            stage_lr_factor=0.9,
            scheduler="multistep",
            scheduler_options={"milestones": (1, 2)},
            warmup=0.25,
        ),
    ],
    ids=lambda phase: phase.name,
)
def test_json_there_and_back(given: Phase) -> None:
    assert Phase.from_dict(json.loads(json.dumps(given.to_dict()))) == given


def test_the_dict_is_a_copy() -> None:
    given = phase(scheduler="step", scheduler_options={"gamma": 0.5})
    given.to_dict()["scheduler_options"]["gamma"] = 3
    assert given.scheduler_options == {"gamma": 0.5}


@pytest.mark.parametrize("data", [{"name": "a"}, {"name": "a", "epochs": 1, "epoch": 2}])
def test_data_that_is_no_phase(data: dict[str, Any]) -> None:
    message = (
        f"A phase as data should have `name`, `epochs` and what else there is of "
        f"['backbone_lr_factor', 'epochs', 'freeze', 'lr', 'name', 'scheduler', "
        f"'scheduler_options', 'stage_lr_factor', 'unfreeze', 'warmup'], found {sorted(data)}."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        Phase.from_dict(data)


# What is frozen in each phase


def test_a_chain_of_freezing_and_unfreezing() -> None:
    model = staged(4)
    phases = [
        Phase(name="head", epochs=2, freeze="backbone"),
        Phase(name="one", epochs=1, unfreeze="next"),
        Phase(name="two", epochs=3, unfreeze="next"),
        Phase(name="same", epochs=1),
        Phase(name="from", epochs=1, unfreeze="from:1"),
        Phase(name="all", epochs=1, unfreeze="all"),
        Phase(name="again", epochs=1, freeze="until:1"),
        Phase(name="both", epochs=1, freeze="backbone", unfreeze="3"),
    ]
    assert open_stages(model, *phases) == [0, 1, 2, 2, 3, 4, 2, 1]
    resolved = resolve_phases(model, phases)
    assert [each.epochs for each in resolved[:3]] == [range(1, 3), range(3, 4), range(4, 7)]
    assert [each.freeze_plan.until for each in resolved[1:3]] == ["2", "1"]
    assert model.freeze_plan == FreezePlan()  # The model is as it was.


def test_it_starts_from_what_is_frozen_in_the_model() -> None:
    model = staged(3)
    model.freeze("until:0")
    assert open_stages(model, phase()) == [2]
    assert open_stages(model, phase(unfreeze="next")) == [3]


def test_next_goes_down_a_resnet_stage_by_stage() -> None:
    model = build_model("resnet18", 2, weights=None, freeze="backbone", bn="train")
    phases = [Phase(name=str(n), epochs=1, unfreeze="next") for n in range(5)]
    plans = [each.freeze_plan for each in resolve_phases(model, phases)]
    assert [plan.until for plan in plans] == ["layer3", "layer2", "layer1", "conv1", None]
    assert [plan.bn for plan in plans] == ["train"] * 4 + ["frozen"]
    assert not plans[-1].freezes


def test_next_without_stages_is_everything() -> None:
    model = stageless()
    model.freeze("backbone")
    (found,) = resolve_phases(model, [phase(unfreeze="next")])
    assert found.trainable == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5, 9, 12, 25, 30])
@pytest.mark.parametrize("share", [0.01, 0.1, 1 / 3, 0.5, 2 / 3, 1.0])
def test_a_share_opens_so_many_of_the_last_stages(num_stages: int, share: float) -> None:
    expected = int(-(-round(share * num_stages, 6) // 1))  # Rounded up.
    (found,) = open_stages(staged(num_stages), phase(freeze="backbone", unfreeze=share))
    assert found == expected >= 1


def test_a_share_lets_at_least_so_many_train() -> None:
    phases = [
        Phase(name="most", epochs=1, freeze="until:0"),
        Phase(name="fewer", epochs=1, unfreeze=0.5),
        Phase(name="all", epochs=1, unfreeze=1.0),
        Phase(name="still all", epochs=1, unfreeze=1.0),
    ]
    assert open_stages(staged(4), *phases) == [3, 3, 4, 4]


def test_a_share_of_no_stages_is_everything() -> None:
    model = stageless()
    phases = [
        Phase(name="head", epochs=1, freeze="backbone"),
        Phase(name="third", epochs=1, unfreeze=1 / 3),
        Phase(name="all", epochs=1, unfreeze=1.0),
    ]
    numbers = [len(each.trainable) for each in resolve_phases(model, phases)]
    assert numbers == [2, 4, 4]


def test_all_unfreezes_what_lies_in_no_stage() -> None:
    model = staged(2)
    model.freeze("*.bias")
    (found,) = resolve_phases(model, [phase(unfreeze=1.0)])
    assert found.trainable == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("bn", ["adapt", "train", "fixed"])
def test_batch_norm_keeps_its_mode(bn: Any, tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze="backbone", bn=bn)
    phases = [
        Phase(name="other", epochs=1, freeze="until:conv1"),
        Phase(name="plan", epochs=1, freeze=FreezePlan(until="conv1", bn="frozen")),
    ]
    assert [each.freeze_plan.bn for each in resolve_phases(model, phases)] == [bn, "frozen"]
    (found,) = resolve_phases(model, [phase(freeze="none")])
    assert found.freeze_plan.bn == ("fixed" if bn == "fixed" else "frozen")


@pytest.mark.parametrize("bn", ["frozen", "train", "adapt"])
def test_the_names_that_train_are_those_that_require_grad(bn: Any, tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze="until:conv1", bn=bn)
    expected = {name for name, each in model.named_parameters() if each.requires_grad}
    assert ("backbone.bn1.weight" in expected) == (bn == "train")
    assert trainable_names(model.freeze_plan, model) == expected
    assert count(model, frozenset(expected)) == model.num_trainable_parameters


def test_nothing_is_left_to_train() -> None:
    message = (
        "In the phase `one` all parameters are frozen: nothing is left to train. Freeze less, "
        'such as freeze="backbone".'
    )
    with pytest.raises(FreezeError, match=f"^{re.escape(message)}$"):
        resolve_phases(staged(2), [phase(freeze="*")])


def test_nothing_is_frozen_any_more() -> None:
    phases = [
        Phase(name="all", epochs=1, freeze="backbone", unfreeze="next"),
        Phase(name="more", epochs=1, unfreeze="next"),
    ]
    message = (
        "In the phase `more`: Nothing is frozen any more, so that there is nothing to unfreeze. "
        "Leave `unfreeze` out."
    )
    with pytest.raises(FreezeError, match=f"^{re.escape(message)}$"):
        resolve_phases(staged(1), phases)


def test_an_error_names_its_phase() -> None:
    message = (
        "In the phase `one`: Unknown stage `layer9`. "
        "`[stage.name for stage in model.stages]` names all 2."
    )
    with pytest.raises(UnknownNameError, match=f"^{re.escape(message)}$"):
        resolve_phases(staged(2), [phase(freeze="until:layer9")])
    message = (
        "In the phase `one`: The freeze pattern `bckbone.*` matches no parameter. "
        "The parameters' names start with: backbone.0, backbone.1, head.bias, head.weight."
    )
    with pytest.raises(FreezeError, match=f"^{re.escape(message)}$"):
        resolve_phases(staged(2), [phase(freeze="bckbone.*")])


def test_names_are_there_once() -> None:
    message = (
        "The phases of a fit should have different names, which the history tells them apart "
        "by, found `one` 2 times."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        resolve_phases(staged(2), [phase(), Phase(name="two", epochs=1), phase()])


@pytest.mark.parametrize("phases", [[], "gradual", Phase(name="one", epochs=1), [{"epochs": 1}]])
def test_no_list_of_phases(phases: Any) -> None:
    message = f"`phases` should be a list of at least one Phase, found {phases!r}."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        resolve_phases(staged(2), phases)


# Sharing out epochs


@pytest.mark.parametrize(
    ("own", "epochs", "expected"),
    [
        ((2, 3), 25, [10, 15]),
        ((1, 9), 10, [1, 9]),  # Their own sum gives their own epochs.
        ((2, 1, 1, 2), 6, [2, 1, 1, 2]),
        ((2, 1, 1, 2), 4, [1, 1, 1, 1]),
        ((1, 99), 10, [1, 9]),
        ((1, 1, 1), 5, [2, 2, 1]),
        ((1,), 7, [7]),
    ],
)
def test_epochs_are_shared_out(own: tuple[int, ...], epochs: int, expected: list[int]) -> None:
    phases = [Phase(name=str(n), epochs=each, warmup=0.5) for n, each in enumerate(own)]
    found = spread_epochs(phases, epochs)
    assert [each.epochs for each in found] == expected
    assert all(each.warmup == 0.5 for each in found)


def test_fewer_epochs_than_phases() -> None:
    phases = [Phase(name=name, epochs=1) for name in ("head", "all")]
    message = "`epochs` should be at least 2, one for each phase (head, all), found 1."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        spread_epochs(phases, 1)
