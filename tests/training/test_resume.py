"""A fit that goes on from a checkpoint gives what it would have given."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transferkit.errors import CheckpointError, ConfigError
from transferkit.models import HeadSpec
from transferkit.training import (
    EMA,
    SWA,
    Callback,
    Checkpoints,
    EarlyStopping,
    EpochRecord,
    FeatureCache,
    Phase,
    Trainer,
    fitting,
    list_optimizers,
    list_schedulers,
)
from transferkit.training.averaging import refresh_batch_norm
from transferkit.training.checkpoints import list_checkpoints
from transferkit.training.solving import solve_head

Make = Callable[..., Trainer]

HEAD_THEN_ALL = [Phase("head", 2, freeze="backbone"), Phase("all", 2, unfreeze="all", lr=0.01)]


class Trace(Callback):
    """Note each update and each epoch; be killed after so many updates."""

    def __init__(self, killed_after: int | None = None) -> None:
        self.killed_after = killed_after
        self.lrs: list[float] = []
        self.records: list[EpochRecord] = []

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        if len(self.lrs) == self.killed_after:
            raise _Killed
        self.lrs.append(float(step))

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        self.records.append(record)


class _Killed(BaseException):
    """In the place of a power cut: nothing catches it, nothing is saved for it."""


def outcome(trainer: Trainer) -> tuple[dict[str, Tensor], list[dict[str, Any]], str]:
    """Return weights, records without their durations, and how the fit ended."""
    records = [
        {key: value for key, value in vars(record).items() if key != "seconds"}
        for record in trainer.history.records
    ]
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return state, records, trainer.history.status


def assert_same(found: Any, expected: Any) -> None:
    assert found[1] == expected[1]
    assert found[2] == expected[2]
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        assert torch.equal(found[0][name], value), name


def check_every_step(
    make: Make,
    folder: Path,
    *,
    fit: dict[str, Any],
    resumed: dict[str, Any] | None = None,
    make_more: Callable[[], dict[str, Any]] = dict,
    first: int = 0,
    every: int = 1,
    **options: Any,
) -> None:
    """Kill a fit after its updates from a first on; what goes on has to end as if it had not.

    Epochs have 4 updates: every fifth is one of each place in an epoch.
    """
    torch.manual_seed(0)
    whole = Trace()
    trainer = make(callbacks=[whole], **options, **make_more())
    initial = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.fit(**fit)
    expected = outcome(trainer)
    for killed_after in range(first, len(whole.lrs), every):
        shutil.rmtree(folder, ignore_errors=True)
        checkpoints = Checkpoints(folder=folder, every_steps=1)
        killed = make(
            callbacks=[Trace(killed_after)], checkpoints=checkpoints, **options, **make_more()
        )
        killed.model.load_state_dict(initial)
        with pytest.raises(_Killed):
            killed.fit(**fit)
        second = make(
            callbacks=[Trace()], checkpoints=checkpoints, **{**options, **(resumed or {})},
            **make_more(),
        )  # fmt: skip
        second.model.load_state_dict(initial)
        second.fit(**fit, resume="auto")
        assert_same(outcome(second), expected)


@pytest.mark.parametrize("optimizer", list_optimizers())
def test_at_every_step_across_an_unfreeze(make: Make, tmp_path: Path, optimizer: str) -> None:
    check_every_step(
        make,
        tmp_path / "fit",
        fit={"phases": HEAD_THEN_ALL},
        optimizer=optimizer,
        every=1 if optimizer == "adamw" else 4,
    )


@pytest.mark.parametrize("scheduler", list_schedulers())
def test_every_scheduler(make: Make, tmp_path: Path, scheduler: str) -> None:
    check_every_step(
        make, tmp_path / "fit", fit={"phases": HEAD_THEN_ALL}, scheduler=scheduler, every=5
    )


REGULARIZED: dict[str, dict[str, Any]] = {
    "dropout": {"head": {"dropout": 0.5}},
    "label smoothing and L2-SP": {"label_smoothing": 0.1, "l2_sp": 0.01},
    "WiSE-FT": {"wise_ft": True},
    "mixup": {"batch_augmentation": "mixup"},
    "class weights": {"balance": "weights"},
    "balanced sampling": {"balance": "sampler"},
    "clipping": {"clip_norm": 0.1},
    "accumulation": {"accumulate": 2},
    "channels first": {"channels_last": False},
}


@pytest.mark.parametrize("name", REGULARIZED)
def test_every_regularizer(make: Make, tmp_path: Path, name: str) -> None:
    options = dict(REGULARIZED[name])
    if "head" in options:
        options["head"] = HeadSpec(**options["head"])
    check_every_step(make, tmp_path / "fit", fit={"phases": HEAD_THEN_ALL}, every=5, **options)


def test_moving_statistics_of_a_frozen_part(make: Make, tmp_path: Path) -> None:
    check_every_step(
        make, tmp_path / "fit", fit={"epochs": 3}, freeze="backbone", bn="adapt", every=3
    )


@pytest.mark.parametrize("average", [EMA(decay=0.9), SWA(start=0.0)], ids=["EMA", "SWA"])
def test_every_average(make: Make, tmp_path: Path, average: EMA | SWA) -> None:
    check_every_step(
        make, tmp_path / "fit", fit={"phases": HEAD_THEN_ALL}, average=average, every=5
    )


@pytest.mark.parametrize("views", [0, 2, "epochs"])
def test_cached_features(make: Make, tmp_path: Path, views: Any) -> None:
    cache = FeatureCache(views=views)
    check_every_step(
        make, tmp_path / "fit", fit={"epochs": 3}, freeze="backbone", cache=cache, every=2
    )


def test_early_stopping(make: Make, tmp_path: Path) -> None:
    torch.manual_seed(0)

    def trainer(*callbacks: Callback, **options: Any) -> Trainer:
        stopping = EarlyStopping(monitor="val_accuracy", patience=2)
        return make(callbacks=[stopping, *callbacks], lr=1e-9, **options)

    whole = trainer()
    initial = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.fit(9)
    expected = outcome(whole)
    assert len(whole.history) == 3
    for killed_after in range(9):
        folder = tmp_path / f"{killed_after}"
        checkpoints = Checkpoints(folder=folder, every_steps=1)
        first = trainer(Trace(killed_after), checkpoints=checkpoints)
        first.model.load_state_dict(initial)
        with pytest.raises(_Killed):
            first.fit(9)
        second = trainer(checkpoints=checkpoints)
        second.model.load_state_dict(initial)
        second.fit(9, resume="auto")
        assert_same(outcome(second), expected)


# Processes that are spawned import PyTorch anew: they go on once, in the middle of an epoch.
@pytest.mark.parametrize(
    ("worker_type", "first", "every"), [("thread", 0, 3), ("fork", 0, 3), ("spawn", 2, 99)]
)
def test_other_workers(
    make: Make, tmp_path: Path, worker_type: str, first: int, every: int
) -> None:
    check_every_step(
        make,
        tmp_path / "fit",
        fit={"epochs": 2},
        resumed={"num_workers": 2, "worker_type": worker_type},
        num_workers=0,
        first=first,
        every=every,
    )


class Growing(nn.Module):
    """A criterion that remembers: the more batches it has seen, the more they count."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.count += 1
        return self.count * nn.functional.cross_entropy(logits, targets)


