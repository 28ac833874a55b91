"""Labelled pictures on disk as a PyTorch data set, and the splits of one job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Dataset

from transferkit.errors import DataError
from transferkit.images import Transform, decode_image


@dataclass(frozen=True)
class SkippedFile:
    """A file that was found in a class folder and left out.

    Args:
        path: The file.
        reason: Why it was left out, in words.
    """

    path: Path
    reason: str


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Labelled pictures on disk.

    An item is `(image, target)`: the decoded picture, uint8 `(3, H, W)`, or what
    `transform` makes of it, and the class index. Pictures are decoded anew at each access.

    Args:
        paths: The files.
        targets: The class index of each file, in [0, num_classes).
        class_names: The names of the classes, by index.
        transform: Applied to the decoded picture; None leaves it as it is.
        skipped: The files that were left out when the folder was read.

    Raises:
        DataError: The lengths differ, or a target is no integer or out of range.

    Example:
        >>> dataset = ImageDataset(["ant.jpg", "bee.jpg"], [0, 1], class_names=["ants", "bees"])
        >>> len(dataset), dataset.class_counts
        (2, {'ants': 1, 'bees': 1})
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        targets: Sequence[int],
        *,
        class_names: Sequence[str],
        transform: Transform | None = None,
        skipped: Sequence[SkippedFile] = (),
    ) -> None:
        self.paths: list[Path] = [Path(path) for path in paths]
        given = np.asarray(targets)
        if given.size and not np.issubdtype(given.dtype, np.integer):
            raise DataError(f"`targets` should be integer class indices, found {given.dtype}.")
        self.targets: npt.NDArray[np.int64] = given.astype(np.int64)
        self.class_names: tuple[str, ...] = tuple(class_names)
        self.transform = transform
        self.skipped: tuple[SkippedFile, ...] = tuple(skipped)
        if len(self.paths) != len(self.targets):
            raise DataError(
                f"`paths` and `targets` should have the same length, "
                f"found {len(self.paths)} and {len(self.targets)}."
            )
        if len(self.targets) and not (
            self.targets.min() >= 0 and self.targets.max() < len(self.class_names)
        ):
            raise DataError(
                f"`targets` should lie in [0, {len(self.class_names)}), one index for each of "
                f"{len(self.class_names)} class names, found {self.targets.min()} "
                f"to {self.targets.max()}."
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = decode_image(self.paths[index])
        if self.transform is not None:
            image = self.transform(image)
        return image, int(self.targets[index])

    def with_transform(self, transform: Transform | None) -> ImageDataset:
        """Return the same pictures under another transform; this data set stays as it is."""
        return ImageDataset(
            self.paths,
            self.targets.tolist(),
            class_names=self.class_names,
            transform=transform,
            skipped=self.skipped,
        )

    def name_of(self, index: int) -> str:
        """Return the path of a picture, for a message."""
        return str(self.paths[index])

    @property
    def class_counts(self) -> dict[str, int]:
        """Number of pictures of each class, in the order of `class_names`."""
        counts = np.bincount(self.targets, minlength=len(self.class_names))
        return dict(zip(self.class_names, counts.tolist(), strict=True))

    def __repr__(self) -> str:
        return f"ImageDataset({len(self)} images, {len(self.class_names)} classes)"


@dataclass(frozen=True)
class ImageSplits:
    """The splits of one job, with the same class names in each.

    Args:
        train: What is trained on.
        val: What the best epoch is chosen by.
        test: What is looked at once, at the end; None if there is no such split.

    Raises:
        DataError: The class names differ between the splits, or a split is empty.
    """

    train: ImageDataset
    val: ImageDataset
    test: ImageDataset | None = None

    def __post_init__(self) -> None:
        for name, split in self.named().items():
            if split.class_names != self.train.class_names:
                raise DataError(
                    f"The splits should have the same class names in the same order: train has "
                    f"{list(self.train.class_names)}, {name} has {list(split.class_names)}."
                )
            if not len(split):
                raise DataError(f"The {name} split has no pictures.")

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, by index."""
        return self.train.class_names

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    def named(self) -> dict[str, ImageDataset]:
        """Return the splits by name, "train" first, without those that are absent."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}

    def describe(self) -> str:
        """Return the counts of each split and class in one line, with what was left out."""
        parts = []
        for name, split in self.named().items():
            counts = ", ".join(f"{count} {label}" for label, count in split.class_counts.items())
            number = len(split.skipped)
            skipped = f", {number} file{'s' * (number != 1)} skipped" if number else ""
            parts.append(f"{name} {len(split)} ({counts}{skipped})")
        return "; ".join(parts)
