"""`LRFind`: the loss at rising learning rates, and the rate that it suggests."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

SweepEnd: TypeAlias = Literal["max_lr", "diverged", "not_finite"]

DIVERGED = 4.0
"""A sweep ends where the smoothed loss is so many times its lowest."""
FALL_SHARE = 0.8
"""What share of its fall the loss has made at the suggestion; `benchmarks/lr_find.py` shows what
fits make of it."""
MIN_ERRORS = 4.5
"""A fall is one from so many standard errors on: of 200 sweeps over noise, one has such a fall."""

_MEMORY = 0.9
"""What a smoothed value keeps of the one before it: about the last ten steps count."""
_ROUNDING = 1e-9
_MAX_UNSETTLED = 9
"""The first steps, a tenth of all up to so many, have a mean of few losses."""

_ENDS = {
    "max_lr": "all steps were taken",
    "diverged": f"the smoothed loss rose above {DIVERGED:g} times its lowest",
    "not_finite": "the loss was no finite number any more",
}


@dataclass(frozen=True, kw_only=True)
class LRFind:
    """What `trainer.lr_find()` found; `print` shows it, `plot_lr_find` draws it.

    The learning rates worth trying lie between the one from which on the loss falls and the one
    at which it stops falling (Smith). The suggestion lies in the later part of that range, where
    a fit of few epochs gets far, and before its edge: it is the first rate at which the smoothed
    loss has made 0.8 of its fall. Two other rules in use are the rate of the steepest slope, and
    a tenth of the rate of the lowest loss (Howard and Gugger). The slope between neighbouring
    steps is mostly noise; where the lowest loss lies is chance where it stays low for long.

    There is no suggestion where the loss does not fall by more than the noise of its batches
    explains: by 4.5 standard errors of the difference of two smoothed losses.

    Args:
        phase: The name of the phase that was swept.
        lrs: The learning rate of each step, which is that of the head.
        losses: The loss of each step's batch, before its update.
        smoothed_lrs: For each step the mean of its rate and those before, on the logarithmic
            scale, with weights that fall by a tenth from step to step and sum to 1.
        smoothed: The same mean of the losses. Set against `smoothed_lrs` it does not lag.
        suggestion: The rate to train with, or None.
        end: Why the sweep ended: at "max_lr"; or before, when the smoothed loss "diverged" to
            4 times its lowest, or the loss was "not_finite", which is left out.

    References:
        Smith, Cyclical Learning Rates for Training Neural Networks, 2017,
        https://arxiv.org/abs/1506.01186, section 3.3. Howard and Gugger, Deep Learning for
        Coders with fastai and PyTorch, 2020, chapter 5.

    Example:
        >>> lrs = [10 ** (step / 10 - 5) for step in range(55)]
        >>> losses = [1 / (1 + (100 * lr) ** 2) + lr**2 for lr in lrs]
        >>> print(make_lr_find("all", lrs, losses))
        all: 55 steps at learning rates from 1e-05 to 2.51
          loss        1 at first, lowest 0.223 when smoothed, at 0.0541
          end         all steps were taken
          suggestion  0.014
    """

    phase: str
    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed_lrs: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None
    end: SweepEnd

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain JSON data."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    def __str__(self) -> str:
        """Return the description in words."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if not self.losses:
            yield f"{self.phase}: the loss of the first batch is no finite number"
            yield "  suggestion  none"
            return
        count, first, last = len(self.lrs), self.lrs[0], self.lrs[-1]
        place = int(np.argmin(self.smoothed))
        yield f"{self.phase}: {count} steps at learning rates from {first:.3g} to {last:.3g}"
        yield (
            f"  loss        {self.losses[0]:.3g} at first, lowest {self.smoothed[place]:.3g} when "
            f"smoothed, at {self.smoothed_lrs[place]:.3g}"
        )
        end = _ENDS[self.end]
        if self.end == "max_lr" and self.suggestion is not None and place == count - 1:
            end += ", and the loss has not risen yet: a higher max_lr may tell more"
        yield f"  end         {end}"
        if self.suggestion is not None:
            yield f"  suggestion  {self.suggestion:.2g}"
        else:
            yield "  suggestion  none: the loss does not fall by more than its noise"


class Smoothing:
    """An exponential mean of the values so far, with weights that sum to 1 from the first on.

    Example:
        >>> smoothing = Smoothing()
        >>> [round(smoothing.add(value), 3) for value in (1.0, 1.0, 0.0)]
        [1.0, 1.0, 0.631]
    """

    def __init__(self) -> None:
        self._total = 0.0
        self._weight = 0.0
        self._squares = 0.0

    def add(self, value: float) -> float:
        """Add a value, and return the mean."""
        self._total = _MEMORY * self._total + (1 - _MEMORY) * value
        self._weight = _MEMORY * self._weight + (1 - _MEMORY)
        self._squares = _MEMORY**2 * self._squares + (1 - _MEMORY) ** 2
        return self._total / self._weight

    @property
    def variance(self) -> float:
        """The variance of the mean, relative to that of a value."""
        return self._squares / self._weight**2


def make_lr_find(
    phase: str, lrs: Sequence[float], losses: Sequence[float], *, end: SweepEnd = "max_lr"
) -> LRFind:
    """Smooth the losses of a sweep, and find what they suggest.

    Args:
        phase: The name of the phase.
        lrs: The rates of the steps, rising by the same factor.
        losses: Their losses, finite numbers.
        end: Why the sweep ended.

    Returns:
        The result.
    """
    rates = Smoothing()
    smoothed_lrs = [math.exp(rates.add(math.log(lr))) for lr in lrs]
    mean = Smoothing()
    smoothed, variances = [], []
    for loss in losses:
        smoothed.append(mean.add(loss))
        variances.append(mean.variance)
    place = _find_fall(losses, smoothed, variances)
    return LRFind(
        phase=phase,
        lrs=tuple(lrs),
        losses=tuple(losses),
        smoothed_lrs=tuple(smoothed_lrs),
        smoothed=tuple(smoothed),
        suggestion=None if place is None else smoothed_lrs[place],
        end=end,
    )


def _find_fall(
    losses: Sequence[float], smoothed: Sequence[float], variances: Sequence[float]
) -> int | None:
    """Return the first step at which the loss has made most of its fall; None if it has none."""
    settled = min(_MAX_UNSETTLED, len(losses) // 10)
    if len(losses) - settled < 2:
        return None
    lowest = settled + int(np.argmin(smoothed[settled:]))
    top = settled + int(np.argmax(smoothed[settled : lowest + 1]))
    fall = smoothed[top] - smoothed[lowest]
    # From step to step, the trend hardly counts: what is left is the noise of the batches.
    noise = float(np.mean(np.diff(losses[: lowest + 1]) ** 2)) / 2 if lowest else 0.0
    error = math.sqrt(noise * (variances[top] + variances[lowest]))
    # Losses that are all the same have no noise but that of rounding.
    if not fall > max(MIN_ERRORS * error, _ROUNDING * abs(smoothed[top])):
        return None
    level = smoothed[top] - FALL_SHARE * fall
    return next(place for place in range(top, lowest + 1) if smoothed[place] <= level)
