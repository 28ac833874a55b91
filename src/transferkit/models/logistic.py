"""Logistic regression on features: the best linear head for them, with a chosen penalty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - F is what everybody calls it
from torch import Tensor

from transferkit._checks import check_integer, check_number
from transferkit._seeding import check_seed
from transferkit.errors import ConfigError
from transferkit.models.head_starts import LinearStart, check_features, to_float32

LOGISTIC_STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(2, -9, -1))
"""What cross-validation chooses from, strong before weak, so that ties go to the stronger."""

DEFAULT_STRENGTH = 0.01
"""Taken where nothing can be left out: no class has two pictures."""

MAX_JOINT_SIZE = 20_000_000

_ROUGH = 1e-6
_EXACT = 1e-8


@dataclass(frozen=True, kw_only=True, eq=False)
class LogisticFit(LinearStart):
    """Hold a linear classifier from logistic regression, and how it was come by.

    Args:
        weight: float32 `(C, D)`, on the CPU.
        bias: float32 `(C,)`, on the CPU.
        strength: The penalty's strength, as `logistic` takes it.
        cv_losses: The mean cross-entropy of pictures that were left out, by strength; empty
            where the strength was given or nothing could be left out.
        num_iterations: The iterations of the last fit, to all pictures. As many as
            `max_iterations` say that it was cut off.
    """

    strength: float
    cv_losses: dict[float, float]
    num_iterations: int


def logistic(
    features: Tensor,
    targets: Tensor,
    num_classes: int,
    *,
    groups: Tensor | None = None,
    strength: float | None = None,
    num_folds: int = 5,
    seed: int = 0,
    max_iterations: int = 200,
) -> LogisticFit:
    """Fit a linear head to features: what training it to the end would come to.

    The mean cross-entropy plus `strength / 2` times the sum of squared weights, not of the
    bias, is brought to its one minimum by L-BFGS. Features are brought to mean 0 and
    standard deviation 1 first, those of all pictures, for which weight and bias make up
    again; a feature that is the same for all pictures gets the weight 0.

    Args:
        features: Floating point `(N, D)`, on any device; computed with in float64.
        targets: int64 `(N,)`, in [0, num_classes - 1], each class at least once.
        num_classes: The number of classes C, at least 2.
        groups: int64 `(N,)`, the picture that each row is of, where several rows are views of
            one: they are left out together. None takes each row for a picture of its own.
        strength: The penalty's strength, above 0. None picks the one of
            `LOGISTIC_STRENGTHS` with the least cross-entropy of pictures that were left out.
        num_folds: How often pictures are left out to pick the strength, at least 2; at most
            as often as the largest class has pictures. Each class is spread over the
            folds. A class's only picture is never left out; where no class has two, the
            strength is `DEFAULT_STRENGTH`.
        seed: Rules which picture is in which fold, and nothing else.
        max_iterations: At most so many iterations for each strength, at least 1.

    Returns:
        The classifier, and what was chosen for it.

    Raises:
        ConfigError: A shape, type or range is another.
        DataError: A class has no pictures, or a feature is not finite.

    Example:
        >>> features = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
        >>> fit = logistic(features, torch.tensor([0, 0, 1, 1]), 2)
        >>> (features @ fit.weight.T + fit.bias).argmax(1).tolist()
        [0, 0, 1, 1]

    References:
        Liu and Nocedal, On the Limited Memory BFGS Method for Large Scale Optimization, 1989;
        as a measure of features: Kornblith, Shlens and Le, 2019,
        https://arxiv.org/abs/1805.08974
    """
    x, targets, num_classes = check_features(features, targets, num_classes)
    num_folds = check_integer("num_folds", num_folds, minimum=2)
    max_iterations = check_integer("max_iterations", max_iterations, minimum=1)
    seed = check_seed(seed)
    _check_groups(groups, targets)
    if strength is not None:
        strength = check_number("strength", strength, lambda value: value > 0, "above 0 or None")
    centre, spread = _moments(x)
    inputs, directions = _compress((x - centre) / spread)
    onehot = F.one_hot(targets, num_classes).to(torch.float64)
    losses: dict[float, float] = {}
    if strength is None:
        folds = _assign_folds(targets, num_folds, seed, groups)
        losses = _cross_validate(inputs, onehot, folds, max_iterations)
        strength = min(losses, key=losses.__getitem__) if losses else DEFAULT_STRENGTH
    solution, num_iterations = _fit_path(inputs, onehot, strength, max_iterations)
    weight = solution[:, :-1] @ directions.T / spread
    bias = solution[:, -1] - weight @ centre
    return LogisticFit(
        **to_float32(weight, bias),
        strength=strength,
        cv_losses=losses,
        num_iterations=num_iterations,
    )


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return each feature's mean and standard deviation, infinite where it does not vary."""
    centre = x.mean(0)
    spread = (x - centre).square().mean(0).sqrt()
    # A mean of equal numbers is rounded; float32 numbers that differ do so by far more.
    return centre, spread.masked_fill(spread <= 1e-10 * x.abs().amax(0), torch.inf)


