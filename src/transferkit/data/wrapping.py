"""Any PyTorch data set that yields (image, target) as an `ImageDataset`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, IterableDataset, Subset

from transferkit.data.dataset import ImageDataset, to_array
from transferkit.errors import DataError


def wrap_dataset(
    dataset: Dataset[Any],
    *,
    class_names: Sequence[str] | None = None,
    targets: Sequence[int] | None = None,
) -> ImageDataset:
    """Make an `ImageDataset` of any data set that yields (image, target).

    Images are asked for when they are used, and may be whatever `decode_image` takes: PIL
    images, arrays `(H, W, 3)` or tensors `(3, H, W)` of uint8. Leave transforms that make
    floats out of the data set.

    Args:
        dataset: A map-style data set: `len(dataset)` and `dataset[index]`.
        class_names: The names of the classes, by index; None takes `dataset.classes`, or
            the numbers "0", "1" and so on.
        targets: The class index of each picture; None takes `dataset.targets` or
            `dataset.labels`, or reads the whole data set once. A `target_transform` makes
            other targets of these, so that a data set with one is read, and its `classes`
            are not taken.

    Returns:
        The data set.

    Raises:
        DataError: It is no map-style data set, or its items or targets are something else.

    Example:
        >>> from PIL import Image
        >>> pairs = [(Image.new("RGB", (4, 3), color), label) for label, color in
        ...          enumerate(["red", "blue"])]
        >>> wrap_dataset(pairs, class_names=["red", "blue"])[1][0].shape
        torch.Size([3, 3, 4])
    """
    is_map_style = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, (IterableDataset, str, dict)) or not is_map_style:
        raise DataError(
            f"A data set should have a length and items by index, found "
            f"{type(dataset).__name__}. Order and splits need both."
        )
    found = _find_targets(dataset) if targets is None else to_array(targets)
    names: Any = _find_classes(dataset) if class_names is None else class_names
    if names is None:
        largest = int(found.max()) if found.size and found.dtype.kind in "iu" else -1
        names = [str(each) for each in range(largest + 1)]
    if isinstance(names, np.ndarray):
        names = names.tolist()
    return ImageDataset(_Images(dataset), found, class_names=names)


def _find_classes(dataset: Any) -> Sequence[str] | None:
    """Return the class names that a data set, or the one that it is a part of, knows."""
    if isinstance(dataset, Subset):
        return _find_classes(dataset.dataset)
    if getattr(dataset, "target_transform", None) is not None:
        return None
    names: Sequence[str] | None = getattr(dataset, "classes", None)
    return names


def _known_targets(dataset: Any) -> npt.NDArray[Any] | None:
    """Return the targets that a data set, or the one that it is a part of, knows."""
    if isinstance(dataset, Subset):
        known = _known_targets(dataset.dataset)
        return None if known is None else known[np.asarray(dataset.indices, dtype=np.int64)]
    if getattr(dataset, "target_transform", None) is not None:
        return None
    for attribute in ("targets", "labels"):
        found: Any = getattr(dataset, attribute, None)
        if hasattr(found, "__len__") and len(found) == len(dataset):
            return to_array(found)
    return None


def _find_targets(dataset: Any) -> npt.NDArray[Any]:
    known = _known_targets(dataset)
    if known is not None:
        return known
    targets = []
    for index in range(len(dataset)):
        item = dataset[index]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataError(
                f"Items of the data set should be (image, target), found {type(item).__name__} "
                f"at {index}."
            )
        targets.append(item[1])
    return to_array(targets)


class _Images(Sequence[Any]):
    """The pictures of a data set without their targets."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[int(index)][0]
