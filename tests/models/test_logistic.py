from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - F is what everybody calls it
from torch import Tensor

from transferkit.errors import ConfigError
from transferkit.models import logistic as logistic_module
from transferkit.models.head_starts import LinearStart
from transferkit.models.logistic import LOGISTIC_STRENGTHS, logistic


def draw(
    num_rows: int, num_features: int, num_classes: int, *, seed: int = 0, distance: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw classes around different means, with features of different sizes, not centred."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(num_rows) % num_classes
    means = distance * torch.randn(num_classes, num_features, generator=generator)
    features = means[targets] + torch.randn(num_rows, num_features, generator=generator)
    sizes = torch.rand(num_features, generator=generator) + 0.5
    return features * sizes + 3, targets


def logits_of(start: LinearStart, features: Tensor) -> Tensor:
    return features.double() @ start.weight.double().T + start.bias.double()


def accuracy(start: LinearStart, features: Tensor, targets: Tensor) -> float:
    return (logits_of(start, features).argmax(1) == targets).double().mean().item()


def gradient_norm(start: LinearStart, features: Tensor, targets: Tensor, strength: float) -> float:
    """Return the largest entry of the gradient of the loss in the standardised features."""
    x = features.double()
    spread = x.std(0, correction=0)
    weight = (start.weight.double() * spread).requires_grad_()
    bias = (start.bias.double() + start.weight.double() @ x.mean(0)).requires_grad_()
    logits = ((x - x.mean(0)) / spread) @ weight.T + bias
    loss = F.cross_entropy(logits, targets) + strength / 2 * weight.square().sum()
    gradients = torch.autograd.grad(loss, (weight, bias))
    return max(each.abs().max().item() for each in gradients)


@pytest.mark.parametrize("shape", [(60, 5, 3), (24, 80, 3), (30, 30, 2), (200, 10, 10)])
@pytest.mark.parametrize("strength", [10.0, 0.1, 1e-4])
def test_gradient_of_the_solution_is_zero(shape: tuple[int, int, int], strength: float) -> None:
    features, targets = draw(*shape)
    fit = logistic(features, targets, shape[2], strength=strength, max_iterations=1000)
    # What is left is the rounding of weight and bias to float32.
    assert gradient_norm(fit, features, targets, strength) < 3e-6
    assert 0 < fit.num_iterations < 1000
    assert fit.cv_losses == {}


@pytest.mark.parametrize("shape", [(40, 4, 3), (10, 16, 2)])
def test_solution_is_that_of_plain_gradient_descent(shape: tuple[int, int, int]) -> None:
    features, targets = draw(*shape)
    x = features.double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    weight = torch.zeros(shape[2], shape[1], dtype=torch.float64)
    bias = torch.zeros(shape[2], dtype=torch.float64)
    onehot = F.one_hot(targets).double()
    for _ in range(4000):
        surplus = ((x @ weight.T + bias).softmax(1) - onehot) / len(x)
        weight -= 0.5 * (surplus.T @ x + 0.05 * weight)
        bias -= 0.5 * surplus.sum(0)
    found = logits_of(logistic(features, targets, shape[2], strength=0.05), features)
    torch.testing.assert_close(found, x @ weight.T + bias, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(40, 4, 3), (12, 30, 2)])
def test_losses_are_those_of_fits_without_the_fold(shape: tuple[int, int, int]) -> None:
    features, targets = draw(*shape)
    x = features.double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    fit = logistic(features, targets, shape[2], num_folds=3, seed=5)
    folds = logistic_module._assign_folds(targets, 3, 5)
    inputs = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    onehot = F.one_hot(targets).double()
    for strength in (1.0, 0.01):
        total = 0.0
        for fold in range(3):
            kept = folds != fold
            rows = torch.full((1, int(kept.sum())), 1 / int(kept.sum()), dtype=torch.float64)
            start = torch.zeros(1, shape[2], shape[1] + 1, dtype=torch.float64)
            solution, _ = logistic_module._solve(
                inputs[kept], onehot[kept], rows, strength, start, 1000, tolerance=1e-9
            )
            logits = inputs[~kept] @ solution[0].T
            total += F.cross_entropy(logits, targets[~kept], reduction="sum").item()
        assert fit.cv_losses[strength] == pytest.approx(total / len(x), rel=1e-3)


def test_strength_with_the_least_loss_is_taken() -> None:
    features, targets = draw(60, 20, 3, distance=0.5)
    fit = logistic(features, targets, 3)
    assert tuple(fit.cv_losses) == LOGISTIC_STRENGTHS
    assert fit.cv_losses[fit.strength] == min(fit.cv_losses.values())
    assert LOGISTIC_STRENGTHS[0] > fit.strength > LOGISTIC_STRENGTHS[-1]
    again = logistic(features, targets, 3, strength=fit.strength)
    assert torch.equal(fit.weight, again.weight)
    assert gradient_norm(fit, features, targets, fit.strength) < 3e-6


