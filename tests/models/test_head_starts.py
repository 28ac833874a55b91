from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - F is what everybody calls it
from torch import Tensor

from transferkit.errors import ConfigError, DataError
from transferkit.models import head_starts
from transferkit.models.head_starts import LinearStart, class_means, ridge
from transferkit.models.logistic import logistic

FITS: list[Callable[..., LinearStart]] = [class_means, ridge, logistic]


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


def relative(logits: Tensor) -> Tensor:
    """Return logits without what all classes have in common."""
    return logits - logits.mean(1, keepdim=True)


# What all fits have in common.


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(60, 5, 3), (12, 40, 3), (2, 7, 2), (30, 1, 2), (9, 8, 9)])
def test_shapes_and_types(fit: Callable[..., LinearStart], shape: tuple[int, int, int]) -> None:
    features, targets = draw(*shape, distance=8)
    start = fit(features, targets, shape[2])
    assert (start.weight.shape, start.bias.shape) == ((shape[2], shape[1]), (shape[2],))
    assert start.weight.dtype == start.bias.dtype == torch.float32
    assert not start.weight.requires_grad
    if shape[1] > 1:
        assert accuracy(start, features, targets) == 1


@pytest.mark.parametrize("fit", FITS)
def test_same_call_gives_the_same_and_leaves_its_arguments_and_the_seed_alone(
    fit: Callable[..., LinearStart],
) -> None:
    features, targets = draw(40, 6, 2)
    features = features.double()
    before = features.clone(), targets.clone(), torch.get_rng_state()
    first, second = fit(features, targets, 2), fit(features, targets, 2)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    assert torch.equal(features, before[0])
    assert torch.equal(targets, before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_are_converted(
    fit: Callable[..., LinearStart], dtype: torch.dtype
) -> None:
    features, targets = draw(40, 6, 2)
    features = features.to(dtype)
    start, expected = (fit(each, targets, 2) for each in (features, features.float()))
    torch.testing.assert_close(start.weight, expected.weight)
    torch.testing.assert_close(start.bias, expected.bias)


@pytest.mark.parametrize("fit", FITS)
def test_features_that_require_grad_are_taken(fit: Callable[..., LinearStart]) -> None:
    features, targets = draw(20, 4, 2)
    start = fit(features.requires_grad_(), targets, 2)
    assert not start.weight.requires_grad


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("factor", [1e-12, 1e12, 1e30])
def test_size_of_the_features_does_not_matter(
    fit: Callable[..., LinearStart], factor: float
) -> None:
    features, targets = draw(40, 6, 3)
    expected = logits_of(fit(features, targets, 3), features)
    features = features.double() * factor
    found = logits_of(fit(features, targets, 3), features)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("num_features", [6, 60])
def test_constant_features_change_nothing(
    fit: Callable[..., LinearStart], num_features: int
) -> None:
    features, targets = draw(40, num_features, 3)
    features[:, 2] = 0.1
    features[:, 4] = 0
    start = fit(features, targets, 3)
    assert start.weight[:, [2, 4]].abs().max() < 1e-6
    assert start.weight.isfinite().all()
    assert accuracy(start, features, targets) > 0.5


@pytest.mark.parametrize("fit", FITS)
def test_features_that_are_all_the_same_give_no_weights(fit: Callable[..., LinearStart]) -> None:
    start = fit(torch.full((6, 3), 0.1), torch.tensor([0, 0, 0, 0, 1, 1]), 2)
    assert start.weight.abs().max() == 0
    assert start.bias.isfinite().all()


@pytest.mark.parametrize("fit", FITS)
def test_two_pictures_are_enough(fit: Callable[..., LinearStart]) -> None:
    features = torch.tensor([[0.0, 1.0, 5.0], [2.0, 1.0, 4.0]])
    start = fit(features, torch.tensor([1, 0]), 2)
    logits = logits_of(start, features)
    assert logits.argmax(1).tolist() == [1, 0]
    assert logits.abs().max() < 20


@pytest.mark.parametrize("fit", FITS)
def test_class_that_is_the_same_picture_twice(fit: Callable[..., LinearStart]) -> None:
    features = torch.tensor([[0.1, 0.7], [0.1, 0.7], [0.3, 0.2], [0.3, 0.2]])
    start = fit(features, torch.tensor([0, 0, 1, 1]), 2)
    logits = logits_of(start, features)
    assert logits.argmax(1).tolist() == [0, 0, 1, 1]
    assert logits.abs().max() < 200


@pytest.mark.parametrize("fit", FITS)
def test_class_without_pictures_is_an_error(fit: Callable[..., LinearStart]) -> None:
    features, targets = draw(20, 4, 2)
    message = (
        "1 of 3 classes have no pictures (class 2). A head can only be fitted to at least one "
        "picture of each class: add pictures, or leave these classes out."
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        fit(features, targets, 3)
    message = message.replace("1 of 3", "7 of 9").replace("class 2", "class 2, 3, 4, 5, 6, ...")
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        fit(features, targets, 9)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("value", "words"), [(torch.nan, "nan"), (torch.inf, "inf"), (1e39, "1e+39")]
)
def test_feature_that_is_not_finite_is_an_error(
    fit: Callable[..., LinearStart], value: float, words: str
) -> None:
    features, targets = draw(20, 4, 2)
    features = features.double()
    features[3, 1:3] = value
    message = (
        f"`features` should be finite in float32, found {words} in row 3, column 1, and 2 such "
        f"values in all. Compute them again in float32, from a backbone whose weights are finite."
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        fit(features, targets, 2)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("features", "found"),
    [
        (torch.zeros(4, 3, dtype=torch.int64), "int64 (4, 3)"),
        (torch.zeros(4), "float32 (4,)"),
        (torch.zeros(4, 3, 2, 2), "float32 (4, 3, 2, 2)"),
        ([[0.0]], "list"),
    ],
)
def test_features_of_another_kind_are_an_error(
    fit: Callable[..., LinearStart], features: Any, found: str
) -> None:
    message = f"`features` should be a floating-point tensor (N, D), found {found}."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        fit(features, torch.zeros(4, dtype=torch.int64), 2)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (torch.zeros(3, dtype=torch.int64), "int64 (3,)"),
        (torch.zeros(4), "float32 (4,)"),
        (torch.zeros(4, 2, dtype=torch.int64), "int64 (4, 2)"),
        ([0, 1, 0, 1], "list"),
    ],
)
def test_targets_of_another_kind_are_an_error(
    fit: Callable[..., LinearStart], targets: Any, found: str
) -> None:
    message = (
        f"`targets` should be an int64 tensor (4,), one for each row of `features`, found {found}."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        fit(torch.zeros(4, 3), targets, 2)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("value", [-1, 2])
def test_target_out_of_range_is_an_error(fit: Callable[..., LinearStart], value: int) -> None:
    message = f"`targets` should lie in [0, 1] for 2 classes, found {value} in row 3."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        fit(torch.zeros(4, 3), torch.tensor([0, 1, 0, value]), 2)


@pytest.mark.parametrize("fit", FITS)
def test_one_class_and_no_pictures_are_an_error(fit: Callable[..., LinearStart]) -> None:
    message = "`num_classes` should be an integer of at least 2, found 1."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        fit(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), 1)
    message = (
        "2 of 2 classes have no pictures (class 0, 1). A head can only be fitted to at least one "
        "picture of each class: add pictures, or leave these classes out."
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        fit(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 2)


@pytest.mark.parametrize("fit", FITS)
def test_features_that_hardly_vary_are_an_error(fit: Callable[..., LinearStart]) -> None:
    features, targets = draw(20, 4, 2, distance=8)
    message = (
        "The fitted weights are beyond the range of float32, since the features vary by too "
        "little. Scale the features to values near 1."
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        fit(features.double() * 1e-42, targets, 2)


@pytest.mark.parametrize("fit", [ridge, logistic])
@pytest.mark.parametrize("strength", [0, -1.0, float("nan"), "strong", True])
def test_strength_that_cannot_work_is_an_error(
    fit: Callable[..., LinearStart], strength: Any
) -> None:
    features, targets = draw(20, 4, 2)
    message = f"`strength` should be a finite number above 0 or None, found {strength!r}."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        fit(features, targets, 2, strength=strength)


# Class means.


def test_class_means_are_the_posterior_of_round_gaussians() -> None:
    features, targets = draw(60, 5, 3)
    x = features.double()
    means = torch.stack([x[targets == index].mean(0) for index in range(3)])
    variance = (x - means[targets]).square().sum() / ((60 - 3) * 5)
    expected = -(x[:, None] - means).square().sum(-1) / (2 * variance)
    found = logits_of(class_means(features, targets, 3), features)
    torch.testing.assert_close(relative(found), relative(expected), atol=1e-4, rtol=1e-4)
    assert torch.equal(found.argmax(1), torch.cdist(x, means).argmin(1))


def test_class_means_have_equal_priors() -> None:
    features = torch.tensor([[0.0], [2.0], [0.0], [2.0], [0.0], [2.0], [10.0], [12.0]])
    start = class_means(features, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]), 2)
    between = logits_of(start, torch.tensor([[6.0]]))
    torch.testing.assert_close(between[0, 0], between[0, 1])


