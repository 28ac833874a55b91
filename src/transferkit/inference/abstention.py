"""When to give no answer: a temperature, and a threshold that keeps an accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from transferkit._checks import check_number, check_type
from transferkit._seeding import generator_for
from transferkit.data import ImageDataset
from transferkit.errors import DataError
from transferkit.inference.tta import mean_probabilities

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
NUM_CANDIDATES = 20
_NUM_BISECTIONS = 60


@dataclass(frozen=True)
class AbstentionReport:
    """What a calibration found, and what it promises.

    Args:
        temperature: What logits are divided by before softmax, in [0.05, 20].
        threshold: The probability of the likeliest class below which the predictor abstains.
        target_accuracy: The accuracy among the answers that is kept.
        confidence: How sure it is that it is kept on new pictures of the same kind.
        coverage: The share of pictures with an answer, in (0, 1], of those that the threshold
            was tested on.
        accuracy: The accuracy among them.
        accuracy_without: The accuracy on all of them, without a threshold.
        num_fitted: The pictures that the temperature was fitted on.
        num_tested: The others, which thresholds were tested on.
    """

    temperature: float
    threshold: float
    target_accuracy: float
    confidence: float
    coverage: float
    accuracy: float
    accuracy_without: float
    num_fitted: int
    num_tested: int

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON data."""
        return asdict(self)


def check_calibration(
    data: ImageDataset, class_names: Sequence[str], target_accuracy: float, confidence: float
) -> Tensor:
    """Return the targets of a split as the model counts its classes.

    Args:
        data: The split.
        class_names: The model's.
        target_accuracy: In (0, 1).
        confidence: In (0, 1).

    Returns:
        int64 `(N,)`.

    Raises:
        ConfigError: It is no split, or a share is out of range.
        DataError: Its classes are others than the model's, or it has too few pictures.
    """
    for name, share in (("target_accuracy", target_accuracy), ("confidence", confidence)):
        check_number(name, share, lambda value: 0 < value < 1, "in (0, 1)")
    check_type("data", data, ImageDataset, "an ImageDataset, such as `splits.val`")
    if set(data.class_names) != set(class_names):
        raise DataError(
            f"`data` should have the predictor's classes, {_listed(class_names)}, found "
            f"{_listed(data.class_names)}. Give pictures like those that the model was trained on."
        )
    if len(data) < 2:
        raise DataError(f"A calibration needs at least 2 pictures, found {len(data)}.")
    places = torch.tensor([class_names.index(name) for name in data.class_names])
    return places[torch.from_numpy(data.targets)]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")


def calibrate_abstention(
    views: Sequence[Tensor], targets: Tensor, *, target_accuracy: float, confidence: float
) -> AbstentionReport:
    """Find a temperature and the threshold that keeps an accuracy among the answers.

    The temperature and 20 possible thresholds come from half of the pictures, drawn with a
    fixed seed, and so does the threshold of which the test begins, the one that promises most.
    On the other half that one and then ever lower ones are tested, until one fails, and the last
    that passed is taken. The order does not depend on the pictures of the tests, so that all of
    them together are wrong with a probability of 1 - `confidence` at most.

    Args:
        views: The logits of each view of pictures that the model was not trained on, float32
            `(N, C)`.
        targets: int64 `(N,)`, their classes.
        target_accuracy: In (0, 1).
        confidence: In (0, 1).

    Returns:
        What was found.

    Raises:
        DataError: No threshold is sure to keep the accuracy.

    Example:
        >>> logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]] * 200)
        >>> targets = torch.tensor([0, 1] * 200)
        >>> report = calibrate_abstention(
        ...     [logits], targets, target_accuracy=0.95, confidence=0.95
        ... )
        >>> report.coverage, report.accuracy
        (1.0, 1.0)

    References:
        Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017,
        https://arxiv.org/abs/1706.04599: the temperature.
        Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017,
        https://arxiv.org/abs/1705.08500: a threshold with a guarantee.
        Angelopoulos, Bates, Candès, Jordan and Lei, "Learn then Test", 2021,
        https://arxiv.org/abs/2110.01052: tests in an order that other pictures give.
    """
    order = torch.randperm(len(targets), generator=generator_for(0))
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    temperature = fit_temperature([each[first] for each in views], targets[first])
    # As predictions have them, in float32.
    confidences, labels = mean_probabilities(views, temperature).max(dim=1)
    is_right = labels == targets
    candidates = make_candidates(confidences[first])
    promises = lower_bounds(candidates, confidences[first], is_right[first], confidence)
    start = promises.index(max(promises))
    bounds = lower_bounds(candidates, confidences[second], is_right[second], confidence)
    threshold = None
    for place in range(start, -1, -1):
        if bounds[place] < target_accuracy:
            break
        threshold = candidates[place]
    if threshold is None:
        raise DataError(_explain(bounds[start], len(second), target_accuracy, confidence))
    kept = confidences[second] >= threshold
    return AbstentionReport(
        temperature=temperature,
        threshold=threshold,
        target_accuracy=target_accuracy,
        confidence=confidence,
        coverage=kept.double().mean().item(),
        accuracy=is_right[second][kept].double().mean().item(),
        accuracy_without=is_right[second].double().mean().item(),
        num_fitted=len(first),
        num_tested=len(second),
    )


