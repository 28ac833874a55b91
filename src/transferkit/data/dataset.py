"""Labelled pictures as a PyTorch data set, and the splits of one job."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from transferkit._checks import check_callable, check_type
from transferkit.data.paths import PathArray, shared
from transferkit.errors import DataError, ImageError
from transferkit.images import ImageSource, Transform, decode_image

Decode: TypeAlias = "Callable[[ImageSource], Tensor]"
"""A callable from whatever a picture comes as to its pixels, uint8 (3, H, W)."""


@dataclass(frozen=True)
class SkippedFile:
    """A picture or another file that was left out.

    Args:
        path: The file; for pictures that are no files their place, such as "item 17".
        reason: Why it was left out, in words.
    """

    path: Path
    reason: str


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Labelled pictures.

    An item is `(image, target)`: the decoded picture, uint8 `(3, H, W)`, or what
    `transform` makes of it, and the class index. Pictures are decoded anew at each access.

    Args:
        images: A sequence of what `decode_image` takes: paths, bytes, arrays, PIL images.
            Paths are kept as arrays, see `PathArray`.
        targets: The class index of each picture, in [0, num_classes).
        class_names: The names of the classes, by index, each once.
        transform: Applied to the decoded picture; None leaves it as it is.
        decode: Makes pixels of a picture; `Trainer` and `Predictor` put the model's
            `preprocess.decode` here.
        skipped: The files that were left out when the folder was read.

    Raises:
        DataError: The lengths differ, a target is no integer or out of range, or a class
            name is no text or there twice.

    Example:
        >>> dataset = ImageDataset(["ant.jpg", "bee.jpg"], [0, 1], class_names=["ants", "bees"])
        >>> len(dataset), dataset.class_counts
        (2, {'ants': 1, 'bees': 1})
    """

    def __init__(
        self,
        images: Sequence[ImageSource],
        targets: Sequence[int] | npt.NDArray[np.integer[Any]],
        *,
        class_names: Sequence[str],
        transform: Transform | None = None,
        decode: Decode = decode_image,
        skipped: Sequence[SkippedFile] = (),
    ) -> None:
        self.images: Sequence[ImageSource] = _check_images(images)
        self.class_names: tuple[str, ...] = check_class_names(class_names)
        self.targets: npt.NDArray[np.int64] = _check_targets(targets, len(self.class_names))
        self.transform = transform
        self.decode = decode
        self.skipped: tuple[SkippedFile, ...] = tuple(skipped)
        self._shared_targets: Tensor | None = None
        check_callable("decode", decode, "a callable from a picture to its pixels")
        if len(self.images) != len(self.targets):
            raise DataError(
                f"`images` and `targets` should have the same length, "
                f"found {len(self.images)} and {len(self.targets)}."
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        source = self.images[index]
        try:
            image = self.decode(source)
        except ImageError as error:
            if isinstance(self.images, PathArray):
                raise  # It names the path.
            raise ImageError(f"Item {index} of the data set: {error}") from error
        if self.transform is not None:
            image = self.transform(image)
        return image, int(self.targets[index])

    @property
    def paths(self) -> PathArray:
        """The files.

        Raises:
            DataError: The pictures are no files.
        """
        if not isinstance(self.images, PathArray):
            raise DataError("The pictures of this data set are no files, so they have no paths.")
        return self.images

    def name_of(self, index: int) -> str:
        """Return the path of a picture, or its place for one that is no file."""
        return str(self.images[index] if isinstance(self.images, PathArray) else f"item {index}")

    def with_transform(self, transform: Transform | None) -> ImageDataset:
        """Return the same pictures under another transform; this data set stays as it is."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def with_decode(self, decode: Decode) -> ImageDataset:
        """Return the same pictures decoded in another way; this data set stays as it is."""
        other = copy.copy(self)
        other.decode = decode
        return other

    def subset(self, indices: npt.ArrayLike) -> ImageDataset:
        """Return the pictures at these places, in their order, under the same class names.

        Raises:
            DataError: An index is no integer or out of range.
        """
        try:
            places = np.asarray(indices)
        except ValueError:  # Rows of different lengths.
            places = np.empty((0, 0))
        is_good = places.ndim == 1 and (not places.size or places.dtype.kind in "iu")
        if not is_good or (places.size and not 0 <= places.min() <= places.max() < len(self)):
            raise DataError(
                f"`indices` should be integers in [0, {len(self)}), found {indices!r:.80}."
            )
        places = places.astype(np.int64)
        other = copy.copy(self)
        images = self.images
        other.images = (
            images.take(places) if isinstance(images, PathArray) else _Chosen(images, places)
        )
        other.targets, other._shared_targets = self.targets[places], None
        return other

    @property
    def class_counts(self) -> dict[str, int]:
        """Number of pictures of each class, in the order of `class_names`."""
        counts = np.bincount(self.targets, minlength=len(self.class_names))
        return dict(zip(self.class_names, counts.tolist(), strict=True))

    def share_memory(self) -> None:
        """Move paths and targets to memory that processes share, so that none copies them."""
        if isinstance(self.images, PathArray):
            self.images.share_memory()
        if self._shared_targets is None and len(self):
            self._shared_targets = shared(self.targets)
            self.targets = self._shared_targets.numpy()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self._shared_targets is not None:
            del state["targets"]  # A view; pickled by itself it would be a copy.
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._shared_targets is not None:
            self.targets = self._shared_targets.numpy()

    def __repr__(self) -> str:
        return f"ImageDataset({len(self)} images, {len(self.class_names)} classes)"


class _Chosen(Sequence[Any]):
    """Some of the pictures of a sequence, looked up when they are asked for."""

    def __init__(self, images: Sequence[Any], places: npt.NDArray[np.int64]) -> None:
        self._images, self._places = images, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        return self._images[int(self._places[index])]


def _check_images(images: Any) -> Sequence[ImageSource]:
    is_sequence = hasattr(images, "__len__") and hasattr(images, "__getitem__")
    if isinstance(images, (str, bytes, dict)) or not is_sequence:
        raise DataError(f"`images` should be a sequence of pictures, found {images!r:.80}.")
    if isinstance(images, PathArray):
        return images
    if isinstance(images, (list, tuple)) and all(
        isinstance(each, (str, os.PathLike)) for each in images
    ):
        return PathArray.from_paths(images)
    sequence: Sequence[ImageSource] = images
    return sequence


def _check_targets(targets: Any, num_classes: int) -> npt.NDArray[np.int64]:
    given = to_array(targets)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise DataError(
            f"`targets` should be integer class indices, one for each picture, found "
            f"{given.dtype} {given.shape}."
        )
    if given.size and not 0 <= given.min() <= given.max() < num_classes:
        raise DataError(
            f"`targets` should lie in [0, {num_classes}), one index for each of "
            f"{num_classes} class names, found {given.min()} to {given.max()}."
        )
    return np.array(given, dtype=np.int64)


def to_array(targets: Any) -> npt.NDArray[Any]:
    """Return targets of any kind as an array.

    Raises:
        DataError: They are rows of different lengths.
    """
    if isinstance(targets, torch.Tensor):
        return targets.cpu().numpy()
    try:
        return np.asarray(targets)
    except ValueError as error:
        raise DataError(
            f"`targets` should be integer class indices, one for each picture, found "
            f"{targets!r:.80}."
        ) from error


def check_class_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Return class names that an artifact can carry: texts, each once.

    Raises:
        DataError: They are something else.
    """
    is_list = isinstance(class_names, Sequence) and not isinstance(class_names, (str, bytes))
    if not is_list or not all(isinstance(name, str) for name in class_names):
        raise DataError(f"`class_names` should be a list of texts, found {class_names!r:.80}.")
    twice = sorted(name for name, number in Counter(class_names).items() if number > 1)
    if twice:
        raise DataError(f"`class_names` should name each class once, found {twice} more often.")
    for name in class_names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"The class name {name!r} is no text: it has bytes that are no UTF-8. Rename "
                f"its folder."
            ) from error
    return tuple(class_names)


@dataclass(frozen=True)
class ImageSplits:
    """The splits of one job, with the same class names in each.

    Args:
        train: What is trained on.
        val: What the best epoch is chosen by.
        test: What is looked at once, at the end; None if there is no such split.

    Raises:
        ConfigError: A split is no ImageDataset.
        DataError: The class names differ between the splits, or a split is empty.
    """

    train: ImageDataset
    val: ImageDataset
    test: ImageDataset | None = None

    def __post_init__(self) -> None:
        for name in ("train", "val"):
            check_type(name, getattr(self, name), ImageDataset, "an ImageDataset")
        if self.test is not None:
            check_type("test", self.test, ImageDataset, "an ImageDataset or None")
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
