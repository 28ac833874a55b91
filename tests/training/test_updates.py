from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR, ReduceLROnPlateau, StepLR

from transferkit.errors import ConfigError, UnknownNameError
from transferkit.models import BackboneSpec, Classifier, build_model
from transferkit.training.history import EpochRecord
from transferkit.training.phases import Phase, resolve_phases
from transferkit.training.recipes import Recipe
from transferkit.training.schedulers import Schedule
from transferkit.training.updates import Updates

RECIPE = Recipe(
    name="test",
    optimizer="sgd",
    lr=0.1,
    backbone_lr_factor=0.5,
    stage_lr_factor=0.25,
    momentum=0.9,
    weight_decay=0.01,
    scheduler="none",
    batch_size=4,
    epochs=1,
)
HEAD = Phase(name="head", epochs=2, freeze="backbone")
ALL = Phase(name="all", epochs=2, unfreeze="all", lr=0.05, warmup=0.5)
STEPS = 4


@pytest.fixture
def model(tiny_spec: BackboneSpec) -> Classifier:
    return build_model(tiny_spec, 2, weights=None)


def make(model: Classifier, recipe: Recipe = RECIPE, **given: Any) -> Updates:
    settings = {"optimizer": recipe.optimizer, "scheduler": recipe.scheduler} | given
    return Updates(model, recipe, **settings)


def record(epoch: int = 1, *, val_accuracy: float = 0.5) -> EpochRecord:
    return EpochRecord(
        epoch=epoch,
        train_loss=1.0,
        train_accuracy=0.5,
        val_loss=1.0,
        val_accuracy=val_accuracy,
        lr=0.0,
        seconds=0.0,
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4) % 2


def run(
    model: Classifier,
    updates: Updates,
    *phases: Phase,
    watch: Callable[[], None] = lambda: None,
    train: bool = True,
) -> None:
    """Go through phases as a fit does; `watch` is called before each step."""
    steps = 0
    for phase in resolve_phases(model, phases):
        model.freeze(phase.freeze_plan).train()
        updates.start_phase(phase.phase, steps_per_epoch=STEPS)
        for epoch in phase.epochs:
            for _ in range(STEPS):
                watch()
                if train:
                    images, targets = batch(steps)
                    loss = nn.functional.cross_entropy(model(images), targets)
                    updates.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                updates.step()
                steps += 1
            updates.end_epoch(record(epoch))


def rates_of(model: Classifier, updates: Updates, *phases: Phase) -> list[dict[str, float]]:
    """Return the rates before each step, checked to be those that the optimizer steps with."""
    told: list[dict[str, float]] = []
    used: list[dict[str, float]] = []

    def watch() -> None:
        optimizer = updates.optimizer
        assert optimizer is not None
        assert updates.lr == next(iter(updates.lrs.values()))
        if not told:
            optimizer.register_step_pre_hook(
                lambda optimizer, *_: used.append(
                    {str(group["name"]): float(group["lr"]) for group in optimizer.param_groups}
                )
            )
        told.append(updates.lrs)

    run(model, updates, *phases, watch=watch, train=False)
    assert told == used
    return told


# Against plain PyTorch