def test_class_means_far_from_zero() -> None:
    features, targets = draw(60, 5, 3)
    expected = logits_of(class_means(features, targets, 3), features)
    start = class_means(features.double() + 1000, targets, 3)
    torch.testing.assert_close(
        relative(logits_of(start, features.double() + 1000)), relative(expected), atol=0.01, rtol=0
    )


# Ridge regression.


@pytest.mark.parametrize("shape", [(60, 5, 3), (12, 40, 3), (20, 20, 2)])
@pytest.mark.parametrize("strength", [1e-3, 0.5, 20.0])
def test_ridge_solves_its_normal_equations(shape: tuple[int, int, int], strength: float) -> None:
    features, targets = draw(*shape)
    fit = ridge(features, targets, shape[2], strength=strength)
    x = features.double() - features.double().mean(0)
    onehot = F.one_hot(targets).double()
    penalty = strength * x.square().sum() / len(x)
    weight = torch.linalg.solve(
        x.T @ x + penalty * torch.eye(x.shape[1], dtype=torch.float64), x.T @ onehot
    )
    expected = fit.scale * (x @ weight + onehot.mean(0))
    torch.testing.assert_close(logits_of(fit, features), expected, atol=1e-5, rtol=1e-4)
    assert (fit.strength, list(fit.errors)) == (strength, [strength])


