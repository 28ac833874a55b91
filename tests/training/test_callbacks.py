from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from transferkit.artifacts import load_artifact
from transferkit.errors import ConfigError, OutputError
from transferkit.training import (
    EMA,
    SWA,
    Callback,
    EarlyStopping,
    EpochRecord,
    History,
    Phase,
    SaveBest,
    TimeBudget,
    Trainer,
)
from transferkit.training.fitting import Fit

Make = Callable[..., Trainer]
NAN = float("nan")


def record(epoch: int, val_loss: float = 1.0, val_accuracy: float = 0.5) -> EpochRecord:
    return EpochRecord(epoch, 1.0, 0.5, val_loss, val_accuracy, 0.1, 1.0)


class Stub:
    """What these callbacks see of a trainer."""

    should_stop = should_stop_phase = False


# Early stopping


def waits(values: list[float], **options: Any) -> int:
    """Return the epoch after which early stopping ends a phase with these values."""
    stopping = EarlyStopping(**options)
    trainer: Any = Stub()
    stopping.on_phase_start(trainer, Phase("all", len(values)))
    key = stopping.monitor
    for epoch, value in enumerate(values, start=1):
        stopping.on_epoch_end(trainer, record(epoch, **{key: value}))
        if trainer.should_stop_phase:
            return epoch
    return 0


def test_early_stopping_on_loss_and_accuracy() -> None:
    assert waits([3, 2, 1, 1, 1], patience=2) == 5
    assert waits([3, 2, 1, 1, 0.5, 0.6], patience=2) == 0
    assert waits([0.5, 0.6, 0.6, 0.5], patience=2, monitor="val_accuracy") == 4
    assert waits([3, 2.95, 2.9], patience=2, min_delta=0.2) == 3


def test_early_stopping_counts_nan_as_no_improvement() -> None:
    assert waits([1, NAN, NAN], patience=2) == 3
    assert waits([NAN, 1, 0.5, 0.4], patience=2) == 0
    assert waits([float("inf"), float("inf")], patience=2) == 2


def test_early_stopping_ends_a_real_fit(make: Make) -> None:
    history = make(callbacks=[EarlyStopping(patience=1, min_delta=100.0)]).fit(6)
    assert (len(history), history.status) == (2, "stopped")


def test_early_stopping_goes_on_where_it_was() -> None:
    trainer: Any = Stub()
    before, after = EarlyStopping(patience=2), EarlyStopping(patience=2)
    before.on_phase_start(trainer, Phase("all", 4))
    for epoch, loss in enumerate([1.0, 2.0], start=1):
        before.on_epoch_end(trainer, record(epoch, val_loss=loss))
    after.on_phase_start(trainer, Phase("all", 4))
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert not trainer.should_stop_phase
    after.on_epoch_end(trainer, record(3, val_loss=1.5))
    assert trainer.should_stop_phase


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "`patience` should be an integer of at least 1, found 0."),
        ({"min_delta": -1}, "`min_delta` should be a finite number of at least 0, found -1."),
        (
            {"monitor": "f1"},
            "`monitor` is `f1`, and nothing tells whether it should be small or large. Pass "
            'mode="max" where larger is better, mode="min" where smaller is. Without a metric '
            "of that name, take one of: epoch, train_loss, train_accuracy, val_loss, "
            "val_accuracy, lr, seconds.",
        ),
        (
            {"monitor": 1},
            "`monitor` should be the name of a record's value or of a metric, found int.",
        ),
        ({"mode": "up"}, '`mode` should be "auto", "min" or "max", found \'up\'.'),
    ],
)
def test_early_stopping_checks_its_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        EarlyStopping(**options)


# The budget


