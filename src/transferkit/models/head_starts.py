"""Closed-form starts for a linear head: computed from features, without training steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - F is what everybody calls it
from torch import Tensor

from transferkit._checks import check_integer, check_number
from transferkit.errors import ConfigError, DataError

RIDGE_STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(8, -9, -1))
"""What leave-one-out chooses from, strong before weak, so that ties go to the stronger."""

DEFAULT_STRENGTH = 1.0
"""Taken where leaving out tells nothing: no class has two pictures."""

MAX_NAMED_CLASSES = 5

_SCALE_RANGE = (1.0, 100.0)
_NUM_HALVINGS = 50


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearStart:
    """Hold a linear classifier: `logits = features @ weight.T + bias`.

    `set_linear` writes it into a head.

    Args:
        weight: float32 `(C, D)`, on the CPU.
        bias: float32 `(C,)`, on the CPU.

    Example:
        >>> start = LinearStart(weight=torch.eye(2), bias=torch.zeros(2))
        >>> (torch.tensor([[3.0, 4.0]]) @ start.weight.T + start.bias).tolist()
        [[3.0, 4.0]]
    """

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class RidgeFit(LinearStart):
    """Hold a linear classifier from ridge regression, and what was chosen for it.

    Args:
        weight: float32 `(C, D)`, on the CPU.
        bias: float32 `(C,)`, on the CPU.
        strength: The penalty's strength, as `ridge` takes it.
        scale: What the regression's outputs were multiplied with to make logits of them.
        errors: The mean squared leave-one-out error by strength.
    """

    strength: float
    scale: float
    errors: dict[float, float]


def check_features(
    features: Tensor, targets: Tensor, num_classes: int
) -> tuple[Tensor, Tensor, int]:
    """Return features as float64, targets and the number of classes, when they can be fitted.

    Args:
        features: Floating point `(N, D)`, on any device, float16 and bfloat16 too.
        targets: int64 `(N,)`, in [0, num_classes - 1], each class at least once.
        num_classes: The number of classes, at least 2.

    Returns:
        float64 features and int64 targets, detached and on the CPU; the number of classes.

    Raises:
        ConfigError: A shape, type or range is another.
        DataError: A class has no pictures, or a feature is not finite in float32.
    """
    num_classes = check_integer("num_classes", num_classes, minimum=2)
    if not (isinstance(features, Tensor) and features.is_floating_point() and features.ndim == 2):
        raise ConfigError(
            f"`features` should be a floating-point tensor (N, D), found {_describe(features)}."
        )
    num_rows = len(features)
    if not (
        isinstance(targets, Tensor)
        and targets.dtype == torch.int64
        and targets.shape == (num_rows,)
    ):
        raise ConfigError(
            f"`targets` should be an int64 tensor ({num_rows},), one for each row of `features`, "
            f"found {_describe(targets)}."
        )
    features, targets = features.detach().cpu(), targets.detach().cpu()
    _check_targets(targets, num_classes)
    bad = (~features.to(torch.float32).isfinite()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise DataError(
            f"`features` should be finite in float32, found {features[row, column].item()} in row "
            f"{row}, column {column}, and {len(bad)} such values in all. Compute them again in "
            f"float32, from a backbone whose weights are finite."
        )
    return features.to(torch.float64), targets, num_classes


def _check_targets(targets: Tensor, num_classes: int) -> None:
    outside = ((targets < 0) | (targets >= num_classes)).nonzero()
    if len(outside):
        row = int(outside[0])
        raise ConfigError(
            f"`targets` should lie in [0, {num_classes - 1}] for {num_classes} classes, "
            f"found {int(targets[row])} in row {row}."
        )
    empty = (torch.bincount(targets, minlength=num_classes) == 0).nonzero().flatten().tolist()
    if empty:
        named = ", ".join(map(str, empty[:MAX_NAMED_CLASSES]))
        more = ", ..." if len(empty) > MAX_NAMED_CLASSES else ""
        raise DataError(
            f"{len(empty)} of {num_classes} classes have no pictures (class {named}{more}). "
            f"A head can only be fitted to at least one picture of each class: add pictures, or "
            f"leave these classes out."
        )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__


def to_float32(weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Return weight and bias as float32.

    Raises:
        DataError: They are beyond its range.
    """
    weight, bias = weight.to(torch.float32), bias.to(torch.float32)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise DataError(
            "The fitted weights are beyond the range of float32, since the features vary by too "
            "little. Scale the features to values near 1."
        )
    return {"weight": weight.contiguous(), "bias": bias}


def class_means(features: Tensor, targets: Tensor, num_classes: int) -> LinearStart:
    """Classify by the nearest class mean, written as a linear classifier.

    This is linear discriminant analysis with one variance for all directions and equal
    priors: `logits = -|x - mean|^2 / (2 * variance)` up to what all classes have in common.
    The variance is that within the classes, pooled, for each feature. Features that hang
    together make its probabilities too sure; the classes it names are not touched by that.
    Where the pictures of each class are all the same, such as one picture for each, the mean
    squared distance of the class means from their mean stands in for the variance.

    Args:
        features: Floating point `(N, D)`, on any device; computed with in float64.
        targets: int64 `(N,)`, in [0, num_classes - 1], each class at least once.
        num_classes: The number of classes C, at least 2.

    Returns:
        The classifier.

    Raises:
        ConfigError: A shape, type or range is another.
        DataError: A class has no pictures, or a feature is not finite.

    Example:
        >>> features = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
        >>> start = class_means(features, torch.tensor([0, 0, 1, 1]), 2)
        >>> (start.weight[1] - start.weight[0]).tolist(), (start.bias[1] - start.bias[0]).tolist()
        ([5.0], -30.0)

    References:
        Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, 2009,
        section 4.3; as prototypes of few pictures: Snell, Swersky and Zemel, 2017,
        https://arxiv.org/abs/1703.05175
    """
    x, targets, num_classes = check_features(features, targets, num_classes)
    onehot = F.one_hot(targets, num_classes).to(torch.float64)
    centre = x.mean(0)
    x = x - centre
    # Measured from the centre, the means say the same and lose fewer digits.
    means = (onehot.T @ x) / onehot.sum(0)[:, None]
    within = (x - means[targets]).square().sum()
    variance = within / max((len(x) - num_classes) * x.shape[1], 1)
    if within <= 1e-20 * x.square().sum():
        variance = (means - means.mean(0)).square().sum() / num_classes
    if variance == 0:
        return LinearStart(**to_float32(torch.zeros_like(means), means.new_zeros(num_classes)))
    weight = means / variance
    bias = -weight @ centre - (weight * means).sum(1) / 2
    return LinearStart(**to_float32(weight, bias))