@pytest.mark.parametrize("shape", [(24, 5, 3), (12, 40, 3), (2, 3, 2)])
def test_leaving_out_in_closed_form_is_leaving_out(shape: tuple[int, int, int]) -> None:
    features, targets = draw(*shape)
    x, onehot = features.double(), F.one_hot(targets, shape[2]).double()
    penalty = torch.tensor(3.0, dtype=torch.float64)
    basis, energies = head_starts._spectrum(x - x.mean(0))
    found = head_starts._leave_one_out(basis, energies, onehot, penalty=penalty)
    for row in range(len(x)):
        others = torch.arange(len(x)) != row
        centre, shares = x[others].mean(0), onehot[others].mean(0)
        rest = x[others] - centre
        weight = torch.linalg.solve(
            rest.T @ rest + penalty * torch.eye(x.shape[1], dtype=torch.float64),
            rest.T @ onehot[others],
        )
        torch.testing.assert_close(found[row], (x[row] - centre) @ weight + shares)


@pytest.mark.parametrize("shape", [(60, 5), (30, 200)])
def test_ridge_takes_the_strength_with_the_least_error(shape: tuple[int, int]) -> None:
    features, targets = draw(*shape, 2, distance=0.3)
    fit = ridge(features, targets, 2)
    assert tuple(fit.errors) == head_starts.RIDGE_STRENGTHS
    assert fit.errors[fit.strength] == min(fit.errors.values())
    again = ridge(features, targets, 2, strength=fit.strength)
    assert torch.equal(fit.weight, again.weight)
    assert fit.errors[fit.strength] == again.errors[fit.strength]


def test_ridge_takes_the_factor_with_the_least_cross_entropy() -> None:
    features, targets = draw(60, 5, 3, distance=0.5)
    fit = ridge(features, targets, 3)
    x, onehot = features.double(), F.one_hot(targets).double()
    basis, energies = head_starts._spectrum(x - x.mean(0))
    outputs = head_starts._leave_one_out(
        basis, energies, onehot, penalty=fit.strength * energies.sum() / 60
    )
    factors = torch.linspace(1, 100, 9901, dtype=torch.float64)
    wanted = (onehot * 60 + 1) / 63
    losses = torch.stack([F.cross_entropy(factor * outputs, wanted) for factor in factors])
    assert fit.scale == pytest.approx(factors[losses.argmin()].item(), abs=0.011)


def test_ridge_of_noise_and_of_clear_classes_has_logits_within_reason() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = ridge(torch.randn(40, 300, generator=generator), torch.arange(40) % 2, 2)
    assert noise.scale == pytest.approx(1)
    features, targets = draw(200, 20, 4, distance=30)
    clear = ridge(features, targets, 4)
    assert logits_of(clear, features).abs().max() < 100
    assert F.cross_entropy(logits_of(clear, features), targets) < 0.05
