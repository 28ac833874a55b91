"""Splitting one data set: stratified, by seed, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from transferkit._checks import check_integer, check_number, check_type
from transferkit._seeding import check_seed
from transferkit.data.dataset import ImageDataset, ImageSplits
from transferkit.errors import ConfigError, DataError


def split_dataset(
    dataset: ImageDataset, *, val: float = 0.2, test: float = 0.0, seed: int = 0
) -> ImageSplits:
    """Split a data set at random, each class by the same shares.

    Of a class of n pictures, `round(n * val)` go to validation, but at least one, and
    likewise to test. Which ones depends on the seed, the class's name and n alone, so that
    a class more or less does not change the others. Within a split the pictures keep their
    order.

    Args:
        dataset: The pictures.
        val: The share of the validation split, in (0, 1).
        test: The share of the test split, in [0, 1); 0 makes none.
        seed: Rules which pictures are split off.

    Returns:
        The splits, with the same class names.

    Raises:
        ConfigError: A share is out of range, or nothing is left for training.
        DataError: A class has too few pictures for one in each split.

    Example:
        >>> dataset = ImageDataset(list("abcdefgh"), [0] * 5 + [1] * 3, class_names=["x", "y"])
        >>> split_dataset(dataset, val=0.3).describe()
        'train 5 (3 x, 2 y); val 3 (2 x, 1 y)'
    """
    check_type("dataset", dataset, ImageDataset, "an ImageDataset")
    val, test = check_shares(val, test)
    check_seed(seed)
    parts: tuple[list[Any], ...] = ([], [], [])
    needed = 3 if test else 2
    for name, members in _shuffled_classes(dataset, seed):
        if len(members) < needed:
            raise DataError(
                f"The class {name!r} has {_pictures(members)}, too few for one in each of "
                f"{needed} splits. Add pictures, or make the splits by hand."
            )
        num_test = max(1, round(len(members) * test)) if test else 0
        num_val = max(1, min(round(len(members) * val), len(members) - num_test - 1))
        num_test = min(num_test, len(members) - num_val - 1)
        cuts = [len(members) - num_val - num_test, len(members) - num_test]
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    train, held_out, last = (dataset.subset(np.sort(np.concatenate(part))) for part in parts)
    return ImageSplits(train, held_out, last if test else None)


def k_folds(dataset: ImageDataset, num_folds: int = 5, *, seed: int = 0) -> list[ImageSplits]:
    """Split a data set for cross-validation: each picture is validated on exactly once.

    Args:
        dataset: The pictures.
        num_folds: How many folds, at least 2. Each has its share of each class, to within
            one picture.
        seed: Rules which picture is in which fold.

    Returns:
        For each fold the splits with that fold as validation split.

    Raises:
        ConfigError: `num_folds` is out of range.
        DataError: A class has fewer pictures than there are folds.

    Example:
        >>> dataset = ImageDataset(list("abcdef"), [0, 0, 0, 1, 1, 1], class_names=["x", "y"])
        >>> [splits.describe() for splits in k_folds(dataset, 3)][0]
        'train 4 (2 x, 2 y); val 2 (1 x, 1 y)'
    """
    check_type("dataset", dataset, ImageDataset, "an ImageDataset")
    num_folds = check_integer("num_folds", num_folds, minimum=2)
    check_seed(seed)
    fold_of = np.empty(len(dataset), dtype=np.int64)
    first = 0
    for name, members in _shuffled_classes(dataset, seed):
        if len(members) < num_folds:
            raise DataError(
                f"The class {name!r} has {_pictures(members)}, fewer than {num_folds} folds. "
                f"Take fewer folds, or add pictures."
            )
        # Each class goes on where the one before it ended, so that the folds are even.
        fold_of[members] = (first + np.arange(len(members))) % num_folds
        first += len(members)
    return [
        ImageSplits(
            dataset.subset(np.flatnonzero(fold_of != fold)),
            dataset.subset(np.flatnonzero(fold_of == fold)),
        )
        for fold in range(num_folds)
    ]


def _shuffled_classes(
    dataset: ImageDataset, seed: int
) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """Yield each class's name and the places of its pictures, shuffled."""
    by_class = np.argsort(dataset.targets, kind="stable")
    ends = np.cumsum(np.bincount(dataset.targets, minlength=len(dataset.class_names)))
    for name, members in zip(dataset.class_names, np.split(by_class, ends[:-1]), strict=True):
        rng = np.random.default_rng((seed, *name.encode()))
        yield name, rng.permutation(members)


def _pictures(members: npt.NDArray[np.int64]) -> str:
    return f"{len(members)} picture{'s' * (len(members) != 1)}"


def check_shares(val: Any, test: Any) -> tuple[float, float]:
    """Return the shares of the validation and the test split.

    Raises:
        ConfigError: One is out of range, or nothing is left for training.
    """
    val = check_number("val", val, lambda share: 0 < share < 1, "in (0, 1), the share to split off")
    test = check_number(
        "test", test, lambda share: 0 <= share < 1, "in [0, 1), the share to split off"
    )
    if val + test >= 1:
        raise ConfigError(
            f"`val` and `test` should leave something for training, found {val:g} and {test:g}."
        )
    return val, test
