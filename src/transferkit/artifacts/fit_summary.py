"""What the history in an artifact says of the fit, read without trust in its form.

Artifacts know no `History`, which belongs to the room above, and a file may hold anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_Z95 = 1.959964
"""The quantile of the normal distribution for an interval of 95 %."""


@dataclass(frozen=True)
class FitSummary:
    """The fit in a few numbers; None stands for what the history does not say.

    Args:
        num_epochs: How many epochs were completed.
        best_epoch: The number of the best one, from 1.
        val_accuracy: Its share of validation pictures predicted right, in [0, 1].
        val_loss: Its mean loss over them.
        num_train: The number of training pictures.
        num_val: The number of validation pictures.
        recipe: The name of the recipe.
        seed: The seed.
        seconds: The duration of the fit.
        status: How it ended, such as "completed".
    """

    num_epochs: int
    best_epoch: int
    val_accuracy: float
    val_loss: float | None
    num_train: int | None
    num_val: int | None
    recipe: str | None
    seed: int | None
    seconds: float | None
    status: str | None

    @property
    def accuracy_interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the accuracy, from the number of pictures alone."""
        if not self.num_val:
            return None
        return wilson_interval(self.val_accuracy, self.num_val)


def summarize_fit(history: Mapping[str, Any] | None) -> FitSummary | None:
    """Summarize a history as plain data.

    Args:
        history: What the artifact holds.

    Returns:
        The summary; None where there is no history, or no epoch of it can be understood.

    Example:
        >>> record = {"epoch": 1, "val_accuracy": 0.9, "val_loss": 0.3}
        >>> fit = summarize_fit({"records": [record], "settings": {"num_val": 40}})
        >>> fit.best_epoch, [round(end, 3) for end in fit.accuracy_interval]
        (1, [0.769, 0.96])
    """
    records = history.get("records") if history is not None else None
    if history is None or not isinstance(records, list):
        return None
    known = [each for each in records if isinstance(each, Mapping) and _is_record(each)]
    if not known:
        return None
    best = min(known, key=_rank)
    found = history.get("settings")
    settings: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    recipe, status = settings.get("name", settings.get("recipe")), history.get("status")
    return FitSummary(
        num_epochs=len(known),
        best_epoch=best["epoch"],
        val_accuracy=float(best["val_accuracy"]),
        val_loss=_number(best.get("val_loss")),
        num_train=_count(settings.get("num_train")),
        num_val=_count(settings.get("num_val")),
        recipe=recipe if isinstance(recipe, str) else None,
        seed=_count(settings.get("seed")),
        seconds=_number(history.get("seconds")),
        status=status if isinstance(status, str) else None,
    )


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share that was counted.

    Args:
        share: The share, in [0, 1].
        count: Of how many, at least 1.

    Returns:
        Both ends, in [0, 1].

    Example:
        >>> [round(end, 3) for end in wilson_interval(1.0, 100)]
        [0.963, 1.0]

    References:
        Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927,
        https://doi.org/10.1080/01621459.1927.10502953
    """
    square = _Z95**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = (
        _Z95
        / (1 + square / count)
        * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    )
    return max(0.0, middle - half), min(1.0, middle + half)


def _is_record(record: Mapping[str, Any]) -> bool:
    accuracy = _number(record.get("val_accuracy"))
    return accuracy is not None and 0 <= accuracy <= 1 and _count(record.get("epoch")) is not None


def _rank(record: Mapping[str, Any]) -> tuple[bool, float, float]:
    """Return the key by which the trainer compares epochs, too: see `History.best`."""
    loss = _number(record.get("val_loss"))
    accuracy = -float(record["val_accuracy"])
    return (True, accuracy, math.inf) if loss is None else (False, accuracy, loss)


def _number(value: object) -> float | None:
    """Return a number of JSON as a float; JSON has integers that no float holds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
        return None
    return float(value)


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 2**63 else None