class Clock:
    """A clock that stands still until it is put on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("transferkit.training.callbacks.time.perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def run_epochs(budget: TimeBudget, clock: Clock, durations: list[float], start: float = 0) -> int:
    """Return how many epochs of these seconds fit, after so many seconds before the first."""
    trainer: Any = Stub()
    budget.on_fit_start(trainer, len(durations))
    clock.now += start
    budget.on_phase_start(trainer, Phase("all", len(durations)))
    for epoch, seconds in enumerate(durations, start=1):
        clock.now += seconds
        budget.on_epoch_end(trainer, record(epoch))
        if trainer.should_stop:
            return epoch
    return 0


def test_budget_ends_before_the_epoch_that_would_not_fit(clock: Clock) -> None:
    budget = TimeBudget(seconds=10)
    assert run_epochs(budget, clock, [3, 3, 3, 3]) == 3
    assert run_epochs(budget, clock, [3, 3, 3]) == 3  # A second fit has a budget of its own.
    assert run_epochs(budget, clock, [5, 5]) == 2
    assert run_epochs(budget, clock, [2, 4, 1, 1]) == 3
    assert run_epochs(budget, clock, [20, 1]) == 1
    assert run_epochs(budget, clock, [1] * 4) == 0


def test_budget_counts_what_comes_before_the_epochs_but_not_as_an_epoch(clock: Clock) -> None:
    assert run_epochs(TimeBudget(seconds=10), clock, [1] * 6, start=5) == 5


def test_budget_is_that_of_one_run_of_a_fit_that_is_resumed(clock: Clock) -> None:
    trainer: Any = Stub()
    before, after = TimeBudget(seconds=10), TimeBudget(seconds=10)
    run_epochs(before, clock, [4, 4])
    state = json.loads(json.dumps(before.state_dict()))
    assert state == {"longest": 4.0}
    after.on_fit_start(trainer, 4)
    after.on_phase_start(trainer, Phase("all", 4))
    after.load_state_dict(state)
    clock.now += 5.5
    after.on_epoch_end(trainer, record(3))
    assert trainer.should_stop  # Another one of 5.5 seconds would not fit.
    assert after.state_dict() == {"longest": 5.5}


def test_a_fit_that_its_budget_ended_goes_on(make: Make, tmp_path: Path) -> None:
    whole = make().fit(3)
    for count in (1, 2):
        trainer = make(checkpoints=tmp_path / "fit", callbacks=[TimeBudget(seconds=1e-6)])
        history = trainer.fit(3, resume="auto")
        assert (len(history), history.status) == (count, "stopped")
    history = make(checkpoints=tmp_path / "fit").fit(3, resume="auto")
    assert history.status == "completed"
    assert history.column("train_loss") == whole.column("train_loss")


def test_budget_ends_a_real_fit(make: Make) -> None:
    history = make(callbacks=[TimeBudget(seconds=1e-6)]).fit(5)
    assert (len(history), history.status) == (1, "stopped")
    assert len(make(callbacks=[TimeBudget(hours=1)]).fit(2)) == 2


def test_budget_adds_its_parts_up() -> None:
    assert TimeBudget(seconds=1, minutes=2, hours=3).seconds == 10_921


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "A time budget should be above 0. Give it `seconds`, `minutes` or `hours`."),
        ({"hours": -1}, "`hours` should be a finite number of at least 0, found -1."),
        ({"minutes": "5"}, "`minutes` should be a finite number of at least 0, found '5'."),
    ],
)
def test_budget_checks_its_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        TimeBudget(**options)


# Saving the best


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


class Look(Callback):
    """Read the artifact after each epoch."""

    def __init__(self, path: Path, tiny_spec: Any) -> None:
        self.path, self.spec = path, tiny_spec
        self.weights: list[dict[str, torch.Tensor]] = []
        self.live: list[dict[str, torch.Tensor]] = []
        self.histories: list[History] = []

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        artifact = load_artifact(self.path, backbone=self.spec)
        self.weights.append(state(artifact.model))
        self.histories.append(History.from_dict(artifact.history or {}))
        self.live.append(state(trainer.model))


def script_accuracies(monkeypatch: pytest.MonkeyPatch, *accuracies: float) -> None:
    """Let the epochs have these validation accuracies."""
    inner = Fit._record

    def scripted(fit: Fit, epoch: int, *rest: Any, **named: Any) -> EpochRecord:
        found = inner(fit, epoch, *rest, **named)
        return EpochRecord(**(found.to_dict() | {"val_accuracy": accuracies[epoch - 1]}))

    monkeypatch.setattr(Fit, "_record", scripted)


def test_each_best_epoch_is_saved(
    make: Make, tiny_spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "best.safetensors"
    look = Look(path, tiny_spec)
    script_accuracies(monkeypatch, 0.5, 0.4, 0.9, 0.7)
    trainer = make(callbacks=[SaveBest(path), look], lr=0.05)
    trainer.fit(4)
    for epoch, best in enumerate((0, 0, 2, 2)):
        assert same(look.weights[epoch], look.live[best])
        assert look.histories[epoch].best.epoch == best + 1
        assert look.histories[epoch].status == "running"
    assert not same(look.weights[0], look.weights[2])
    artifact = load_artifact(path, backbone=tiny_spec)
    assert same(state(artifact.model), look.live[2])
    assert artifact.history == trainer.history.to_dict()
    assert trainer.history.status == "completed"


@pytest.mark.parametrize("average", [EMA(decay=0.9), SWA(start=0.0)])
def test_the_averaged_weights_are_saved(
    average: Any, make: Make, tiny_spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "best.safetensors"
    look = Look(path, tiny_spec)
    script_accuracies(monkeypatch, 0.5, 0.9, 0.7)
    trainer = make(callbacks=[SaveBest(path), look], lr=0.05, average=average, scheduler="none")
    trainer.fit(3)
    assert same(look.weights[1], state(trainer.model))
    assert not same(look.weights[1], look.live[1])


def test_a_solved_head_is_saved(make: Make, tiny_spec: Any, tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    look = Look(path, tiny_spec)
    trainer = make(freeze="backbone", solver="lbfgs", callbacks=[SaveBest(path), look])
    trainer.fit(1)
    assert same(look.weights[0], state(trainer.model))


def test_interpolated_weights_are_saved_at_the_end(
    make: Make, tiny_spec: Any, tmp_path: Path
) -> None:
    path = tmp_path / "best.safetensors"
    trainer = make(callbacks=[SaveBest(path)], wise_ft=True, lr=0.05)
    trainer.fit(2)
    assert same(state(load_artifact(path, backbone=tiny_spec).model), state(trainer.model))


def test_an_epoch_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    class Deaf:
        history = History([record(1, val_loss=NAN)])

        def save(self, path: Path) -> None:
            raise AssertionError(path)

    trainer: Any = Deaf()
    save = SaveBest(tmp_path / "best.safetensors")
    save.on_best(trainer, trainer.history[0])
    save.on_fit_end(trainer, trainer.history)
    save.on_fit_end(trainer, History())


def test_an_artifact_into_a_missing_folder(tmp_path: Path) -> None:
    target = tmp_path / "none" / "best.safetensors"
    message = (
        f"Cannot write `{target}`: the folder `{target.parent}` does not exist. Create it first."
    )
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        SaveBest(target)


# A callback that raises


class Raise(Callback):
    """Raise an error at each of some events, and note whether the fit's end came."""

    def __init__(self, **errors: BaseException) -> None:
        self.errors, self.ends = errors, 0

    def on_fit_start(self, trainer: Trainer, num_epochs: int) -> None:
        self.throw("on_fit_start")

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        self.throw("on_epoch_end")

    def on_fit_end(self, trainer: Trainer, history: History) -> None:
        self.ends += 1
        self.throw("on_fit_end")

    def throw(self, event: str) -> None:
        if event in self.errors:
            raise self.errors[event]


