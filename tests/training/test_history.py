from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transferkit.errors import ConfigError, DataError, OutputError
from transferkit.training import EpochRecord, History
from transferkit.training.history import rank

shares = st.floats(0, 1)
losses = st.floats(0, 1e6)
records = st.builds(
    EpochRecord,
    epoch=st.integers(1, 1000),
    train_loss=losses,
    train_accuracy=shares,
    val_loss=losses,
    val_accuracy=shares,
    lr=shares,
    seconds=losses,
)


def record(epoch: int, val_accuracy: float, val_loss: float = 1.0) -> EpochRecord:
    return EpochRecord(epoch, 1.0, 0.5, val_loss, val_accuracy, 0.1, 1.0)


@given(st.lists(records, max_size=5))
def test_json_round_trip(items: list[EpochRecord]) -> None:
    history = History(items, settings={"seed": 3}, seconds=2.0, status="stopped")
    assert History.from_json(history.to_json()) == history


def test_json_is_strict_and_keeps_nan_as_null() -> None:
    history = History([record(1, 0.5, float("nan")), record(2, 0.5, float("inf"))])
    text = history.to_json()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["records"][0]["val_loss"] is None
    assert math.isnan(History.from_json(text)[0].val_loss)


def test_best_is_highest_accuracy_then_lowest_loss_then_first() -> None:
    history = History(
        [record(1, 0.8), record(2, 0.9, 0.5), record(3, 0.9, 0.4), record(4, 0.9, 0.4)]
    )
    assert history.best.epoch == 3


def test_a_broken_epoch_is_never_the_best_of_several() -> None:
    assert History([record(1, 0.9, float("nan")), record(2, 0.1)]).best.epoch == 2


def test_of_epochs_that_are_all_broken_the_first_of_the_best_counts() -> None:
    nan = float("nan")
    assert History([record(1, 0.5, nan), record(2, 0.5, nan)]).best.epoch == 1
    assert rank(record(2, 0.5, nan)) >= rank(record(1, 0.5, nan))


def test_best_without_records_is_an_error() -> None:
    message = "The history has no record: no epoch was completed."
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        _ = History().best


def test_sequence_protocol_and_columns() -> None:
    history = History([record(1, 0.1), record(2, 0.2)])
    assert len(history) == 2
    assert [each.epoch for each in history] == [1, 2]
    assert history.column("val_accuracy") == [0.1, 0.2]


def test_unknown_column() -> None:
    message = (
        "Unknown record key `acc`. Epoch records have: epoch, train_loss, train_accuracy, "
        "val_loss, val_accuracy, lr, seconds."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        History().column("acc")


def test_save(tmp_path: Path) -> None:
    history = History([record(1, 0.1)])
    path = history.save(tmp_path / "history.json")
    assert History.from_json(path.read_text()) == history


def test_save_into_a_missing_folder(tmp_path: Path) -> None:
    target = tmp_path / "none" / "history.json"
    message = (
        f"Cannot write `{target}`: the folder `{target.parent}` does not exist. Create it first."
    )
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        History().save(target)


def test_text_that_is_no_json() -> None:
    message = "This is no history: the text is no JSON (Expecting value: line 1 column 1 (char 0))."
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        History.from_json("hello")


@pytest.mark.parametrize("text", ["[]", "{}", '{"records": [1]}', '{"records": [], "x": 1}'])
def test_json_that_is_no_history(text: str) -> None:
    with pytest.raises(DataError, match=r"^This is no history \(.+\)\.$"):
        History.from_json(text)