def _explain(bound: float, count: int, target_accuracy: float, confidence: float) -> str:
    shown = math.floor(1000 * bound) / 1000  # Never as much as what it does not reach.
    needed = math.ceil(math.log1p(-confidence) / math.log(target_accuracy))
    return (
        f"No threshold is sure to keep an accuracy of {target_accuracy:g} with a confidence of "
        f"{confidence:g}: tested on {count} pictures, the best one keeps {shown:.3f}. Ask for "
        f"less, or give more pictures, at least {2 * needed}, and more where some are answered "
        f"wrong."
    )


def fit_temperature(views: Sequence[Tensor], targets: Tensor) -> float:
    """Return the temperature under which the mean probabilities fit the targets.

    The mean cross-entropy of one view is convex in the inverse of the temperature, so that its
    slope is bisected, and that of several views falls and rises likewise. Where all targets have
    the largest logits, ever smaller temperatures are better; where they have none, ever larger
    ones. Then the bound comes back.

    Args:
        views: The logits of each view, float32 `(N, C)`.
        targets: int64 `(N,)`.

    Returns:
        A number in [0.05, 20].

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]] * 4)
        >>> round(fit_temperature([logits], torch.tensor([0, 0, 0, 1])), 4)  # 2 / log(3)
        1.8205
    """
    values = torch.stack([each.double() for each in views])  # (V, N, C)
    places = targets.expand(len(views), -1)[..., None]
    own = values.gather(2, places)[..., 0]

    def slope(inverse: float) -> float:
        """The derivative of the cross-entropy with respect to the inverse temperature."""
        logarithms = (values * inverse).log_softmax(dim=2)
        expected = (logarithms.exp() * values).sum(dim=2)
        # Each view counts by its part of the target's mean probability.
        parts = logarithms.gather(2, places)[..., 0].softmax(dim=0)
        return (parts * (expected - own)).sum(dim=0).mean().item()

    low, high = math.log(1 / MAX_TEMPERATURE), math.log(1 / MIN_TEMPERATURE)
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(math.exp(middle)) > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def make_candidates(confidences: Tensor) -> list[float]:
    """Return thresholds that leave out none, a twentieth, two twentieths and so on.

    Args:
        confidences: float32 `(N,)` of pictures that no threshold is tested on.

    Returns:
        From 0 upwards, each once.
    """
    shares = torch.arange(1, NUM_CANDIDATES, dtype=torch.float64) / NUM_CANDIDATES
    # Not `quantile`, which takes no more than 16 million.
    ranked = confidences.double().sort().values
    places = (shares * (len(ranked) - 1)).ceil().long()
    return [0.0, *sorted(set(ranked[places].tolist()))]


def lower_bounds(
    candidates: Sequence[float], confidences: Tensor, is_right: Tensor, confidence: float
) -> list[float]:
    """Return the lower bound of the accuracy above each threshold.

    Args:
        candidates: The thresholds.
        confidences: float32 `(N,)`, the probability of the likeliest class.
        is_right: bool `(N,)`, whether that class is the true one.
        confidence: With which each bound holds by itself.

    Returns:
        In [0, 1]; 0 where no picture has an answer.
    """
    kept = [confidences >= threshold for threshold in candidates]
    return [
        lower_bound(int(is_right[each].sum()), int(each.sum()), 1 - confidence) for each in kept
    ]


def lower_bound(num_right: int, count: int, risk: float) -> float:
    """Return the lower bound of a share by Clopper and Pearson, one-sided.

    Args:
        num_right: How many were right.
        count: Of how many.
        risk: The probability with which the share is below the bound.

    Returns:
        In [0, 1].

    Example:
        >>> round(lower_bound(10, 10, 0.05), 4)  # 0.05 ** (1 / 10)
        0.7411

    References:
        Clopper and Pearson, "The Use of Confidence or Fiducial Limits", Biometrika 1934,
        https://doi.org/10.1093/biomet/26.4.404.
    """
    if num_right == 0:
        return 0.0
    numbers = torch.arange(num_right, count + 1, dtype=torch.float64)
    whole = torch.tensor(float(count), dtype=torch.float64)
    ways = (whole + 1).lgamma() - (numbers + 1).lgamma() - (whole - numbers + 1).lgamma()
    low, high = 0.0, num_right / count
    for _ in range(_NUM_BISECTIONS):
        share = (low + high) / 2
        terms = ways + numbers * math.log(share) + (whole - numbers) * math.log1p(-share)
        low, high = (share, high) if terms.logsumexp(dim=0).exp().item() < risk else (low, share)
    return low