@pytest.mark.parametrize("event", ["on_fit_start", "on_epoch_end", "on_fit_end"])
def test_all_others_are_told_of_the_end(event: str, make: Make) -> None:
    callbacks = [Raise(), Raise(**{event: RuntimeError("boom")}), Raise()]
    trainer = make(callbacks=callbacks)
    with pytest.raises(RuntimeError, match=r"^boom$"):
        trainer.fit(2)
    assert [each.ends for each in callbacks] == [1, 1, 1]
    assert trainer.history.status == ("completed" if event == "on_fit_end" else "failed")


def test_the_fits_own_error_is_the_first(make: Make) -> None:
    last = Raise()
    broken = Raise(on_epoch_end=RuntimeError("boom"), on_fit_end=ValueError("more"))
    warning = "After another error `Raise.on_fit_end` failed, too: ValueError('more')."
    with (
        pytest.warns(RuntimeWarning, match=f"^{re.escape(warning)}$"),
        pytest.raises(RuntimeError, match=r"^boom$"),
    ):
        make(callbacks=[broken, last]).fit(2)
    assert last.ends == 1


def test_the_first_error_of_the_end_comes_through(make: Make) -> None:
    callbacks = [Raise(on_fit_end=RuntimeError("boom")), Raise(on_fit_end=ValueError("more"))]
    warning = "After another error `Raise.on_fit_end` failed, too: ValueError('more')."
    with (
        pytest.warns(RuntimeWarning, match=f"^{re.escape(warning)}$"),
        pytest.raises(RuntimeError, match=r"^boom$"),
    ):
        make(callbacks=callbacks).fit(1)


def test_an_error_of_the_end_after_ctrl_c_comes_through(make: Make) -> None:
    callbacks = [Raise(on_epoch_end=KeyboardInterrupt()), Raise(on_fit_end=ValueError("boom"))]
    trainer = make(callbacks=callbacks)
    with pytest.raises(ValueError, match=r"^boom$"):
        trainer.fit(1)
    assert trainer.history.status == "interrupted"
