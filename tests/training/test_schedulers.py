from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR, ReduceLROnPlateau, StepLR

from transferkit.errors import ConfigError, UnknownNameError
from transferkit.testing import check_scheduler
from transferkit.training import Schedule, list_schedulers, register_scheduler
from transferkit.training.schedulers import _SCHEDULERS, make_schedule


def sgd(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)


def rates(name: str, num_epochs: int, steps_per_epoch: int, **options: Any) -> list[float]:
    factory = _SCHEDULERS.get(name)
    return check_scheduler(
        lambda optimizer, **sizes: factory(optimizer, **sizes, **options),
        num_epochs=num_epochs,
        steps_per_epoch=steps_per_epoch,
    )


def test_names() -> None:
    built_in = {"cosine", "multistep", "none", "one_cycle", "plateau", "step", "warmup_cosine"}
    assert built_in <= set(list_schedulers())


@pytest.mark.parametrize("name", sorted(_SCHEDULERS.names()))
def test_every_scheduler_keeps_the_contract(name: str) -> None:
    assert len(check_scheduler(_SCHEDULERS.get(name), num_epochs=5, steps_per_epoch=3)) == 15


def test_none_keeps_the_rate() -> None:
    assert rates("none", 3, 2) == [1.0] * 6


def test_step_is_the_lessons() -> None:
    expected = [0.1 ** (epoch // 7) for epoch in range(25)]
    assert rates("step", 25, 1) == pytest.approx(expected)


def test_multistep_defaults_and_milestones() -> None:
    assert rates("multistep", 10, 1) == pytest.approx([1.0] * 6 + [0.1] * 2 + [0.01] * 2)
    assert rates("multistep", 4, 1, milestones=(1, 3)) == pytest.approx([1.0, 0.1, 0.1, 0.01])


def test_cosine_follows_the_formula_by_the_step() -> None:
    expected = [0.5 * (1 + math.cos(math.pi * step / 12)) for step in range(12)]
    assert rates("cosine", 3, 4) == pytest.approx(expected)


def test_warmup_cosine_rises_then_falls() -> None:
    found = rates("warmup_cosine", 10, 2, warmup=0.2)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[4:] == sorted(found[4:], reverse=True)
    assert found[-1] < 0.02


def test_warmup_of_the_whole_fit_is_refused() -> None:
    message = "`warmup` should be a finite number in [0, 1), a share of all steps, found 1.0."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        rates("warmup_cosine", 2, 2, warmup=1.0)


def test_one_cycle_equals_pytorchs() -> None:
    optimizer = sgd()
    scheduler = OneCycleLR(optimizer, max_lr=1.0, total_steps=12, pct_start=0.3)
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates("one_cycle", 3, 4) == pytest.approx(expected)


def test_plateau_gets_its_metric() -> None:
    optimizer = sgd()
    schedule = make_schedule(
        "plateau", optimizer, num_epochs=9, steps_per_epoch=1, options={"patience": 1}
    )
    assert schedule.monitor == "val_loss"
    seen: list[str] = []

    def metrics(key: str) -> float:
        seen.append(key)
        return 1.0

    for _ in range(3):
        schedule.step("epoch", metrics)
    assert seen == ["val_loss"] * 3
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def constantly(value: float) -> Callable[[str], float]:
    return lambda key: value


def test_plateau_on_accuracy_waits_for_it_to_rise() -> None:
    optimizer = sgd()
    schedule = make_schedule(
        "plateau",
        optimizer,
        num_epochs=9,
        steps_per_epoch=1,
        options={"patience": 1, "monitor": "val_accuracy"},
    )
    for value in (0.5, 0.6, 0.7, 0.8):
        schedule.step("epoch", constantly(value))
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_registered_by_decorator_or_call() -> None:
    try:

        @register_scheduler("decorated")
        def decorated(
            optimizer: torch.optim.Optimizer, *, num_epochs: int, steps_per_epoch: int
        ) -> Schedule:
            return Schedule(ExponentialLR(optimizer, 0.5))

        register_scheduler("called", decorated)
        assert {"decorated", "called"} <= set(list_schedulers())
        message = (
            "A scheduler `called` is registered already. "
            "Choose another name or pass `replace=True`."
        )
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            register_scheduler("called", decorated)
    finally:
        for name in ("decorated", "called"):
            _SCHEDULERS.remove(name)


def make(
    scheduler: Any, optimizer: torch.optim.Optimizer | None = None, **options: Any
) -> Schedule:
    return make_schedule(
        scheduler, optimizer or sgd(), num_epochs=2, steps_per_epoch=2, options=options
    )


def test_unknown_name_suggests() -> None:
    count = len(list_schedulers())
    message = (
        f"Unknown scheduler `cosin`. Did you mean `cosine`? `list_schedulers()` names all {count}."
    )
    with pytest.raises(UnknownNameError, match=f"^{re.escape(message)}$"):
        make("cosin")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("step", {"step_size": 0}, "`step_size` should be an integer of at least 1, found 0."),
        ("step", {"gamma": "a"}, "`gamma` should be a finite number between 0 and 1, found 'a'."),
        (
            "multistep",
            {"milestones": (1.5,)},
            "`milestones` should be an integer of at least 0, found 1.5.",
        ),
        (
            "one_cycle",
            {"warmup": 1.0},
            "`warmup` should be a finite number in [0, 1), a share of all steps, found 1.0.",
        ),
        ("plateau", {"factor": 2}, "`factor` should be a finite number between 0 and 1, found 2."),
        ("plateau", {"patience": -1}, "`patience` should be an integer of at least 0, found -1."),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(name, **options)


def test_unknown_option() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^The scheduler 'step' cannot be built with the options \{'gama': 1\}: "
        r"it got an unexpected keyword argument 'gama'.*\.$",
    ):
        make("step", gama=1)


def test_scheduler_of_another_optimizer() -> None:
    message = (
        "The scheduler belongs to another optimizer than the one that trains. Pass both as "
        "objects, or pass the scheduler by name or factory."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(StepLR(sgd(), 1))


def test_bare_scheduler_is_stepped_by_the_epoch() -> None:
    optimizer = sgd()
    assert make(StepLR(optimizer, 1), optimizer).interval == "epoch"


def test_factory_that_returns_something_else() -> None:
    message = "A scheduler should be a Schedule or a PyTorch scheduler, found int."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(lambda optimizer, **sizes: 3)


def test_schedule_checks_its_interval() -> None:
    message = '`interval` should be "step" or "epoch", found \'batch\'.'
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        Schedule(None, interval="batch")  # type: ignore[arg-type]


def test_plateau_needs_a_monitor() -> None:
    message = (
        "A `monitor` belongs to ReduceLROnPlateau, which needs one, and to no other "
        "scheduler: found ReduceLROnPlateau with None."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        Schedule(ReduceLROnPlateau(sgd()))


def test_plateau_steps_by_the_epoch() -> None:
    message = 'A scheduler with a monitor steps by the epoch: pass interval="epoch".'
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        Schedule(ReduceLROnPlateau(sgd()), interval="step", monitor="val_loss")


def test_contract_check_finds_a_negative_rate() -> None:
    message = "The scheduler gives the learning rate -1.0; expected at least 0."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_scheduler(
            lambda optimizer, **sizes: torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda epoch: -1.0
            )
        )