def test_a_criterion_that_remembers(make: Make, tmp_path: Path) -> None:
    check_every_step(
        make,
        tmp_path / "fit",
        fit={"epochs": 2},
        make_more=lambda: {"criterion": Growing()},
        every=3,
    )


def test_an_optimizer_and_a_scheduler_as_objects(make: Make, tmp_path: Path) -> None:
    torch.manual_seed(0)

    def trainer(**options: Any) -> Trainer:
        built = make(**options)
        optimizer = torch.optim.AdamW(built.model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return Trainer(
            built.model, built.data, optimizer=optimizer, scheduler=scheduler,
            verbose=False, device="cpu", batch_size=4, **options,
        )  # fmt: skip

    whole = trainer()
    initial = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.fit(3)
    for killed_after in (0, 1, 4, 6):
        checkpoints = Checkpoints(folder=tmp_path / f"{killed_after}", every_steps=1)
        first = trainer(checkpoints=checkpoints, callbacks=[Trace(killed_after)])
        first.model.load_state_dict(initial)
        with pytest.raises(_Killed):
            first.fit(3)
        second = trainer(checkpoints=checkpoints)
        second.model.load_state_dict(initial)
        second.fit(3, resume="auto")
        assert_same(outcome(second), outcome(whole))


def test_phases_of_the_same_trainer_begin_where_they_did(make: Make, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
            trainer.should_stop = record.epoch == 3 and len(stops) < 1
            if trainer.should_stop:
                stops.append(record)

    stops: list[EpochRecord] = []
    whole = make().fit(phases=HEAD_THEN_ALL)
    trainer = make(checkpoints=tmp_path / "fit", callbacks=[Stop()])
    assert trainer.fit(phases=HEAD_THEN_ALL).status == "stopped"
    history = trainer.fit(phases=HEAD_THEN_ALL, resume="auto")
    assert history.status == "completed"
    assert history.column("train_loss") == whole.column("train_loss")


def test_a_solved_phase_that_was_cut_off_is_solved_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"solver": "lbfgs", "checkpoints": tmp_path / "fit"}
    phases = [Phase("all", 1), Phase("head", 1, freeze="backbone")]
    whole = make(solver="lbfgs").fit(phases=phases)
    solve = solve_head

    def interrupted(*arguments: Any, **named: Any) -> Any:
        found = solve(*arguments, **named)
        os.kill(os.getpid(), signal.SIGINT)  # Seen in the evaluation that follows.
        return found

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "solve_head", interrupted)
        first = make(**options)
        assert first.fit(phases=phases).status == "interrupted"
    second = make(**options)
    history = second.fit(phases=phases, resume=True)
    assert history.column("val_loss") == whole.column("val_loss")
    assert len(history.settings["solver_reports"]) == 1
    assert second.evaluate().loss == pytest.approx(history.best.val_loss)


