"""Batches: which pictures, in which order, under which randomness, by which workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from transferkit._checks import check_integer
from transferkit._seeding import check_seed, seeded
from transferkit.data.dataset import ImageDataset
from transferkit.errors import ConfigError, TransferkitError
from transferkit.images import Transform

MAX_AUTO_WORKERS = 4


class Batch(NamedTuple):
    """Some pictures, ready for the network.

    Args:
        images: float32 `(N, 3, H, W)`, normalised.
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


class ImageLoader:
    """Turn a data set into batches, one pass at a time.

    Order and augmentation are pure functions of (seed, epoch, index): the batches do not
    depend on the number of workers, nor on what was loaded before. Worker processes start
    at the first pass and stay for the next ones until `close()`.

    Args:
        dataset: The pictures. Its own `transform` is not applied; `transform` is.
        transform: From uint8 `(3, H, W)` to float32 `(3, h, w)`.
        batch_size: Pictures in a batch, at least 1; the last batch may be smaller.
        shuffle: Draw a new order each epoch.
        seed: Rules order and augmentation.
        num_workers: Processes that decode and transform; 0 does it in this process,
            "auto" takes one for each CPU core up to 4, and 0 where there is little to load.
        pin_memory: Put batches into page-locked memory, for a faster copy to a GPU.

    Raises:
        ConfigError: A value cannot work.

    Example:
        >>> import tempfile
        >>> from transferkit.data import load_folders
        >>> from transferkit.images import Preprocess
        >>> from transferkit.testing import make_image_folder
        >>> data = load_folders(make_image_folder(tempfile.mkdtemp()))
        >>> loader = ImageLoader(data.train, Preprocess().eval(), batch_size=4)
        >>> next(loader.batches(epoch=0)).images.shape
        torch.Size([4, 3, 224, 224])
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Transform,
        *,
        batch_size: int = 32,
        shuffle: bool = False,
        seed: int = 0,
        num_workers: int | Literal["auto"] = 0,
        pin_memory: bool = False,
    ) -> None:
        batch_size = check_integer("batch_size", batch_size, minimum=1)
        self.dataset = dataset
        self.num_workers: int = resolve_num_workers(num_workers, num_images=len(dataset))
        self._sampler = _EpochSampler(len(dataset), batch_size, shuffle, check_seed(seed))
        self._view = _SeededView(dataset.with_transform(None), transform, seed)
        self._pin_memory = pin_memory
        self._loader: DataLoader[Any] | None = None
        self._iterator: Any = None
        self._is_running = False

    def __len__(self) -> int:
        """Return the number of batches in a pass."""
        return len(self._sampler)

    def batches(self, *, epoch: int = 0) -> Iterator[Batch]:
        """Iterate over one pass.

        Args:
            epoch: Which pass it is, from 0; rules order and augmentation with the seed.

        Yields:
            The batches.

        Raises:
            ConfigError: The epoch is negative, or workers are busy with an unfinished pass.
            ImageError: A picture cannot be read; the message names its path.
        """
        check_integer("epoch", epoch, minimum=0)
        if self._is_running and self.num_workers:
            raise ConfigError(
                "A pass over this loader is not over yet, and its workers serve one at a time. "
                "Finish it, or make a loader for each."
            )
        self._is_running = True
        try:
            yield from self._pass(epoch)
        finally:
            self._is_running = False

    def _pass(self, epoch: int) -> Iterator[Batch]:
        self._sampler.epoch = epoch
        self._loader = self._loader or self._start()
        self._iterator = iter(self._loader)
        for item in self._iterator:
            if isinstance(item, TransferkitError):
                raise item
            yield item

    def close(self) -> None:
        """End the worker processes; a later pass starts new ones."""
        if self._iterator is not None and self.num_workers:
            # A pass that was cut off may still be held by its caller, and its workers with it.
            self._iterator._shutdown_workers()
        self._iterator = self._loader = None
        self._is_running = False

    def _start(self) -> DataLoader[Any]:
        return DataLoader(
            self._view,
            batch_sampler=self._sampler,
            num_workers=self.num_workers,
            collate_fn=_collate,
            pin_memory=self._pin_memory,
            persistent_workers=self.num_workers > 0,
            # Its own, or starting a pass would draw from the caller's: once for each pass
            # without workers, once in all with them, and dropout would depend on that.
            generator=torch.Generator().manual_seed(self._sampler.seed),
        )


class _EpochSampler(Sampler[list[tuple[int, int]]]):
    """Yield batches of (epoch, index): workers outlive an epoch, so the key must carry it."""

    def __init__(self, num_images: int, batch_size: int, shuffle: bool, seed: int) -> None:
        self.num_images, self.batch_size = num_images, batch_size
        self.shuffle, self.seed = shuffle, seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self.num_images)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
        epoch = self.epoch
        for start in range(0, self.num_images, self.batch_size):
            yield [(epoch, int(index)) for index in order[start : start + self.batch_size]]


class _SeededView(Dataset[Any]):
    """The pictures under a transform whose randomness (seed, epoch, index) rules."""

    def __init__(self, dataset: ImageDataset, transform: Transform, seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int] | TransferkitError:
        epoch, index = key
        try:
            image, target = self.dataset[index]
            with seeded(self.seed, epoch, index):
                return self.transform(image), target, index
        except TransferkitError as error:
            # Returned rather than raised: a worker's exception reaches the main process
            # as a traceback in a text, and the user wants the sentence alone.
            return error


def _collate(items: list[tuple[Tensor, int, int] | TransferkitError]) -> Batch | TransferkitError:
    samples = []
    for item in items:
        if isinstance(item, TransferkitError):
            return item
        samples.append(item)
    images, targets, indices = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.tensor(targets), torch.tensor(indices))


def resolve_num_workers(num_workers: int | str, *, num_images: int) -> int:
    """Turn a choice of worker processes into a number.

    Args:
        num_workers: A number of at least 0, or "auto".
        num_images: How many pictures a pass loads.

    Returns:
        The number of worker processes.

    Raises:
        ConfigError: It is neither.
    """
    if num_workers == "auto":
        # A handful of pictures is loaded before the workers are even up.
        return min(MAX_AUTO_WORKERS, _num_cores()) if num_images > 64 else 0
    try:
        return check_integer("num_workers", num_workers, minimum=0)
    except ConfigError:
        raise ConfigError(
            f'`num_workers` should be "auto" or an integer of at least 0, found {num_workers!r}.'
        ) from None


def _num_cores() -> int:
    """Return the number of cores this process may use, which may be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