def plain_fit(model: Classifier, make_optimizer: Callable[..., Optimizer]) -> None:
    """Train the head, then everything, as a loop of one's own does."""
    parts = dict(model.named_parameters())
    head, layer1, conv1 = (
        [value for name, value in parts.items() if name.startswith(prefixes)]
        for prefixes in (("head.",), ("backbone.layer1.",), ("backbone.conv1.", "backbone.bn1."))
    )
    optimizer = make_optimizer([{"params": head, "lr": 0.1}])
    for parameter in (*layer1, *conv1):
        parameter.requires_grad_(False)
    for step in range(4 * STEPS):
        epoch, is_second = step // STEPS, step >= 2 * STEPS
        if step == 2 * STEPS:
            for parameter in (*layer1, *conv1):
                parameter.requires_grad_(True)
            optimizer.add_param_group({"params": layer1})
            optimizer.add_param_group({"params": conv1})
        base = 0.05 if is_second else 0.1
        rate = base * (0.5 if epoch % 2 else 1.0)  # StepLR halves it after the first epoch.
        for group, factor in zip(optimizer.param_groups, (1, 0.5, 0.5 * 0.25), strict=False):
            group["lr"] = rate * factor
            if is_second and step - 2 * STEPS < 4:
                group["lr"] *= (step - 2 * STEPS + 1) / 5
        model.train()
        model.backbone.train(is_second)
        images, targets = batch(step)
        optimizer.zero_grad()
        features = model.backbone(images)
        nn.functional.cross_entropy(model.head(features), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("sgd", lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.9, weight_decay=0.01)),
        ("adamw", lambda groups: torch.optim.AdamW(groups, weight_decay=0.01)),
    ],
)
def test_two_phases_equal_a_plain_loop_to_the_bit(name: str, plain: Any, model: Classifier) -> None:
    other = copy.deepcopy(model)
    torch.manual_seed(3)  # The backbone has dropout.
    plain_fit(other, plain)
    recipe = replace(
        RECIPE, optimizer=name, scheduler="step", scheduler_options={"step_size": 1, "gamma": 0.5}
    )
    torch.manual_seed(3)
    run(model, make(model, recipe), HEAD, ALL)
    expected = other.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


# Rates, warm-up and schedules


def test_each_phase_has_its_own_rates(model: Classifier) -> None:
    third = Phase(name="third", epochs=1, backbone_lr_factor=1.0, stage_lr_factor=0.5)
    told = rates_of(model, make(model), HEAD, replace(ALL, warmup=0.0), third)
    assert told[0] == {"head": 0.1}
    assert told[2 * STEPS] == {"head": 0.05, "layer1": 0.05 * 0.5, "conv1": 0.05 * 0.5 * 0.25}
    assert told[-1] == {"head": 0.1, "layer1": 0.1, "conv1": 0.05}  # The recipe's lr again.


@pytest.mark.parametrize(
    ("warmup", "epochs", "num_steps"),
    [(0.0, 2, 0), (0.01, 2, 1), (0.5, 2, 4), (0.1, 5, 2), (0.25, 1, 1), (0.99, 1, 3)],
)
def test_the_warm_up_takes_its_share_of_the_steps(
    warmup: float, epochs: int, num_steps: int, model: Classifier
) -> None:
    told = rates_of(model, make(model), Phase(name="one", epochs=epochs, warmup=warmup))
    expected = [0.1 * ((step + 1) / (num_steps + 1)) for step in range(num_steps)]
    found = [each["head"] for each in told]
    assert found == expected + [0.1] * (epochs * STEPS - num_steps)


def test_a_phase_of_one_step_has_the_full_rate(model: Classifier) -> None:
    updates = make(model)
    updates.start_phase(Phase(name="one", epochs=1, warmup=0.9), steps_per_epoch=1)
    assert updates.lr == 0.1


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("none", {}),
        ("step", {"step_size": 1, "gamma": 0.3}),
        ("multistep", {"milestones": [1, 2], "gamma": 0.3}),
        ("cosine", {}),
        ("warmup_cosine", {"warmup": 0.25}),
        ("one_cycle", {"warmup": 0.25}),
        ("plateau", {"patience": 0, "factor": 0.3}),
    ],
)
def test_schedules_do_not_see_the_warm_up(
    scheduler: str, options: dict[str, Any], model: Classifier
) -> None:
    phase = Phase(name="one", epochs=3, scheduler=scheduler, scheduler_options=options)
    bare = rates_of(model, make(model), phase)
    warm = rates_of(model, make(model), replace(phase, warmup=0.75))
    num_steps = 9
    for step, (with_it, without) in enumerate(zip(warm, bare, strict=True)):
        factor = (step + 1) / (num_steps + 1) if step < num_steps else 1.0
        assert with_it == {name: rate * factor for name, rate in without.items()}
    if scheduler == "plateau":  # The loss stands still.
        assert bare[-1]["head"] == pytest.approx(0.1 * 0.3)