def _compress(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs with a column of ones, and the directions that they are measured along.

    With fewer rows than features the weights lie in the span of the rows, and the penalty
    is the same in all directions: the problem in that span is smaller and has the same
    solution.
    """
    if x.shape[0] < x.shape[1]:
        basis, values, directions = torch.linalg.svd(x, full_matrices=False)
        x, directions = basis * values, directions.T
    else:
        directions = torch.eye(x.shape[1], dtype=x.dtype)
    return torch.cat([x, x.new_ones(len(x), 1)], 1), directions


def _check_groups(groups: Tensor | None, targets: Tensor) -> None:
    if groups is None:
        return
    if groups.dtype != torch.int64 or groups.shape != targets.shape:
        raise ConfigError(
            f"`groups` should be an int64 tensor {tuple(targets.shape)}, the picture of each row, "
            f"found {groups.dtype} {tuple(groups.shape)}."
        )
    pictures = torch.unique(groups)
    if len(torch.unique(torch.stack([groups, targets]), dim=1).T) != len(pictures):
        raise ConfigError(
            "`groups` should name pictures, each of one class: the rows of one of them have "
            "several targets."
        )


def _assign_folds(
    targets: Tensor, num_folds: int, seed: int, groups: Tensor | None = None
) -> Tensor:
    """Return the fold of each row, int64 `(N,)`; -1 where its class has but this picture."""
    if groups is not None:
        _, pictures = torch.unique(groups, return_inverse=True)
        of_pictures = targets.new_empty(int(pictures.max()) + 1)
        of_pictures[pictures] = targets
        return _assign_folds(of_pictures, num_folds, seed)[pictures]
    counts = torch.bincount(targets)
    num_folds = min(num_folds, int(counts.max()))
    folds = torch.full_like(targets, -1)
    rng = np.random.default_rng(seed)
    first = 0
    for index in (counts > 1).nonzero().flatten().tolist():
        members = (targets == index).nonzero().flatten()[rng.permutation(int(counts[index]))]
        # Each class goes on where the one before it ended, so that the folds are even.
        folds[members] = (first + torch.arange(len(members))) % num_folds
        first += len(members)
    return folds


def _cross_validate(
    inputs: Tensor, onehot: Tensor, folds: Tensor, max_iterations: int
) -> dict[float, float]:
    """Return the mean cross-entropy of the rows that were left out, by strength."""
    num_folds = int(folds.max()) + 1
    if num_folds == 0:
        return {}
    left_out = folds == torch.arange(num_folds)[:, None]
    kept = (~left_out).to(torch.float64)
    kept /= kept.sum(1, keepdim=True)
    # The folds are independent of each other; solving them as one costs fewer steps of Python.
    is_large = num_folds * onehot.numel() > MAX_JOINT_SIZE
    groups = range(num_folds) if is_large else [slice(None)]
    sums = dict.fromkeys(LOGISTIC_STRENGTHS, 0.0)
    for group in groups:
        rows, outside = kept[group], left_out[group]
        rows, outside = rows.view(-1, len(folds)), outside.view(-1, len(folds))
        solution = inputs.new_zeros(len(rows), onehot.shape[1], inputs.shape[1])
        for strength in LOGISTIC_STRENGTHS:
            solution, _ = _solve(
                inputs, onehot, rows, strength, solution, max_iterations, tolerance=_ROUGH
            )
            losses = _losses(inputs @ solution.mT, onehot)
            sums[strength] += float(losses[outside].sum())
    return {strength: total / int((folds >= 0).sum()) for strength, total in sums.items()}


def _fit_path(
    inputs: Tensor, onehot: Tensor, strength: float, max_iterations: int
) -> tuple[Tensor, int]:
    """Return the solution for all rows `(C, R + 1)`, come to by way of stronger penalties."""
    rows = inputs.new_full((1, len(inputs)), 1 / len(inputs))
    solution = inputs.new_zeros(1, onehot.shape[1], inputs.shape[1])
    for stronger in (each for each in LOGISTIC_STRENGTHS if each > strength):
        solution, _ = _solve(
            inputs, onehot, rows, stronger, solution, max_iterations, tolerance=_ROUGH
        )
    solution, num_iterations = _solve(
        inputs, onehot, rows, strength, solution, max_iterations, tolerance=_EXACT
    )
    return solution[0], num_iterations


def _losses(logits: Tensor, onehot: Tensor) -> Tensor:
    """Return the cross-entropy `(F, N)` of logits `(F, N, C)`."""
    return logits.logsumexp(-1) - (logits * onehot).sum(-1)


def _solve(
    inputs: Tensor,
    onehot: Tensor,
    rows: Tensor,
    strength: float,
    start: Tensor,
    max_iterations: int,
    *,
    tolerance: float,
) -> tuple[Tensor, int]:
    """Solve F regressions on the same rows, which differ in the weights of the rows.

    Args:
        inputs: `(N, R + 1)`, the last column ones.
        onehot: `(N, C)`.
        rows: `(F, N)`, how much each row counts.
        strength: The penalty's strength.
        start: `(F, C, R + 1)`, the last column the bias.
        max_iterations: At most so many iterations.
        tolerance: The largest entry that the gradient may have left.

    Returns:
        The solution, shaped as `start`, and the number of iterations.
    """
    solution = start.clone().requires_grad_()
    penalty = inputs.new_full((inputs.shape[1],), strength)
    penalty[-1] = 0
    optimizer = torch.optim.LBFGS(
        [solution],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> Tensor:
        logits = inputs @ solution.mT
        surplus = (logits.softmax(-1) - onehot) * rows[:, :, None]
        solution.grad = surplus.mT @ inputs + penalty * solution
        loss = (rows * _losses(logits, onehot)).sum()
        return loss + (penalty * solution.square()).sum() / 2

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return solution.detach(), int(optimizer.state[solution]["n_iter"])
