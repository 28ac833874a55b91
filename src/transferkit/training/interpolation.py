"""WiSE-FT: weights between those before and those after fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transferkit.errors import ConfigError
from transferkit.evaluation import Evaluation

FACTORS = tuple(number / 10 for number in range(11))


@dataclass(frozen=True)
class WiseFT:
    """What interpolating the weights gave.

    Args:
        factor: How far the picked weights are from those before to those after fine-tuning,
            in [0, 1].
        scores: For each factor tried "factor", "val_accuracy" and "val_loss".

    Example:
        >>> scores = ({"factor": 1.0, "val_accuracy": 0.9, "val_loss": float("nan")},)
        >>> WiseFT(1.0, scores).to_dict()["scores"]
        [{'factor': 1.0, 'val_accuracy': 0.9, 'val_loss': None}]
    """

    factor: float
    scores: tuple[dict[str, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain JSON data; values that are not finite are None."""
        scores = [
            {key: value if math.isfinite(value) else None for key, value in each.items()}
            for each in self.scores
        ]
        return {"factor": self.factor, "scores": scores}


class _Ends(NamedTuple):
    """A tensor of the model, and its values at both ends."""

    value: Tensor
    start: Tensor
    finetuned: Tensor


def wise_ft(
    model: nn.Module, start: Mapping[str, Tensor], evaluate: Callable[[], Evaluation]
) -> WiseFT:
    """Interpolate between the weights before and after fine-tuning, and pick on validation.

    The factors 0, 0.1, ..., 1 are tried. The highest validation accuracy wins, then the
    lowest loss, then the factor nearest to the fine-tuned weights. The picked weights are in
    the model afterwards; if anything ends the search before, the fine-tuned ones are. Where
    fine-tuning changed nothing, 1 alone is tried.

    Args:
        model: The model with the fine-tuned weights. Floating point tensors, BatchNorm's
            statistics too, are interpolated; counts stay those of the fine-tuned model.
        start: What of the model's `state_dict()` may have changed, as it was before, in a copy.
        evaluate: Evaluates the model, as it is then, on the validation pictures.

    Returns:
        The factor that was picked, and the scores of all.

    Raises:
        ConfigError: `start` is of another model.

    References:
        Wortsman et al., Robust fine-tuning of zero-shot models, 2021,
        https://arxiv.org/abs/2109.01903.
    """
    ends = _find_ends(model, start)
    scores: list[dict[str, float]] = []
    try:
        for factor in FACTORS if ends else (1.0,):
            _put(ends, factor)
            found = evaluate()
            scores.append(
                {"factor": factor, "val_accuracy": found.accuracy, "val_loss": found.loss}
            )
        picked = min(scores, key=_rank)["factor"]
        _put(ends, picked)
    except BaseException:  # Ctrl-C too.
        _put(ends, 1.0)
        raise
    return WiseFT(picked, tuple(scores))


def _find_ends(model: nn.Module, start: Mapping[str, Tensor]) -> list[_Ends]:
    """Return the floating point tensors that are not what they were."""
    state = model.state_dict()
    ends: list[_Ends] = []
    for name, before in start.items():
        if name not in state or state[name].shape != before.shape:
            found = f"of the shape {tuple(state[name].shape)}" if name in state else "none there"
            raise ConfigError(
                f"`start` should be of this model's `state_dict()`, from before the fine-tuning: "
                f"it has `{name}` of the shape {tuple(before.shape)}, the model has {found}."
            )
        value = state[name].detach()
        here = before.to(value)
        if value.dtype.is_floating_point and not torch.equal(value, here):
            ends.append(_Ends(value, here, value.clone()))
    return ends


@torch.no_grad()
def _put(ends: list[_Ends], factor: float) -> None:
    """Put the weights at `factor` of the way from start to end into the model."""
    for value, start, finetuned in ends:
        if factor in (0, 1):  # Bit for bit.
            value.copy_(finetuned if factor else start)
        else:
            torch.lerp(start, finetuned, factor, out=value)


def _rank(score: Mapping[str, float]) -> tuple[bool, float, float, float]:
    """Return the key by which factors are compared; the smallest is the best."""
    loss = score["val_loss"]
    is_nan = math.isnan(loss)
    return is_nan, -score["val_accuracy"], math.inf if is_nan else loss, -score["factor"]