def ridge(
    features: Tensor, targets: Tensor, num_classes: int, *, strength: float | None = None
) -> RidgeFit:
    """Fit the classes as numbers 0 and 1 by ridge regression, in closed form.

    Nothing iterates, so that it takes a fraction of a second for thousands of pictures. Its
    outputs are multiplied with the one factor, in [1, 100], with which pictures that were
    left out are told best by their cross-entropy, so that they can serve as logits.

    Args:
        features: Floating point `(N, D)`, on any device; computed with in float64.
        targets: int64 `(N,)`, in [0, num_classes - 1], each class at least once.
        num_classes: The number of classes C, at least 2.
        strength: The penalty on the squared weights, above 0, as a multiple of the mean
            squared distance of the features from their mean: it does not depend on their
            scale. None picks the one of `RIDGE_STRENGTHS` with the least leave-one-out
            squared error, or `DEFAULT_STRENGTH` where no class has two pictures.

    Returns:
        The classifier, and what was chosen for it.

    Raises:
        ConfigError: A shape, type or range is another.
        DataError: A class has no pictures, or a feature is not finite.

    Example:
        >>> features = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
        >>> fit = ridge(features, torch.tensor([0, 0, 1, 1]), 2)
        >>> (features @ fit.weight.T + fit.bias).argmax(1).tolist()
        [0, 0, 1, 1]

    References:
        Golub, Heath and Wahba, Generalized Cross-Validation as a Method for Choosing a Good
        Ridge Parameter, 1979, for leaving out in closed form; Platt, Probabilistic Outputs
        for Support Vector Machines, 1999, for the smoothed targets of the factor.
    """
    x, targets, num_classes = check_features(features, targets, num_classes)
    if strength is not None:
        strength = check_number("strength", strength, lambda value: value > 0, "above 0 or None")
    onehot = F.one_hot(targets, num_classes).to(torch.float64)
    centre, shares = x.mean(0), onehot.mean(0)
    x = x - centre
    basis, energies = _spectrum(x)
    unit = energies.sum() / len(x)
    if strength is None and len(x) == num_classes:
        strength = DEFAULT_STRENGTH
    strengths = RIDGE_STRENGTHS if strength is None else (strength,)
    held_out = {
        each: _leave_one_out(basis, energies, onehot, penalty=each * unit) for each in strengths
    }
    errors = {each: float((held_out[each] - onehot).square().mean()) for each in strengths}
    best = min(strengths, key=errors.__getitem__)
    scale = _fit_scale(held_out[best], onehot)
    shrunk = (basis.T @ (onehot - shares)) / (energies + best * unit)[:, None]
    weight = scale * (x.T @ (basis @ shrunk)).T
    bias = scale * shares - weight @ centre
    return RidgeFit(**to_float32(weight, bias), strength=best, scale=scale, errors=errors)


def _spectrum(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the left singular vectors `(N, R)` and squared singular values `(R,)` of `x`."""
    num_rows, num_columns = x.shape
    if num_rows <= num_columns:
        energies, basis = torch.linalg.eigh(x @ x.T)
    else:
        energies, directions = torch.linalg.eigh(x.T @ x)
        basis = x @ directions
    # Products of rounding errors, which are no directions of the features.
    floor = max(x.shape) * torch.finfo(x.dtype).eps * energies[-1:].clamp_min(0)
    kept = energies > floor
    basis, energies = basis[:, kept], energies[kept]
    return basis / torch.linalg.vector_norm(basis, dim=0), energies


def _leave_one_out(basis: Tensor, energies: Tensor, onehot: Tensor, *, penalty: Tensor) -> Tensor:
    """Return for each row what a fit to all others says of it, `(N, C)`, in closed form."""
    shares = onehot.mean(0)
    kept = energies / (energies + penalty)
    fitted = shares + basis @ (kept[:, None] * (basis.T @ (onehot - shares)))
    leverage = 1 / len(onehot) + basis.square() @ kept
    return onehot - (onehot - fitted) / (1 - leverage).clamp_min(1e-12)[:, None]


def _fit_scale(outputs: Tensor, onehot: Tensor) -> float:
    """Return the factor that makes the best logits of outputs, by their cross-entropy.

    The targets are smoothed as if each class had been seen once more, so that outputs
    without a mistake ask for a finite factor. The loss is convex: halve where its slope is.
    """
    num_rows, num_classes = onehot.shape
    wanted = (onehot * num_rows + 1) / (num_rows + num_classes)
    low, high = _SCALE_RANGE
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        slope = ((middle * outputs).softmax(1) - wanted).mul(outputs).sum()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return (low + high) / 2