def test_the_cosine_of_each_phase_follows_its_formula(model: Classifier) -> None:
    recipe = replace(RECIPE, scheduler="cosine")
    told = rates_of(model, make(model, recipe), HEAD, ALL)
    total = 2 * STEPS
    for step, rates in enumerate(told):
        is_second, place = divmod(step, total)
        cosine = 0.5 * (1 + math.cos(math.pi * place / total))
        factor = min(1.0, (place + 1) / 5) if is_second else 1.0
        bases = {"head": 0.05, "layer1": 0.025, "conv1": 0.00625} if is_second else {"head": 0.1}
        expected = {name: base * cosine * factor for name, base in bases.items()}
        assert rates == pytest.approx(expected)


@pytest.mark.parametrize("scheduler", ["step", "cosine", "warmup_cosine", "one_cycle", "plateau"])
def test_the_schedule_of_a_later_phase_is_that_of_a_first_one(
    scheduler: str, model: Classifier
) -> None:
    recipe = replace(RECIPE, scheduler=scheduler)
    later = rates_of(model, make(model, recipe), HEAD, ALL)[2 * STEPS :]
    model.freeze("backbone")
    assert later == rates_of(model, make(model, recipe), ALL)


def test_a_phase_takes_the_recipes_options_only_for_the_recipes_scheduler(
    model: Classifier,
) -> None:
    recipe = replace(RECIPE, scheduler="step", scheduler_options={"step_size": 1, "gamma": 0.5})
    own = Phase(name="own", epochs=2, scheduler="step")
    told = rates_of(model, make(model, recipe), HEAD, own)
    assert [each["head"] for each in told[::STEPS]] == [0.1, 0.05, 0.1, 0.1]


def test_a_factory_makes_a_schedule_for_each_phase(model: Classifier) -> None:
    sizes: list[tuple[int, int, int]] = []

    def factory(optimizer: Optimizer, *, num_epochs: int, steps_per_epoch: int) -> Schedule:
        sizes.append((len(optimizer.param_groups), num_epochs, steps_per_epoch))
        return Schedule(ExponentialLR(optimizer, 0.5), interval="step")

    recipe = replace(RECIPE, scheduler_options={"ignored": 1})
    told = rates_of(model, make(model, recipe, scheduler=factory), HEAD, replace(ALL, epochs=1))
    assert sizes == [(1, 2, STEPS), (3, 1, STEPS)]
    assert [each["head"] for each in told[2 * STEPS :]] == pytest.approx(
        [0.05 / 3, 0.025 * 2 / 3, 0.0125, 0.00625]
    )


# Optimizers that are given


def test_a_factory_is_called_once_with_what_trains_first(model: Classifier) -> None:
    calls: list[list[nn.Parameter]] = []

    def factory(params: Any) -> Optimizer:
        calls.append(list(params))
        return torch.optim.RMSprop(calls[-1], lr=0.01, momentum=0.5)

    updates = make(model, optimizer=factory)
    run(model, updates, HEAD, replace(ALL, lr=None))
    assert updates.optimizer is not None
    assert [[id(each) for each in call] for call in calls] == [
        [id(each) for each in model.head.parameters()]
    ]
    groups = updates.optimizer.param_groups
    assert [group.get("name") for group in groups] == [None, "layer1", "conv1"]
    assert [(group["lr"], group["momentum"]) for group in groups] == [(0.01, 0.5)] * 3
    assert list(updates.lrs) == ["0", "layer1", "conv1"]


def test_an_object_goes_on_through_the_phases(model: Classifier) -> None:
    given = torch.optim.Adam(model.head.parameters(), lr=0.01)
    updates = make(model, optimizer=given)
    run(model, updates, HEAD, replace(ALL, lr=None))
    assert updates.optimizer is given
    moments = {given.state[each]["step"].item() for each in model.head.parameters()}
    assert moments == {4 * STEPS}
    assert {given.state[each]["step"].item() for each in model.backbone.parameters()} == {2 * STEPS}