def test_large_problems_are_cross_validated_fold_by_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets = draw(60, 8, 3, distance=0.5)
    together = logistic(features, targets, 3)
    monkeypatch.setattr(logistic_module, "MAX_JOINT_SIZE", 0)
    apart = logistic(features, targets, 3)
    assert apart.strength == together.strength
    assert apart.cv_losses == pytest.approx(together.cv_losses, rel=1e-3)


def test_seed_rules_the_folds_alone() -> None:
    features, targets = draw(60, 20, 3, distance=0.5)
    first, other = (logistic(features, targets, 3, seed=seed) for seed in (0, 1))
    assert first.cv_losses != other.cv_losses
    first, other = (logistic(features, targets, 3, seed=seed, strength=0.1) for seed in (0, 1))
    assert torch.equal(first.weight, other.weight)


@pytest.mark.parametrize(
    ("counts", "num_folds", "expected"),
    [((20, 11), 5, 5), ((3, 2), 5, 3), ((2, 2), 5, 2), ((7, 1), 5, 5), ((50, 2), 5, 5)],
)
def test_folds_are_even_and_leave_of_each_class_something_to_fit(
    counts: tuple[int, int], num_folds: int, expected: int
) -> None:
    targets = torch.tensor([0] * counts[0] + [1] * counts[1])
    folds = logistic_module._assign_folds(targets, num_folds, 0)
    assert int(folds.max()) + 1 == expected
    sizes = torch.bincount(folds[folds >= 0], minlength=expected)
    assert sizes.max() - sizes.min() <= 1
    for index, count in enumerate(counts):
        members = folds[targets == index]
        assert (members == -1).tolist() == [count == 1] * count
        if count > 1:
            assert torch.bincount(members).max() < count


def test_only_picture_of_a_class_is_never_left_out() -> None:
    features, targets = draw(31, 4, 2, distance=3)
    targets[:] = 0
    targets[7], targets[20:] = 1, 2
    fit = logistic(features, targets, 3)
    assert len(fit.cv_losses) == len(LOGISTIC_STRENGTHS)
    assert all(loss < 2 for loss in fit.cv_losses.values())


def test_without_anything_to_leave_out_the_strength_is_the_default() -> None:
    features, targets = draw(3, 4, 3)
    fit = logistic(features, targets, 3)
    assert (fit.strength, fit.cv_losses) == (logistic_module.DEFAULT_STRENGTH, {})
    assert accuracy(fit, features, targets) == 1


def test_iterations_are_cut_off() -> None:
    features, targets = draw(60, 20, 3)
    fit = logistic(features, targets, 3, strength=0.001, max_iterations=2)
    assert fit.num_iterations == 2
    assert fit.weight.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_folds": 1}, "`num_folds` should be an integer of at least 2, found 1."),
        ({"max_iterations": 0}, "`max_iterations` should be an integer of at least 1, found 0."),
        ({"seed": -1}, "`seed` should be an integer from 0 to 4294967295, found -1."),
    ],
)
def test_option_that_cannot_work_is_an_error(options: dict[str, Any], message: str) -> None:
    features, targets = draw(20, 4, 2)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        logistic(features, targets, 2, **options)


def test_views_of_one_picture_are_left_out_together() -> None:
    features, targets = draw(24, 5, 3)
    groups = torch.arange(24).repeat(4)
    folds = logistic_module._assign_folds(targets.repeat(4), 5, 0, groups)
    of_pictures = logistic_module._assign_folds(targets, 5, 0)
    assert torch.equal(folds, of_pictures.repeat(4))
    alone = logistic(features, targets, 3)
    repeated = logistic(features.repeat(4, 1), targets.repeat(4), 3, groups=groups)
    assert repeated.strength == alone.strength
    assert torch.allclose(repeated.weight, alone.weight, atol=1e-4)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            torch.zeros(3),
            "`groups` should be an int64 tensor (6,), the picture of each row, found "
            "torch.float32 (3,).",
        ),
        (
            torch.zeros(6, dtype=torch.int64),
            "`groups` should name pictures, each of one class: the rows of one of them have "
            "several targets.",
        ),
    ],
)
def test_groups_that_are_no_pictures_are_an_error(groups: Tensor, message: str) -> None:
    features, targets = draw(6, 5, 3)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        logistic(features, targets, 3, groups=groups)
