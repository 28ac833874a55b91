from __future__ import annotations

import csv
import importlib
import io
import json
import re
import sys
import threading
import types
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tqdm import TqdmWarning, tqdm
from tqdm import __version__ as tqdm_version

from transferkit.errors import MissingDependencyError, OutputError
from transferkit.training import (
    Callback,
    CSVLog,
    EpochLog,
    EpochRecord,
    History,
    JSONLog,
    Phase,
    ProgressBar,
    TensorBoardLog,
    Trainer,
)
from transferkit.training.logs import _bar_class

Make = Callable[..., Trainer]
NAN = float("nan")


def record(epoch: int, val_loss: float = 1.0, val_accuracy: float = 0.5) -> EpochRecord:
    return EpochRecord(epoch, 1.0, 0.5, val_loss, val_accuracy, 0.1, 1.0)


class Resumed:
    """What a callback sees of a fit that goes on after some epochs."""

    def __init__(self, *records: EpochRecord) -> None:
        self.metrics: dict[str, Any] = {}
        self.history = History(list(records))
        self.lrs = {"head": 0.1}
        self.steps_per_epoch = 10


# Printed lines


def test_log_says_what_the_lesson_says(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    history = make(callbacks=[EpochLog()]).fit(2)
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


def test_verbose_off_is_silent(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make().fit(1)
    assert capsys.readouterr() == ("", "")


def test_log_after_nothing_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    trainer: Any = None
    EpochLog().on_fit_end(trainer, History())
    assert capsys.readouterr().out == ""


def test_log_says_where_a_fit_goes_on(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make()
    trainer.fit(1)
    EpochLog().on_fit_start(trainer, 3)
    assert capsys.readouterr().out.splitlines()[1:] == ["Going on after epoch 1"]


# The bar


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


Show = Callable[[], Screen]


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Show:
    """Make standard error a terminal; pytest puts its own in place after the fixtures."""

    def replace() -> Screen:
        stream = Screen()
        monkeypatch.setattr("sys.stderr", stream)
        return stream

    return replace


def test_bar_shows_steps_rate_and_time_left_on_a_terminal(make: Make, show: Show) -> None:
    screen = show()
    trainer: Any = make(batch_size=4)
    bar = ProgressBar()
    bar.on_fit_start(trainer, 3)
    bar.on_epoch_start(trainer, 2)
    for step in (1, 2):
        bar._bar.last_print_t -= 1  # type: ignore[union-attr]
        bar.on_step_end(trainer, step)
    last = screen.getvalue().split("\r")[-1]
    assert re.fullmatch(
        r"epoch 2/3:  50%\|.+\| 2/4 \[\d\d:\d\d<\d\d:\d\d, .+(step/s|s/step)]", last
    )
    bar.on_epoch_end(trainer, record(2))
    assert not screen.getvalue().split("\r")[-1].strip()


def test_bar_counts_the_steps_of_a_phase_on_cached_features(make: Make, show: Show) -> None:
    show()
    seen: list[tuple[int, int]] = []

    class Look(Callback):
        def on_step_end(self, trainer: Trainer, step: int) -> None:
            seen.append((bar._bar.n, bar._bar.total))  # type: ignore[union-attr]

    bar = ProgressBar()
    trainer = make(freeze="backbone", callbacks=[bar, Look()], batch_size=4)
    history = trainer.fit(1)
    assert history.settings["features"]["probe"]["cached"]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_bar_of_an_epoch_that_goes_on_in_its_middle(show: Show) -> None:
    show()
    trainer: Any = Resumed()
    bar = ProgressBar()
    bar.on_epoch_start(trainer, 1)
    bar.on_step_end(trainer, 8)
    assert bar._bar is not None
    assert (bar._bar.n, bar._bar.initial) == (8, 7)
    bar.on_fit_end(trainer, History())
    assert bar._bar is None


def test_bar_leaves_no_thread(make: Make, show: Show) -> None:
    screen = show()
    before = set(threading.enumerate())
    make(callbacks=[ProgressBar()]).fit(1)
    assert "epoch 1/1" in screen.getvalue()
    assert set(threading.enumerate()) <= before  # Others' may end meanwhile.


@pytest.mark.parametrize("stream", [io.StringIO(), None])
def test_bar_writes_nothing_into_a_plain_log(
    stream: Any, make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr", stream)
    make(callbacks=[ProgressBar()]).fit(1)
    assert stream is None or stream.getvalue() == ""
    assert capsys.readouterr().out == ""


def test_bar_is_text_in_a_notebook_without_widgets(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OutStream(io.StringIO):
        """What a notebook has for standard error: no terminal."""

    stream = OutStream()
    kernel: Any = types.ModuleType("ipykernel.iostream")
    kernel.OutStream = OutStream
    monkeypatch.setitem(sys.modules, "ipykernel.iostream", kernel)
    monkeypatch.setattr("sys.stderr", stream)
    make(callbacks=[ProgressBar()]).fit(1)
    assert "epoch 1/1:   0%|" in stream.getvalue()


def test_bar_does_not_warn_that_widgets_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    shell, python = types.ModuleType("ipykernel.zmqshell"), types.ModuleType("IPython")
    python.get_ipython = lambda: None  # type: ignore[attr-defined]
    modules: dict[str, Any] = {"ipykernel.zmqshell": shell, "IPython": python, "ipywidgets": None}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def forget_tqdm() -> None:  # It looks where it is, and warns, when it is imported.
        for name in ("tqdm.auto", "tqdm.autonotebook", "tqdm.notebook"):
            sys.modules.pop(name, None)

    forget_tqdm()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", TqdmWarning)
            importlib.import_module("tqdm.auto")
        # Old versions of tqdm look for widgets where a notebook is, and are silent here.
        expected = [] if tqdm_version.startswith("4.66.") else ["IProgress not found."]
        assert [str(each.message)[:20] for each in caught] == expected
        forget_tqdm()
        assert issubclass(_bar_class(), tqdm)  # A warning would be an error here.
    finally:
        forget_tqdm()


# Files


def test_csv_has_a_row_for_each_epoch(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    history = make(callbacks=[CSVLog(path)]).fit(2)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val_loss"]) for row in rows] == history.column("val_loss")
    assert list(rows[0]) == ["epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy",
                             "lr", "seconds", "phase"]  # fmt: skip


def test_json_has_a_line_for_each_epoch(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    history = make(callbacks=[JSONLog(path)]).fit(2)
    lines = path.read_text().splitlines()
    assert [EpochRecord(**json.loads(line)) for line in lines] == history.records


def test_values_that_are_not_finite_are_null_in_json(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = JSONLog(path)
    trainer: Any = Resumed(record(1, val_loss=NAN))
    log.on_fit_start(trainer, 2)
    log.on_epoch_end(trainer, record(2, val_loss=float("inf")))
    assert [json.loads(line)["val_loss"] for line in path.read_text().splitlines()] == [None, None]


@pytest.mark.parametrize("kind", [CSVLog, JSONLog])
def test_a_resumed_fit_neither_loses_nor_doubles_lines(kind: Any, tmp_path: Path) -> None:
    whole, parts = kind(tmp_path / "whole"), kind(tmp_path / "parts")
    records = [record(epoch) for epoch in (1, 2, 3)]
    trainer: Any = Resumed()
    for log in (whole, parts):
        log.on_fit_start(trainer, 3)
        for each in records:
            log.on_epoch_end(trainer, each)
    with parts.path.open("a") as file:
        file.write("4,0.")  # The machine stopped while it wrote.
    resumed: Any = Resumed(*records[:2])
    again = kind(parts.path)
    again.on_fit_start(resumed, 3)
    again.on_epoch_end(resumed, records[2])
    assert parts.path.read_bytes() == whole.path.read_bytes()
    again.on_fit_start(trainer, 3)
    assert len(parts.path.read_text().splitlines()) == (1 if kind is CSVLog else 0)


@pytest.mark.parametrize("kind", [CSVLog, JSONLog])
def test_a_file_in_a_missing_folder(kind: Any, tmp_path: Path) -> None:
    target = tmp_path / "none" / "log"
    message = (
        f"Cannot write `{target}`: the folder `{target.parent}` does not exist. Create it first."
    )
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        kind(target)


@pytest.mark.parametrize("kind", [CSVLog, JSONLog])
def test_a_file_whose_folder_disappears(kind: Any, tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    log = kind(folder / "log")
    folder.rmdir()
    trainer: Any = Resumed()
    message = f"Cannot write `{log.path}`: the folder `{folder}` does not exist. Create it first."
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        log.on_fit_start(trainer, 1)
    message = f"Cannot write `{log.path}`: No such file or directory."
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        log.on_epoch_end(trainer, record(1))


# TensorBoard


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return the points that TensorBoard shows: for each tag the values by epoch."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder)).Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        found[tag] = {each.step: each.value for each in points}
        assert len(found[tag]) == len(points)
    return found


def test_tensorboard_shows_losses_accuracies_and_rates(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    threads = set(threading.enumerate())
    folder = tmp_path / "runs" / "first"
    trainer = make(callbacks=[TensorBoardLog(folder)], scheduler="none")
    phases = [Phase("head", 1, freeze="backbone"), Phase("all", 2, unfreeze="all", lr=0.02)]
    history = trainer.fit(phases=phases)
    found = scalars(folder)
    for tag in ("loss/train", "loss/val", "accuracy/train", "accuracy/val"):
        column = history.column("_".join(reversed(tag.split("/"))))
        assert found.pop(tag) == pytest.approx(dict(enumerate(column, start=1)))
    assert found.pop("lr/head") == pytest.approx({1: 0.01, 2: 0.02, 3: 0.02})
    assert "lr/layer1" in found
    assert {tuple(points) for points in found.values()} == {(2, 3)}
    assert set(threading.enumerate()) <= threads  # Others' may end meanwhile.


def test_tensorboard_has_no_rate_where_a_solver_trains(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    make(freeze="backbone", solver="lbfgs", callbacks=[TensorBoardLog(tmp_path)]).fit(1)
    assert set(scalars(tmp_path)) == {"loss/train", "loss/val", "accuracy/train", "accuracy/val"}


def test_a_resumed_fit_neither_loses_nor_doubles_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    for records, epochs, loss in (([], (1, 2, 3), 1.0), ([record(1), record(2)], (3, 4), 2.0)):
        # TensorBoard reads the files by their names, which begin with the second.
        monkeypatch.setattr("time.time", partial(float, 1e9 + len(records)))
        log = TensorBoardLog(tmp_path)
        trainer: Any = Resumed(*records)
        log.on_fit_start(trainer, 4)
        for epoch in epochs:
            log.on_epoch_end(trainer, record(epoch, val_loss=loss))
        # The first fit is not ended: what it wrote is on the disk all the same.
        assert scalars(tmp_path)["loss/val"][epochs[-1]] == loss
        if records:
            log.on_fit_end(trainer, trainer.history)
    assert scalars(tmp_path)["loss/val"] == {1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0}


def test_tensorboard_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = (
        "`TensorBoardLog` needs `tensorboard`, which is not installed: "
        'pip install "transferkit[tensorboard]"'
    )
    with pytest.raises(MissingDependencyError, match=f"^{re.escape(message)}$"):
        TensorBoardLog(tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_tensorboard_into_a_file(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    file = tmp_path / "file"
    file.touch()
    message = (
        f"Cannot write into the folder `{file}`: file exists. Choose a folder that exists or can "
        f"be created and that you may write to."
    )
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        TensorBoardLog(file)
