from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from transferkit.data import ImageSplits
from transferkit.errors import ConfigError, OutputError
from transferkit.models import BackboneSpec, build_model
from transferkit.training import (
    Callback,
    CSVLog,
    EarlyStopping,
    EpochLog,
    EpochRecord,
    History,
    Phase,
    ProgressBar,
    Trainer,
)


def make(spec: BackboneSpec, data: ImageSplits, *callbacks: Callback, **options: Any) -> Trainer:
    model = build_model(spec, 2, weights=None)
    defaults: dict[str, Any] = {"verbose": False, "device": "cpu", "callbacks": callbacks}
    return Trainer(model, data, **(defaults | options))


def record(epoch: int, val_loss: float = 1.0, val_accuracy: float = 0.5) -> EpochRecord:
    return EpochRecord(epoch, 1.0, 0.5, val_loss, val_accuracy, 0.1, 1.0)


@pytest.mark.parametrize(
    "make_callback",
    [Callback, ProgressBar, EpochLog, EarlyStopping, lambda: CSVLog("log.csv")],
)
def test_every_callback_serves_two_fits(
    make_callback: Any,
    tiny_spec: BackboneSpec,
    tiny_splits: ImageSplits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = make(tiny_spec, tiny_splits, make_callback())
    assert len(trainer.fit(2)) == 2
    assert len(trainer.fit(1)) == 1


def test_log_says_what_the_lesson_says(
    tiny_spec: BackboneSpec, tiny_splits: ImageSplits, capsys: pytest.CaptureFixture[str]
) -> None:
    history = make(tiny_spec, tiny_splits, EpochLog()).fit(2)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"Training 1,474 of 1,474 parameters of tiny on cpu \(.+\), recipe finetune, "
        r"lr 0\.01 \(backbone 0\.0003\), seed 0",
        lines[0],
    )
    first = history[0]
    assert lines[1] == (
        f"epoch 1/2  train loss {first.train_loss:.4f} accuracy {first.train_accuracy:.4f}  "
        f"val loss {first.val_loss:.4f} accuracy {first.val_accuracy:.4f}  {first.seconds:.1f} s"
    )
    assert re.fullmatch(
        rf"Completed after 0 min \d+ s\. Best val accuracy {history.best.val_accuracy:.4f} in "
        rf"epoch {history.best.epoch}; its weights are kept\.",
        lines[3],
    )


def test_progress_bar_shows_steps_on_a_terminal(
    tiny_spec: BackboneSpec,
    tiny_splits: ImageSplits,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    make(tiny_spec, tiny_splits, ProgressBar(), batch_size=4).fit(1)
    assert "epoch 1/1" in capsys.readouterr().err


def test_verbose_off_is_silent(
    tiny_spec: BackboneSpec, tiny_splits: ImageSplits, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tiny_spec, tiny_splits).fit(1)
    assert capsys.readouterr() == ("", "")


def waits(values: list[float], **options: Any) -> int:
    """Return the epoch after which early stopping ends a phase with these values."""
    stopping = EarlyStopping(**options)

    class Stub:
        should_stop_phase = False

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
    nan = float("nan")
    assert waits([1, nan, nan], patience=2) == 3
    assert waits([nan, 1, 0.5, 0.4], patience=2) == 0


def test_early_stopping_ends_a_real_fit(tiny_spec: BackboneSpec, tiny_splits: ImageSplits) -> None:
    stopping = EarlyStopping(patience=1, min_delta=100.0)
    history = make(tiny_spec, tiny_splits, stopping).fit(6)
    assert (len(history), history.status) == (2, "stopped")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "`patience` should be an integer of at least 1, found 0."),
        ({"min_delta": -1}, "`min_delta` should be a finite number of at least 0, found -1."),
        (
            {"monitor": "loss"},
            "Unknown record key `loss`. Epoch records have: epoch, train_loss, train_accuracy, "
            "val_loss, val_accuracy, lr, seconds.",
        ),
    ],
)
def test_early_stopping_checks_its_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        EarlyStopping(**options)


def test_csv_has_a_row_for_each_epoch(
    tiny_spec: BackboneSpec, tiny_splits: ImageSplits, tmp_path: Path
) -> None:
    path = tmp_path / "log.csv"
    history = make(tiny_spec, tiny_splits, CSVLog(path)).fit(2)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val_loss"]) for row in rows] == history.column("val_loss")
    assert list(rows[0]) == ["epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy",
                             "lr", "seconds", "phase"]  # fmt: skip


def test_csv_into_a_missing_folder(tmp_path: Path) -> None:
    target = tmp_path / "none" / "log.csv"
    message = (
        f"Cannot write `{target}`: the folder `{target.parent}` does not exist. Create it first."
    )
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        CSVLog(target)


def test_csv_whose_folder_disappears(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    log = CSVLog(folder / "log.csv")
    folder.rmdir()
    trainer: Any = None
    message = f"Cannot write `{log.path}`: No such file or directory."
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        log.on_fit_start(trainer, 1)


def test_log_after_nothing_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    trainer: Any = None
    EpochLog().on_fit_end(trainer, History())
    assert capsys.readouterr().out == ""