def test_an_average_takes_an_epoch_once_whatever_interrupts_it(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "average": SWA(start=0.0), "freeze": "until:conv1", "cache": FeatureCache(views="epochs"),
    }  # fmt: skip
    whole = make(**options).fit(3)
    refresh = refresh_batch_norm
    signals = [signal.SIGINT]

    def interrupted(*arguments: Any, **named: Any) -> None:
        if signals:
            os.kill(os.getpid(), signals.pop())
        refresh(*arguments, **named)

    monkeypatch.setattr(fitting, "refresh_batch_norm", interrupted)
    assert make(checkpoints=tmp_path / "fit", **options).fit(3).status == "interrupted"
    history = make(checkpoints=tmp_path / "fit", **options).fit(3, resume=True)
    assert history.column("val_loss") == whole.column("val_loss")


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.5)),
        (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))),
    ],
)
def test_another_criterion_is_found_by_its_options(
    make: Make, tmp_path: Path, before: nn.Module, now: nn.Module
) -> None:
    make(criterion=before, checkpoints=tmp_path / "fit").fit(1)
    with pytest.raises(CheckpointError, match="`criterion_digest` was"):
        make(criterion=now, checkpoints=tmp_path / "fit").fit(1, resume=True)


def test_other_options_of_an_optimizer_are_found(make: Make, tmp_path: Path) -> None:
    def factory(beta: float) -> Any:
        return lambda parameters: torch.optim.AdamW(parameters, betas=(beta, 0.999))

    make(optimizer=factory(0.9), checkpoints=tmp_path / "fit").fit(1)
    with pytest.raises(CheckpointError, match="`optimizer_options` was"):
        make(optimizer=factory(0.5), checkpoints=tmp_path / "fit").fit(1, resume=True)


def test_a_path_elsewhere_does_not_replace_what_a_folder_holds(make: Make, tmp_path: Path) -> None:
    make(checkpoints=tmp_path / "one").fit(2)
    make(checkpoints=tmp_path / "other", seed=5).fit(2)
    path = list_checkpoints(tmp_path / "one")[0]
    with pytest.raises(ConfigError, match="holds 2 checkpoints of a fit already"):
        make(checkpoints=tmp_path / "other").fit(2, resume=path)


def test_a_batch_that_is_left_out_leaves_no_trace_in_batch_norm(make: Make) -> None:
    left = [1]

    def spoil(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return (images * float("nan") if left and left.pop() else images), targets

    trainer = make(nan_policy=1, batch_augmentation=spoil)
    history = trainer.fit(1)
    assert len(history.settings["nonfinite"]) == 1
    assert all(torch.isfinite(each).all() for each in trainer.model.buffers())
    assert history[0].val_loss == history[0].val_loss  # Not NaN.