def test_an_object_holds_what_trains_in_the_first_phase(model: Classifier) -> None:
    given = torch.optim.Adam(model.head.parameters(), lr=0.01)
    run(model, make(model, optimizer=given), HEAD, replace(ALL, lr=None))
    message = (
        "The optimizer should hold the model's 2 trainable parameters; it lacks 0 of them and "
        "holds 8 others (frozen, or of another model). Build it from "
        "`model.trainable_parameters()`, after freezing."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        run(model, make(model, optimizer=given), HEAD, replace(ALL, lr=None))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, partial(torch.optim.AdamW, eps=1e-3)])
@pytest.mark.parametrize("scheduler", ["cosine", "step", "one_cycle", "warmup_cosine"])
def test_rates_may_be_tensors(kind: Any, fused: bool, scheduler: str, model: Classifier) -> None:
    other = copy.deepcopy(model)
    recipe = replace(RECIPE, scheduler=scheduler)
    rate = torch.tensor(0.01)
    for each, lr in ((model, rate), (other, 0.01)):
        torch.manual_seed(1)
        given = kind(each.head.parameters(), lr=lr, fused=fused)
        updates = make(each, recipe, optimizer=given)
        run(each, updates, HEAD, replace(ALL, lr=None))
        updates.finish()
        assert [float(group["lr"]) for group in given.param_groups] == pytest.approx([0.01] * 3)
    assert updates.options["lr"] == 0.01
    expected = other.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_the_tensor_of_a_rate_is_kept(model: Classifier) -> None:
    rate = torch.tensor(0.5)
    given = torch.optim.SGD(model.parameters(), lr=rate)
    updates = make(model, replace(RECIPE, scheduler="cosine"), optimizer=given)
    run(model, updates, Phase(name="one", epochs=1, warmup=0.5), train=False)
    assert given.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.0)
    updates.finish()
    assert given.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5


# Schedules that are given as objects


def test_a_schedule_that_is_an_object_goes_on_from_phase_to_phase(model: Classifier) -> None:
    given = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = StepLR(given, step_size=1, gamma=0.5)
    phases = [Phase(name=name, epochs=2) for name in ("one", "two")]
    found: list[float] = []
    updates = make(model, optimizer=given, scheduler=scheduler)
    updates.check(resolve_phases(model, phases), steps_per_epoch=STEPS)
    run(model, updates, *phases, watch=lambda: found.append(updates.lr), train=False)
    assert found[::STEPS] == [1.0, 0.5, 0.25, 0.125]
    updates.finish()  # It goes on in the next fit, too.
    assert given.param_groups[0]["lr"] == 0.0625


def test_a_schedule_object_cannot_follow_what_trains(model: Classifier) -> None:
    given = torch.optim.SGD(model.head.parameters(), lr=1.0)
    updates = make(model, optimizer=given, scheduler=StepLR(given, 1))
    message = (
        "A scheduler that is given as an object knows only the parameter groups that its "
        "optimizer had when it was built, and what trains differs between the phases. Pass it "
        "by name or as a factory, which makes a new one for each phase."
    )
    phases = resolve_phases(model, [HEAD, replace(ALL, lr=None)])
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        updates.check(phases, steps_per_epoch=STEPS)


def test_a_schedule_object_and_a_name_contradict_each_other(model: Classifier) -> None:
    given = torch.optim.SGD(model.parameters(), lr=1.0)
    updates = make(model, optimizer=given, scheduler=Schedule(StepLR(given, 1)))
    message = (
        "The phase `one` names the scheduler `cosine`, and the fit has one that is given as an "
        "object. Leave one of them out."
    )
    phases = resolve_phases(model, [Phase(name="one", epochs=1, scheduler="cosine")])
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        updates.check(phases, steps_per_epoch=STEPS)


# At the door


