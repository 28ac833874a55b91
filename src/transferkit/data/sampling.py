"""Which pictures are seen in an epoch, and in which order: a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transferkit.data.dataset import ImageDataset
from transferkit.errors import DataError

Order: TypeAlias = "tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]"
"""The indices of an epoch's pictures, and how often each was seen in the epoch before it."""


class Key(NamedTuple):
    """What an augmented view of a picture is a pure function of, together with the seed.

    Args:
        epoch: The epoch.
        item: The picture's place in its data set.
        repeat: How often the picture was seen in this epoch before; above 0 only where
            rare classes are drawn more often.
    """

    epoch: int
    item: int
    repeat: int = 0


class EpochSampler:
    """Give the keys of an epoch, batch by batch.

    Args:
        targets: Class indices, int64 `(N,)`.
        batch_size: Pictures in a batch; the last batch may be smaller.
        shuffle: Draw a new order each epoch.
        balanced: Show each class equally often.
        seed: Rules the order together with the epoch.
        part: Which part of each batch to give, from 0, and of how many; a part may be empty.
    """

    def __init__(
        self,
        targets: npt.NDArray[np.int64],
        *,
        batch_size: int,
        shuffle: bool,
        balanced: bool,
        seed: int,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.part: tuple[int, int] = part
        self.targets: npt.NDArray[np.int64] = targets
        self.batch_size: int = batch_size
        self.shuffle: bool = shuffle
        self.balanced: bool = balanced
        self.seed: int = seed

    def __len__(self) -> int:
        return -(-len(self.targets) // self.batch_size)

    def batches(self, epoch: int, *, start: int = 0) -> Iterator[list[Key]]:
        """Yield the keys of each batch of an epoch from batch number `start` on."""
        indices, repeats = self.order(epoch)
        for first in range(start * self.batch_size, len(indices), self.batch_size):
            size = min(self.batch_size, len(indices) - first)
            part = part_of(range(first, first + size), self.part)
            yield [
                Key(epoch, index, repeat)
                for index, repeat in zip(
                    indices[part].tolist(), repeats[part].tolist(), strict=True
                )
            ]

    def order(self, epoch: int) -> Order:
        """Return the pictures of an epoch in their order."""
        count = len(self.targets)
        rng = np.random.default_rng((self.seed, epoch))
        if self.balanced:
            return balanced_order(self.targets, rng)
        indices = np.arange(count)
        if self.shuffle:
            indices = rng.permutation(indices)
        return indices, np.zeros(count, dtype=np.int64)


def part_of(places: range, part: tuple[int, int]) -> slice:
    """Return the part of a run of places that one of several processes takes.

    Args:
        places: The places, one after the other.
        part: Which part, from 0, and of how many.

    Example:
        >>> [part_of(range(10, 15), (number, 2)) for number in range(2)]
        [slice(10, 12, None), slice(12, 15, None)]
    """
    number, count = part
    first, last = (places.start + len(places) * each // count for each in (number, number + 1))
    return slice(first, last)


def balanced_order(targets: npt.NDArray[np.int64], rng: np.random.Generator) -> Order:
    """Draw as many pictures as there are, each class equally often (to within one).

    A rare class's pictures come round again and again, a common class's pictures take
    turns over the epochs; no picture is seen twice before all of its class were seen once.
    Classes without pictures are passed over.

    Args:
        targets: Class indices, int64 `(N,)`.
        rng: Rules everything. It is advanced.

    Returns:
        Indices int64 `(N,)`, and for each how often it came before.
    """
    if not len(targets):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    classes = np.unique(targets)
    shares = np.full(len(classes), len(targets) // len(classes))
    shares[rng.permutation(len(classes))[: len(targets) - int(shares.sum())]] += 1
    indices, repeats = [], []
    for label, share in zip(classes, shares, strict=True):
        members = np.flatnonzero(targets == label)
        num_rounds = -(-int(share) // len(members))
        rounds = [rng.permutation(members) for _ in range(num_rounds)]
        indices.append(np.concatenate(rounds)[:share])
        repeats.append(np.repeat(np.arange(num_rounds), len(members))[:share])
    mix = rng.permutation(len(targets))
    return np.concatenate(indices)[mix], np.concatenate(repeats)[mix]


def class_weights(dataset: ImageDataset) -> Tensor:
    """Compute a weight for each class that makes all classes count the same in the loss.

    Args:
        dataset: The training pictures. Each class needs at least one.

    Returns:
        float32 `(C,)`, `N / (C * N_c)`: 1 for each class where they are balanced. It fits
        `torch.nn.CrossEntropyLoss(weight=...)`.

    Raises:
        DataError: A class has no pictures.

    Example:
        >>> images = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
        >>> dataset = ImageDataset(images, [0, 0, 0, 1], class_names=["ants", "bees"])
        >>> class_weights(dataset)
        tensor([0.6667, 2.0000])

    References:
        The "balanced" heuristic of King and Zeng, Logistic Regression in Rare Events Data,
        2001, https://doi.org/10.1093/oxfordjournals.pan.a004868
    """
    counts = np.asarray(list(dataset.class_counts.values()))
    empty = [name for name, count in dataset.class_counts.items() if not count]
    if empty:
        raise DataError(
            f"Class weights need at least one picture of each class, found none of "
            f"{', '.join(map(repr, empty))}."
        )
    weights = counts.sum() / (len(counts) * counts)
    return torch.tensor(weights, dtype=torch.float32)
