"""What holds for every callback: that of `transferkit.testing.check_callback`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from transferkit import training
from transferkit.testing import check_callback
from transferkit.training import Callback
from transferkit.training.callbacks import EVENTS

MAKERS: dict[str, Callable[[Path], Callback]] = {
    "Callback": lambda folder: Callback(),
    "CSVLog": lambda folder: training.CSVLog(folder / "log.csv"),
    "EarlyStopping": lambda folder: training.EarlyStopping(patience=1, min_delta=0.5),
    "EpochLog": lambda folder: training.EpochLog(),
    "JSONLog": lambda folder: training.JSONLog(folder / "log.jsonl"),
    "ProgressBar": lambda folder: training.ProgressBar(),
    "SaveBest": lambda folder: training.SaveBest(folder / "best.safetensors"),
    "TensorBoardLog": lambda folder: training.TensorBoardLog(folder / "runs"),
    "TimeBudget": lambda folder: training.TimeBudget(hours=1),
}


@pytest.mark.parametrize("name", MAKERS)
def test_callback_keeps_the_contract(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "TensorBoardLog":
        pytest.importorskip("tensorboard")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)  # For the bar to be drawn.
    check_callback(MAKERS[name](tmp_path))


def test_no_callback_is_left_out() -> None:
    public = [getattr(training, name) for name in training.__all__]
    found = {each.__name__ for each in public if isinstance(each, type)}
    callbacks = {name for name in found if issubclass(getattr(training, name), Callback)}
    assert callbacks == set(MAKERS)


def test_the_events_are_the_methods_of_a_callback() -> None:
    assert tuple(name for name in vars(Callback) if name.startswith("on_")) == EVENTS


def test_the_page_has_every_event_and_every_callback() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "callbacks.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `on_")]
    assert tuple(row.split("`")[1].split("(")[0] for row in rows) == EVENTS
    assert [name for name in MAKERS if f"[`{name}`]" not in page] == []
