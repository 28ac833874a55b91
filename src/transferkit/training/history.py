"""The history of a fit: plain records, one for each epoch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from transferkit._checks import check_choice, check_type
from transferkit._files import write_text
from transferkit.errors import ConfigError, DataError

Status: TypeAlias = Literal["running", "completed", "stopped", "interrupted", "failed"]


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch gave.

    Args:
        epoch: Its number, from 1.
        train_loss: Mean of the criterion over the training images as they were seen.
        train_accuracy: Share of them predicted right, in [0, 1], while the model changed.
        val_loss: Mean of the criterion over the validation images.
        val_accuracy: Share of them predicted right, in [0, 1].
        lr: Learning rate of the first parameter group, usually the head's, at the epoch's start.
        seconds: Duration of both passes.
        phase: The name of the phase that it belongs to.
        metrics: The trainer's own metrics over the validation images, by name.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    lr: float
    seconds: float
    phase: str = ""
    metrics: dict[str, float] = field(default_factory=dict)

    def get(self, key: str) -> float:
        """Return the value called `key`: "val_loss", "val_accuracy", a metric's name and so on.

        Raises:
            ConfigError: A record has no such value.
        """
        if key in self.metrics:
            return self.metrics[key]
        return float(getattr(self, check_record_key(key)))

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON data; values that are not finite are None."""
        data: dict[str, Any] = {
            name: _finite_or_none(getattr(self, name)) for name in RECORD_FIELDS
        }
        if self.metrics:
            data["metrics"] = {name: _finite_or_none(each) for name, each in self.metrics.items()}
        return data


RECORD_FIELDS = tuple(each.name for each in fields(EpochRecord) if each.name != "metrics")
"""What every record has, in its order."""


Mode: TypeAlias = Literal["auto", "min", "max"]
"""Whether a value should be small or large; "auto" knows it of losses and accuracies."""


def check_monitor(monitor: str, mode: Mode) -> Literal["min", "max"]:
    """Return whether what is monitored should be small or large.

    Args:
        monitor: The name of a record's value, or of a metric of the trainer's own.
        mode: What was asked for.

    Raises:
        ConfigError: `mode` is none of the three, or cannot be told of a metric.
    """
    check_type("monitor", monitor, str, "the name of a record's value or of a metric")
    check_choice("mode", mode, get_args(Mode))
    if mode != "auto":
        return mode
    if "accuracy" in monitor:
        return "max"
    if monitor in RECORD_FIELDS:
        return "min"
    raise ConfigError(
        f"`monitor` is `{monitor}`, and nothing tells whether it should be small or large. Pass "
        f'mode="max" where larger is better, mode="min" where smaller is. Without a metric of '
        f"that name, take one of: {', '.join(_record_keys())}."
    )


def _record_keys() -> list[str]:
    return [name for name in RECORD_FIELDS if name != "phase"]


def check_record_key(key: str, metrics: Collection[str] = ()) -> str:
    """Return `key` when records have a value of that name.

    Args:
        key: The name.
        metrics: The names of the trainer's own metrics, which records have, too.

    Raises:
        ConfigError: They have not.
    """
    keys = [*_record_keys(), *metrics]
    if key not in keys:
        raise ConfigError(f"Unknown record key `{key}`. Epoch records have: {', '.join(keys)}.")
    return key


@dataclass
class History:
    """The records of a fit, in order, and what else is worth knowing about it.

    Args:
        records: One record for each completed epoch.
        settings: What the fit was told, as plain data: recipe, seed, device and so on.
        seconds: Duration of the whole fit.
        status: How it ended: "completed", "stopped" by a callback, "interrupted" by Ctrl-C
            or "failed" with an error; "running" before its end.
        skipped: The pictures that were left out since they could not be read, each with
            "split", "path" and "reason".

    Example:
        >>> history = History([EpochRecord(1, 0.7, 0.5, 0.6, 0.8, 0.01, 2.0)])
        >>> history.best.val_accuracy, history.column("train_loss")
        (0.8, [0.7])
        >>> History.from_json(history.to_json()) == history
        True
    """

    records: list[EpochRecord] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    status: Status = "completed"
    skipped: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[EpochRecord]:
        return iter(self.records)

    def __getitem__(self, index: int) -> EpochRecord:
        return self.records[index]

    @property
    def best(self) -> EpochRecord:
        """The best epoch: highest validation accuracy, then lowest validation loss, then first.

        Raises:
            DataError: There is no record.
        """
        if not self.records:
            raise DataError("The history has no record: no epoch was completed.")
        return min(self.records, key=rank)

    def column(self, key: str) -> list[float]:
        """Return one value of all records, such as "val_accuracy".

        Raises:
            ConfigError: Records have no value of that name.
        """
        if not any(key in record.metrics for record in self.records):
            check_record_key(key)
        return [record.get(key) for record in self.records]

    def to_dict(self) -> dict[str, Any]:
        """Return the history as plain JSON data; values that are not finite are None."""
        return asdict(self) | {"records": [record.to_dict() for record in self.records]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> History:
        """Build a history from what `to_dict` returned; None stands for NaN.

        Raises:
            DataError: The data is not of that form.
        """
        try:
            rest = {key: value for key, value in data.items() if key != "records"}
            records = [EpochRecord(**_none_to_nan(record)) for record in data["records"]]
            return cls(records, **rest)
        except (AttributeError, KeyError, TypeError) as error:
            raise DataError(f"This is no history ({error}).") from error

    def to_json(self) -> str:
        """Return the history as JSON text; values that are not finite stand as null."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> History:
        """Build a history from what `to_json` returned; null stands for NaN.

        Raises:
            DataError: The text is no JSON, or no history.
        """
        try:
            data = json.loads(text)
        except (TypeError, ValueError) as error:
            raise DataError(f"This is no history: the text is no JSON ({error}).") from error
        return cls.from_dict(data)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the history as JSON to `path` and return the path.

        Raises:
            OutputError: The file cannot be written.
        """
        return write_text(path, self.to_json() + "\n")


def rank(record: EpochRecord) -> tuple[bool, float, float]:
    """Return the key by which epochs are compared; the smallest is the best.

    Small validation splits have few different accuracies, so that ties are common: the
    loss, which sees how sure the model is, breaks them. An epoch with a loss that is not
    a number ranks last.
    """
    if math.isnan(record.val_loss):
        return True, -record.val_accuracy, math.inf
    return False, -record.val_accuracy, record.val_loss


def _finite_or_none(value: float | str) -> float | str | None:
    return value if isinstance(value, str) or abs(value) < float("inf") else None


def _none_to_nan(record: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        key: float("nan") if value is None else value for key, value in record.items()
    }
    if "metrics" in found:
        found["metrics"] = _none_to_nan(found["metrics"])
    return found
