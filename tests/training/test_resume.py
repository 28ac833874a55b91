"""A fit that goes on from a checkpoint gives what it would have given."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

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
    list_optimizers,
    list_schedulers,
)

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
    every: int = 1,
    **options: Any,
) -> None:
    """Kill a fit after each of its updates; what goes on has to end as if it had not."""
    torch.manual_seed(0)
    whole = Trace()
    trainer = make(callbacks=[whole], **options, **make_more())
    initial = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.fit(**fit)
    expected = outcome(trainer)
    for killed_after in range(0, len(whole.lrs), every):
        shutil.rmtree(folder, ignore_errors=True)
        checkpoints = Checkpoints(folder=folder, every_steps=1)
        first = make(
            callbacks=[Trace(killed_after)], checkpoints=checkpoints, **options, **make_more()
        )
        first.model.load_state_dict(initial)
        with pytest.raises(_Killed):
            first.fit(**fit)
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
        make, tmp_path / "fit", fit={"phases": HEAD_THEN_ALL}, scheduler=scheduler, every=3
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
    check_every_step(make, tmp_path / "fit", fit={"phases": HEAD_THEN_ALL}, every=3, **options)


def test_moving_statistics_of_a_frozen_part(make: Make, tmp_path: Path) -> None:
    check_every_step(
        make, tmp_path / "fit", fit={"epochs": 3}, freeze="backbone", bn="adapt", every=3
    )


@pytest.mark.parametrize("average", [EMA(decay=0.9), SWA(start=0.0)], ids=["EMA", "SWA"])
def test_every_average(make: Make, tmp_path: Path, average: EMA | SWA) -> None:
    check_every_step(
        make, tmp_path / "fit", fit={"phases": HEAD_THEN_ALL}, average=average, every=2
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


@pytest.mark.parametrize(("worker_type", "every"), [("thread", 3), ("fork", 3), ("spawn", 7)])
def test_other_workers(make: Make, tmp_path: Path, worker_type: str, every: int) -> None:
    check_every_step(
        make,
        tmp_path / "fit",
        fit={"epochs": 2},
        resumed={"num_workers": 2, "worker_type": worker_type},
        num_workers=0,
        every=every,
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
