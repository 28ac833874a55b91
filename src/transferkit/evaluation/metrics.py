"""Metrics as plain functions over targets and predictions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transferkit.errors import ConfigError


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Return the share of rows whose largest logit is the target's.

    Args:
        logits: Float `(N, C)`, N at least 1.
        targets: int64 `(N,)`, class indices.

    Returns:
        A number in [0, 1]; of equal logits the lowest index wins.

    Raises:
        ConfigError: The shapes do not fit.

    Example:
        >>> accuracy(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
        0.5
    """
    return top_k_accuracy(logits, targets, k=1)


def top_k_accuracy(logits: Tensor, targets: Tensor, *, k: int) -> float:
    """Return the share of rows whose target is among the `k` largest logits.

    Args:
        logits: Float `(N, C)`, N at least 1.
        targets: int64 `(N,)`, class indices.
        k: `1 <= k <= C`.

    Returns:
        A number in [0, 1].

    Raises:
        ConfigError: The shapes or `k` do not fit.

    Example:
        >>> top_k_accuracy(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([1]), k=2)
        1.0
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1] or not len(logits):
        raise ConfigError(
            f"Accuracy needs logits (N, C) and targets (N,) with N of at least 1, "
            f"found {tuple(logits.shape)} and {tuple(targets.shape)}."
        )
    if not 1 <= k <= logits.shape[1]:
        raise ConfigError(f"`k` should lie in [1, {logits.shape[1]}], found {k}.")
    order = logits.argsort(dim=1, descending=True, stable=True)[:, :k]
    return (order == targets[:, None]).any(dim=1).double().mean().item()


def confusion_matrix(
    predictions: Tensor, targets: Tensor, *, num_classes: int
) -> npt.NDArray[np.int64]:
    """Count each pair of target and prediction.

    Args:
        predictions: int64 `(N,)`, predicted class indices in [0, num_classes).
        targets: int64 `(N,)`, true class indices in [0, num_classes).
        num_classes: The number of classes C.

    Returns:
        int64 `(C, C)`: row i, column j counts images of class i predicted as class j.

    Raises:
        ConfigError: The shapes differ or an index is out of range.

    Example:
        >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), num_classes=2)
        array([[1, 1],
               [0, 1]])
    """
    if predictions.shape != targets.shape or targets.dim() != 1:
        raise ConfigError(
            f"Predictions and targets should both be (N,), found {tuple(predictions.shape)} "
            f"and {tuple(targets.shape)}."
        )
    for name, indices in (("predictions", predictions), ("targets", targets)):
        if len(indices) and not (int(indices.min()) >= 0 and int(indices.max()) < num_classes):
            raise ConfigError(
                f"`{name}` should lie in [0, {num_classes}), found {int(indices.min())} "
                f"to {int(indices.max())}."
            )
    pairs = (targets * num_classes + predictions).cpu()
    counts = torch.bincount(pairs, minlength=num_classes**2)
    matrix: npt.NDArray[np.int64] = counts.reshape(num_classes, num_classes).numpy()
    return matrix


def class_accuracies(matrix: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the accuracy within each class (its recall).

    Args:
        matrix: A confusion matrix `(C, C)`, see `confusion_matrix`.

    Returns:
        float64 `(C,)` in [0, 1]; NaN for a class without images.

    Example:
        >>> class_accuracies(np.array([[3, 1], [0, 2]]))
        array([0.75, 1.  ])
    """
    totals = matrix.sum(axis=1)
    shares = np.full(len(matrix), np.nan)
    np.divide(matrix.diagonal(), totals, out=shares, where=totals > 0)
    return shares