@pytest.mark.parametrize("as_factory", [False, True])
def test_rates_for_an_optimizer_that_has_its_own(as_factory: bool, model: Classifier) -> None:
    given: Any = lambda params: torch.optim.SGD(params, lr=1.0)  # noqa: E731
    updates = make(model, optimizer=given if as_factory else given(model.parameters()))
    phase = Phase(name="one", epochs=1, lr=0.1, stage_lr_factor=0.5)
    message = (
        "The phase `one` sets `lr`, `stage_lr_factor`, which cannot be set for an optimizer "
        "that is given as an object or a factory: it has its own. Leave them out, or name the "
        "optimizer."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        updates.check(resolve_phases(model, [phase]), steps_per_epoch=STEPS)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        updates.start_phase(phase, steps_per_epoch=STEPS)


def test_names_of_schedulers_are_checked_without_touching_the_users_optimizer(
    model: Classifier,
) -> None:
    given = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [dict(group) for group in given.param_groups]
    updates = make(model, optimizer=given, scheduler="one_cycle")
    good = Phase(name="good", epochs=1)
    bad = Phase(name="bad", epochs=1, scheduler="cosin")
    with pytest.raises(UnknownNameError, match=r"^Unknown scheduler `cosin`\. Did you mean"):
        updates.check(resolve_phases(model, [good, bad]), steps_per_epoch=STEPS)
    updates.check(resolve_phases(model, [good]), steps_per_epoch=STEPS)
    assert [dict(group) for group in given.param_groups] == before


@pytest.mark.parametrize("ask", ["lr", "lrs", "options"])
def test_before_the_first_phase_there_is_no_optimizer(ask: str, model: Classifier) -> None:
    message = "No phase has been started: there is no optimizer yet."
    updates = make(model)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        getattr(updates, ask)
    updates.finish()  # A fit may end before its first phase.


# After a fit


@pytest.mark.parametrize("scheduler", ["cosine", "step", "one_cycle", "plateau", "none"])
def test_the_rates_of_an_object_are_put_back(scheduler: str, model: Classifier) -> None:
    given = torch.optim.SGD(
        [{"params": model.head.parameters(), "lr": 0.3}], lr=0.7, momentum=0.9, nesterov=True
    )
    updates = make(model, replace(RECIPE, scheduler=scheduler), optimizer=given)
    run(model, updates, HEAD, replace(ALL, lr=None))
    updates.finish()
    assert [group["lr"] for group in given.param_groups] == [0.3, 0.7, 0.7]
    assert {group["momentum"] for group in given.param_groups} == {0.9}


def test_a_momentum_that_goes_in_circles_is_put_back(model: Classifier) -> None:
    def factory(optimizer: Optimizer, *, num_epochs: int, steps_per_epoch: int) -> Schedule:
        total = num_epochs * steps_per_epoch
        return Schedule(OneCycleLR(optimizer, max_lr=1.0, total_steps=total), interval="step")

    given = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.7)
    updates = make(model, optimizer=given, scheduler=factory)
    run(model, updates, Phase(name="one", epochs=1), train=False)
    assert given.param_groups[0]["momentum"] != 0.7
    updates.finish()
    assert (given.param_groups[0]["lr"], given.param_groups[0]["momentum"]) == (0.3, 0.7)


def test_a_step_that_fails_leaves_the_rate_of_the_schedule(model: Classifier) -> None:
    updates = make(model)
    updates.start_phase(Phase(name="one", epochs=1, warmup=0.9), steps_per_epoch=STEPS)
    assert updates.optimizer is not None

    def fail(*_: Any) -> None:
        raise RuntimeError("stopped")

    updates.optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match=r"^stopped$"):
        updates.step()
    assert [group["lr"] for group in updates.optimizer.param_groups] == [0.1, 0.05, 0.0125]


def test_a_plateau_object_is_given_what_it_watches(model: Classifier) -> None:
    given = torch.optim.SGD(model.parameters(), lr=1.0)
    plateau = Schedule(
        ReduceLROnPlateau(given, mode="max", patience=0, factor=0.5), monitor="val_accuracy"
    )
    updates = make(model, optimizer=given, scheduler=plateau)
    updates.start_phase(Phase(name="one", epochs=3, warmup=0.5), steps_per_epoch=1)
    found = []
    for accuracy in (0.5, 0.6, 0.6):
        updates.step()
        updates.end_epoch(record(val_accuracy=accuracy))
        found.append(given.param_groups[0]["lr"])
    assert found == [1.0, 1.0, 0.5]
