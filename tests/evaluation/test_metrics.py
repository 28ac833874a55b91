from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transferkit.errors import ConfigError
from transferkit.evaluation import (
    accuracy,
    class_accuracies,
    confusion_matrix,
    top_k_accuracy,
)


@st.composite
def classified(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    num_images, num_classes = draw(st.integers(1, 30)), draw(st.integers(2, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Distinct values in each row, so that no tie hides a difference from NumPy.
    logits = rng.permuted(np.tile(np.arange(num_classes), (num_images, 1)), axis=1)
    return logits.astype(np.float32), rng.integers(0, num_classes, num_images)


@given(classified())
def test_accuracy_agrees_with_numpy(case: tuple[np.ndarray, np.ndarray]) -> None:
    logits, targets = case
    expected = float(np.mean(logits.argmax(axis=1) == targets))
    assert accuracy(torch.tensor(logits), torch.tensor(targets)) == pytest.approx(expected)


@given(classified(), st.data())
def test_top_k_agrees_with_numpy(case: tuple[np.ndarray, np.ndarray], data: st.DataObject) -> None:
    logits, targets = case
    k = data.draw(st.integers(1, logits.shape[1]))
    ranked = np.argsort(-logits, axis=1)[:, :k]
    expected = float(np.mean([target in row for target, row in zip(targets, ranked, strict=True)]))
    found = top_k_accuracy(torch.tensor(logits), torch.tensor(targets), k=k)
    assert found == pytest.approx(expected)


@given(classified())
def test_confusion_matrix_agrees_with_counting(case: tuple[np.ndarray, np.ndarray]) -> None:
    logits, targets = case
    num_classes = logits.shape[1]
    predictions = logits.argmax(axis=1)
    expected = np.zeros((num_classes, num_classes), dtype=int)
    for target, prediction in zip(targets, predictions, strict=True):
        expected[target, prediction] += 1
    found = confusion_matrix(
        torch.tensor(predictions), torch.tensor(targets), num_classes=num_classes
    )
    assert np.array_equal(found, expected)


def test_class_accuracies_of_an_absent_class_is_nan() -> None:
    shares = class_accuracies(np.array([[3, 1], [0, 0]]))
    assert shares[0] == 0.75
    assert np.isnan(shares[1])


def test_equal_logits_go_to_the_lowest_index() -> None:
    assert accuracy(torch.zeros(1, 3), torch.tensor([0])) == 1.0


def test_shapes_are_checked() -> None:
    message = (
        "Accuracy needs logits (N, C) and targets (N,) with N of at least 1, found (2, 3) and (3,)."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        accuracy(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("k", [0, 4])
def test_k_is_checked(k: int) -> None:
    message = f"`k` should lie in [1, 3], found {k}."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        top_k_accuracy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), k=k)


def test_confusion_checks_shapes() -> None:
    message = "Predictions and targets should both be (N,), found (2,) and (3,)."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        confusion_matrix(torch.zeros(2).long(), torch.zeros(3).long(), num_classes=2)


def test_confusion_checks_the_range() -> None:
    message = "`predictions` should lie in [0, 2), found 0 to 2."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        confusion_matrix(torch.tensor([0, 2]), torch.tensor([0, 1]), num_classes=2)
