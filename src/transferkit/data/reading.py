"""From a key to an image of a batch: decode, keep, augment under the key's own seed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from transferkit._seeding import generator_for, seeded
from transferkit.data.cache import PixelCache
from transferkit.data.dataset import ImageDataset
from transferkit.data.sampling import Key
from transferkit.errors import ConfigError, TransferkitError
from transferkit.images import Transform, is_seedable


class Batch(NamedTuple):
    """Some pictures, ready for the network.

    Args:
        images: float32 `(N, C, H, W)`, normalised; uint8 where the loader's transform leaves
            that to the device.
        targets: int64 `(N,)`, class indices.
        indices: int64 `(N,)`, the pictures' places in their data set.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor

    def to(
        self,
        device: torch.device,
        *,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> Batch:
        """Return the batch with images and targets on `device`; the indices stay."""
        return Batch(
            self.images.to(device, non_blocking=True, memory_format=memory_format),
            self.targets.to(device, non_blocking=True),
            self.indices,
        )


class Failure(NamedTuple):
    """A picture that could not be made an image.

    Args:
        item: Its place in the data set.
        error: Why.
    """

    item: int
    error: TransferkitError


class Loaded(NamedTuple):
    """What became of the keys of a batch.

    Args:
        batch: The images, without those that failed; None where all did.
        failures: Those that failed, in their order.
    """

    batch: Batch | None
    failures: list[Failure]


class Reader(Dataset[Any]):
    """The pictures of a data set under a transform whose randomness (seed, key) rules.

    Args:
        dataset: The pictures.
        transform: From uint8 `(C, H, W)` to `(C, h, w)`, float32 or uint8.
        seed: The seed.
        cache: Keeps decoded pictures; None decodes them anew.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Transform,
        *,
        seed: int,
        cache: PixelCache | None = None,
    ) -> None:
        self.dataset: ImageDataset = dataset.with_transform(None)
        self.transform: Transform = transform
        self.seed: int = seed
        self.cache: PixelCache | None = cache
        self.is_seedable: bool = is_seedable(transform)

    def pixels(self, index: int) -> Tensor:
        """Return the decoded picture, the channels last in memory whatever decoded it."""
        kept = self.cache.get(index) if self.cache is not None else None
        if kept is not None:
            return kept
        pixels = self.dataset[index][0]
        # One layout, so that a kept picture and a fresh one take the same way to the bit.
        pixels = pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        if self.cache is not None:
            self.cache.put(index, pixels)
        return pixels

    def view(self, pixels: Tensor, key: Key) -> Tensor:
        """Apply the transform under the key's seed."""
        entropy = (self.seed, *key) if key.repeat else (self.seed, key.epoch, key.item)
        if self.is_seedable:
            return self.transform(pixels, generator=generator_for(*entropy))  # type: ignore[call-arg]
        with seeded(*entropy):
            return self.transform(pixels)

    def __getitems__(self, keys: Sequence[Key]) -> Loaded:
        """Read a batch; a worker process is asked for whole batches."""
        builder = BatchBuilder(self, keys)
        for row in range(len(keys)):
            builder.read(row)
        return builder.build()


class BatchBuilder:
    """Put a batch together, row by row, by one thread or several.

    Args:
        reader: Reads the pictures.
        keys: The pictures of the batch.
        pin_memory: Put the images into page-locked memory.
    """

    def __init__(self, reader: Reader, keys: Sequence[Key], *, pin_memory: bool = False) -> None:
        self.reader: Reader = reader
        self.keys: Sequence[Key] = keys
        self.failures: dict[int, Failure] = {}
        self._pin_memory = pin_memory
        self._images: Tensor | None = None
        self._lock = threading.Lock()

    def read(self, row: int) -> None:
        """Read the picture of a row and put its image there."""
        pixels = self.decode(row)
        if pixels is not None:
            self.transform(row, pixels)

    def decode(self, row: int) -> Tensor | None:
        """Return the pixels of a row's picture; None where that failed, which is noted."""
        try:
            return self.reader.pixels(self.keys[row].item)
        except TransferkitError as error:
            # Noted rather than raised: a worker process's exception would reach the user as
            # a traceback in a text, and whether to skip is decided elsewhere.
            self.failures[row] = Failure(self.keys[row].item, error)
            return None

    def transform(self, row: int, pixels: Tensor) -> None:
        """Put the image of a row's pixels there."""
        try:
            image = self.reader.view(pixels, self.keys[row])
            self._allocate(image)[row].copy_(image)
        except TransferkitError as error:
            self.failures[row] = Failure(self.keys[row].item, error)

    def _allocate(self, image: Tensor) -> Tensor:
        """Return the room for all images, made when the first one comes."""
        if not isinstance(image, Tensor):
            raise ConfigError(
                f"The transform should return a tensor (C, h, w), found {type(image).__name__}."
            )
        with self._lock:
            if self._images is None:
                shape = (len(self.keys), *image.shape)
                is_channels_last = image.dim() == 3 and image.stride(0) == 1 != image.stride(2)
                layout = torch.channels_last if is_channels_last else torch.contiguous_format
                self._images = torch.empty(
                    shape, dtype=image.dtype, memory_format=layout, pin_memory=self._pin_memory
                )
        if image.shape != self._images.shape[1:] or image.dtype != self._images.dtype:
            raise ConfigError(
                f"The transform should return images of one shape and dtype, found "
                f"{_describe(self._images[0])} and {_describe(image)}."
            )
        return self._images

    def build(self) -> Loaded:
        """Return the batch of those rows that did not fail, and the failures."""
        failures = [self.failures[row] for row in sorted(self.failures)]
        if self._images is None or len(failures) == len(self.keys):
            return Loaded(None, failures)
        images, indices = self._images, torch.tensor([key.item for key in self.keys])
        if failures:
            rows = [row for row in range(len(self.keys)) if row not in self.failures]
            images, indices = images[rows], indices[rows]
        targets = torch.from_numpy(self.reader.dataset.targets[indices.numpy()])
        return Loaded(Batch(images, targets, indices), failures)


def _describe(image: Tensor) -> str:
    return f"{str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}"
