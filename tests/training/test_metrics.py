"""Metrics of the user's own, beside loss and accuracy."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from transferkit.errors import ConfigError
from transferkit.training import CSVLog, EarlyStopping, History, JSONLog, Trainer

Make = Callable[..., Trainer]


class Hits:
    """The number of pictures whose class was predicted."""

    def __init__(self) -> None:
        self.count = 0

    def reset(self) -> None:
        self.count = 0

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.count += int((preds.argmax(dim=1) == target).sum())

    def compute(self) -> int:
        return self.count


def test_metrics_stand_in_records_and_files(make: Make, tmp_path: Path) -> None:
    logs = [CSVLog(tmp_path / "log.csv"), JSONLog(tmp_path / "log.jsonl")]
    trainer = make(metrics={"hits": Hits()}, callbacks=logs)
    history = trainer.fit(2)
    expected = [each.val_accuracy * len(trainer.data.val) for each in history]
    assert history.column("hits") == pytest.approx(expected)
    with (tmp_path / "log.csv").open(newline="") as file:
        assert [float(row["hits"]) for row in csv.DictReader(file)] == history.column("hits")
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["metrics"] for line in lines] == [each.metrics for each in history]
    assert History.from_json(history.to_json()) == history
    evaluation = trainer.evaluate()
    assert evaluation.metrics["hits"] == pytest.approx(evaluation.accuracy * 8)
    assert evaluation.to_dict()["metrics"] == evaluation.metrics


class Falling:
    """A metric that is less with each evaluation."""

    def __init__(self) -> None:
        self.value = 10.0

    def reset(self) -> None:
        self.value -= 1

    def update(self, preds: Tensor, target: Tensor) -> None:
        pass

    def compute(self) -> float:
        return self.value


@pytest.mark.parametrize(("mode", "expected"), [("max", 3), ("min", 6)])
def test_early_stopping_on_a_metric(make: Make, mode: Any, expected: int) -> None:
    stopping = EarlyStopping(monitor="falling", mode=mode, patience=2)
    history = make(metrics={"falling": Falling()}, callbacks=[stopping]).fit(6)
    assert len(history) == expected


@pytest.mark.parametrize(("mode", "expected"), [("max", 0.02), ("min", 0.08)])
def test_a_plateau_of_a_metric(make: Make, mode: str, expected: float) -> None:
    options = {"monitor": "falling", "mode": mode, "patience": 0, "factor": 0.5}
    trainer = make(
        metrics={"falling": Falling()}, scheduler="plateau", scheduler_options=options, lr=0.08
    )
    trainer.fit(4)
    assert trainer.history.column("lr")[-1] == pytest.approx(expected)


MISSING = (
    "Unknown record key `f1`. Epoch records have: epoch, train_loss, train_accuracy, val_loss, "
    "val_accuracy, lr, seconds, hits."
)


def test_a_metric_that_the_fit_does_not_have(make: Make) -> None:
    stopping = EarlyStopping(monitor="f1", mode="max")
    with pytest.raises(ConfigError, match=f"^{re.escape(MISSING)}$"):
        make(metrics={"hits": Hits()}, callbacks=[stopping]).fit(1)
    options = {"monitor": "f1", "mode": "max"}
    with pytest.raises(ConfigError, match=f"^{re.escape(MISSING)}$"):
        make(metrics={"hits": Hits()}, scheduler="plateau", scheduler_options=options).fit(1)


def test_metrics_of_torchmetrics(make: Make) -> None:
    classification: Any = pytest.importorskip(
        "torchmetrics.classification", reason="torchmetrics is not installed"
    )
    accuracy = classification.MulticlassAccuracy(num_classes=2, average="micro")
    trainer = make(metrics={"accuracy": accuracy, "f1": classification.MulticlassF1Score(2)})
    for record in trainer.fit(2):
        assert record.metrics["accuracy"] == pytest.approx(record.val_accuracy)
        assert 0 <= record.metrics["f1"] <= 1


def test_metrics_go_through_a_checkpoint(make: Make, tmp_path: Path) -> None:
    make(metrics={"hits": Hits()}, checkpoints=tmp_path / "fit").fit(2)
    history = make(metrics={"hits": Hits()}, checkpoints=tmp_path / "fit").fit(2, resume=True)
    assert [each.metrics.keys() for each in history] == [{"hits"}, {"hits"}]


def test_a_metric_that_is_not_finite_is_null_in_json(make: Make) -> None:
    class Undefined(Hits):
        def compute(self) -> Any:
            return torch.tensor(float("nan"))

    history = make(metrics={"f1": Undefined()}).fit(1)
    assert json.loads(history.to_json())["records"][0]["metrics"] == {"f1": None}


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ([Hits()], "`metrics` should be a mapping from names to metrics, found list."),
        (
            {"val_loss": Hits()},
            "The name of a metric should be a text that records do not have yet, found 'val_loss'.",
        ),
        (
            {"f1": max},
            "The metric `f1` should have reset, update, compute, as those of torchmetrics do, "
            "found builtin_function_or_method.",
        ),
    ],
)
def test_what_is_no_metric(make: Make, metrics: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(metrics=metrics)
