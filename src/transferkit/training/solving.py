"""`solver="lbfgs"`: the head of a frozen backbone by logistic regression, without epochs."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from transferkit.errors import ConfigError
from transferkit.models import Classifier
from transferkit.models.heads import set_linear
from transferkit.models.logistic import logistic
from transferkit.training.cached_feed import CachedFeed

Solver: TypeAlias = Literal["sgd", "lbfgs"]


class Fitted(NamedTuple):
    """How a head fits the training features.

    Args:
        loss: Mean cross-entropy.
        accuracy: Share of them predicted right, in [0, 1].
    """

    loss: float
    accuracy: float


def check_solver(solver: Solver) -> Solver:
    """Return the solver.

    Raises:
        ConfigError: There is no such solver.
    """
    if solver not in ("sgd", "lbfgs"):
        raise ConfigError(f'`solver` should be "sgd" or "lbfgs", found {solver!r}.')
    return solver


def solve_head(model: Classifier, feed: CachedFeed, *, seed: int) -> tuple[Fitted, dict[str, Any]]:
    """Fit the head to the cached training features, in place.

    Args:
        model: The model; its backbone is frozen.
        feed: Gives the features of all training pictures, of each view.
        seed: Rules the folds of the cross-validation.

    Returns:
        Loss and accuracy on the training features, and what the solver reports.
    """
    features, targets, pictures = _training_features(feed)
    # Views of one picture are left out together: else each would be judged by its siblings.
    fit = logistic(features, targets, model.num_classes, groups=pictures, seed=seed)
    set_linear(model.head, fit.weight, fit.bias)
    logits = features @ fit.weight.T + fit.bias
    loss = nn.functional.cross_entropy(logits, targets).item()
    accuracy = (logits.argmax(dim=1) == targets).double().mean().item()
    return Fitted(loss, accuracy), {
        "solver": "lbfgs",
        "num_features": len(features),
        "strength": fit.strength,
        "num_iterations": fit.num_iterations,
    }


def _training_features(feed: CachedFeed) -> tuple[Tensor, Tensor, Tensor]:
    """Return the features of all views, their targets, and the pictures they are of."""
    parts = [feed.view("train", number) for number in feed.view_numbers]
    targets = feed.targets("train")
    pictures = torch.arange(len(targets))
    return (
        torch.cat([view.values[view.valid] for view in parts]),
        torch.cat([targets[view.valid] for view in parts]),
        torch.cat([pictures[view.valid] for view in parts]),
    )
