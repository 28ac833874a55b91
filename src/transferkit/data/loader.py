"""Batches: which pictures, in which order, under which randomness, by which workers."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from transferkit._checks import check_integer, check_number, check_type
from transferkit._seeding import check_seed
from transferkit.data.cache import LocalCache, PixelCache, SharedCache
from transferkit.data.dataset import ImageDataset, SkippedFile
from transferkit.data.reading import Batch, Loaded, Reader
from transferkit.data.sampling import EpochSampler, Key, Order
from transferkit.data.workers import NoWorkers, ProcessWorkers, ThreadWorkers, Workers
from transferkit.errors import ConfigError, DataError, ImageError
from transferkit.images import Transform, is_seedable

MAX_AUTO_WORKERS = 4
DEFAULT_MAX_SKIPPED = 0.05

WorkerType: TypeAlias = Literal["auto", "thread", "process", "fork", "spawn", "forkserver"]
OnError: TypeAlias = Literal["raise", "skip"]


class ImageLoader:
    """Turn a data set into batches, one pass at a time.

    Order and augmentation are pure functions of (seed, epoch, index): the batches are the
    same to the bit for any number and any type of workers, and do not depend on what was
    loaded before. Workers start at the first pass and stay for the next ones until `close()`.

    Args:
        dataset: The pictures. Its own `transform` is not applied; `transform` is.
        transform: From uint8 `(C, H, W)` to float32 `(C, h, w)`; or to uint8, where
            `Preprocess.normalize` is to follow for whole batches.
        batch_size: Pictures in a batch, at least 1; the last batch may be smaller.
        shuffle: Draw a new order each epoch.
        balanced: Draw each class equally often, N pictures in all; needs `shuffle`.
        seed: Rules order and augmentation.
        num_workers: Threads or processes that decode and transform; 0 does it in the
            calling thread, "auto" takes one for each CPU core up to 4, and 0 where there is
            little to load.
        worker_type: "thread"; "process" started as Python does by default; or processes
            started by "fork", "spawn" or "forkserver". "auto" takes threads where the
            transform may run in them (`transferkit.images.is_seedable`), else processes.
            Other transforms run one at a time under "thread".
        cache_bytes: Keep decoded pictures in memory up to so many bytes, for the passes
            after the first. The pixels are the same.
        on_error: "raise" ends a pass at a picture that cannot be read; "skip" leaves it
            out of its batch and lists it in `skipped`. It is never replaced by another.
        max_skipped: The share of pictures, in [0, 1], beyond which skipping is an error.
        pin_memory: Put batches into page-locked memory, for a faster copy to a GPU.
        part: Of each batch give only one part, by its number from 0 and their number, as for
            one of several processes; a part without pictures is left out.

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
        balanced: bool = False,
        seed: int = 0,
        num_workers: int | Literal["auto"] = 0,
        worker_type: WorkerType = "auto",
        cache_bytes: int = 0,
        on_error: OnError = "raise",
        max_skipped: float = DEFAULT_MAX_SKIPPED,
        pin_memory: bool = False,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        check_type("dataset", dataset, ImageDataset, "an ImageDataset")
        batch_size = check_integer("batch_size", batch_size, minimum=1)
        if balanced and not shuffle:
            raise ConfigError("`balanced=True` draws the pictures, so it needs `shuffle=True`.")
        self.dataset = dataset
        self.transform: Transform = transform
        self.num_workers: int = resolve_num_workers(num_workers, num_images=len(dataset))
        self.worker_type: str = resolve_worker_type(worker_type, transform)
        self.cache_bytes: int = check_integer("cache_bytes", cache_bytes, minimum=0)
        self.on_error: OnError = check_on_error(on_error)
        self.max_skipped: float = check_share("max_skipped", max_skipped)
        self._failures: dict[int, str] = {}
        self._pin_memory = pin_memory
        self._sampler = EpochSampler(
            dataset.targets,
            batch_size=batch_size,
            shuffle=shuffle,
            balanced=balanced,
            seed=check_seed(seed),
            part=part,
        )
        self._cache: PixelCache | None = None
        self._workers: Workers | None = None
        self._pass: object = None

    def __len__(self) -> int:
        """Return the number of batches in a pass."""
        return len(self._sampler)

    @property
    def skipped(self) -> tuple[SkippedFile, ...]:
        """The pictures that `on_error="skip"` left out so far, in the data set's order."""
        return tuple(
            SkippedFile(Path(self.dataset.name_of(index)), self._failures[index])
            for index in sorted(self._failures)
        )

    def batches(self, *, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Iterate over one pass.

        Args:
            epoch: Which pass it is, from 0; rules order and augmentation with the seed.
            start: The number of the batch to begin with, from 0, for going on in the middle
                of an epoch. The batches before it are not loaded.

        Returns:
            An iterator over the batches. A batch without any readable picture is left out.

        Raises:
            ConfigError: The epoch or the start is out of range, or worker processes are
                busy with an unfinished pass.
            ImageError: A picture cannot be read; the message names its path.
            DataError: More pictures were skipped than `max_skipped` allows.
            ProcessError: A worker process ended before its batch was read.
        """
        return (batch for _, batch in self.numbered_batches(epoch=epoch, start=start))

    def numbered_batches(self, *, epoch: int = 0, start: int = 0) -> Iterator[tuple[int, Batch]]:
        """Iterate over one pass as `batches` does, with each batch's number in the epoch.

        Args:
            epoch: As for `batches`.
            start: Likewise.

        Returns:
            An iterator over numbers, from `start`, and batches. The number of a batch without
            any readable picture is left out.

        Raises:
            ConfigError: As for `batches`.
            ImageError: Likewise.
            DataError: Likewise.
            ProcessError: Likewise.
        """
        epoch = check_integer("epoch", epoch, minimum=0)
        start = check_integer("start", start, minimum=0)
        if start > len(self):
            raise ConfigError(
                f"`start` should be at most {len(self)}, the number of batches, found {start}."
            )
        self._check_idle()
        return self._batches(epoch, start)

    def order(self, epoch: int) -> Order:
        """Return the pictures of an epoch in their order: a pure function of (seed, epoch).

        Args:
            epoch: Which pass it is, from 0.

        Returns:
            Indices int64 `(N,)`, and for each how often it came before in this epoch.
        """
        return self._sampler.order(epoch)

    @property
    def balanced(self) -> bool:
        """Whether each class is drawn equally often."""
        return self._sampler.balanced

    def read(self, indices: Sequence[int], *, epoch: int) -> Batch:
        """Read some pictures as a pass over this epoch would show them, in this thread.

        Args:
            indices: Their places in the data set, at least one.
            epoch: The epoch, from 0.

        Returns:
            The batch, without pictures that `on_error="skip"` leaves out.

        Raises:
            ImageError: A picture cannot be read.
            DataError: None of them could be read.
        """
        reader = Reader(self.dataset, self.transform, seed=self._sampler.seed, cache=None)
        batch = self._admit(reader.__getitems__([Key(epoch, index) for index in indices]))
        if batch is None:
            raise DataError(f"None of the {len(indices)} pictures can be read.")
        return batch

    def _check_idle(self) -> None:
        if self._pass is not None and self._has_processes:
            raise ConfigError(
                "A pass over this loader is not over yet, and its worker processes serve one "
                "at a time. Finish it, or make a loader for each."
            )

    @property
    def _has_processes(self) -> bool:
        return self.num_workers > 0 and self.worker_type != "thread"

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[int, Batch]]:
        self._check_idle()
        this = self._pass = object()
        if self._workers is None:
            self._workers = self._start_workers()
        loaded = self._workers.run(epoch, start)
        try:
            for number, each in enumerate(loaded, start):
                batch = self._admit(each)
                if batch is not None:
                    yield number, batch
                if self._pass is not this and self._has_processes:
                    raise ConfigError("The loader was closed during this pass. Start a new one.")
        finally:
            loaded.close()  # type: ignore[attr-defined]
            if self._pass is this:
                self._pass = None

    def _admit(self, loaded: Loaded) -> Batch | None:
        """Note what was skipped, or raise it."""
        for failure in loaded.failures:
            if self.on_error == "raise" or not isinstance(failure.error, ImageError):
                raise failure.error
            self._failures.setdefault(failure.item, str(failure.error))
        if len(self._failures) > self.max_skipped * len(self.dataset):
            raise self._too_many()
        return loaded.batch

    def _too_many(self) -> DataError:
        first = self._failures[min(self._failures)]
        return DataError(
            f"{len(self._failures)} of {len(self.dataset)} pictures cannot be read, more than "
            f"the share of {self.max_skipped:g} that `max_skipped` allows. The first: {first}"
        )

    def forget_skipped(self) -> None:
        """Forget what was skipped so far: it may have been mended since."""
        self._failures.clear()

    def close(self) -> None:
        """End the workers and forget kept pictures; a later pass starts anew."""
        if self._workers is not None:
            self._workers.close()
        if self._cache is not None:
            self._cache.close()
        self._workers = self._cache = self._pass = None

    def _start_workers(self) -> Workers:
        pin = self._pin_memory
        if self.cache_bytes:
            self._cache = self._make_cache()
        reader = Reader(self.dataset, self.transform, seed=self._sampler.seed, cache=self._cache)
        if not self.num_workers:
            return NoWorkers(reader, self._sampler, pin_memory=pin)
        count = self.num_workers
        if self.worker_type == "thread":
            return ThreadWorkers(reader, self._sampler, num_workers=count, pin_memory=pin)
        return ProcessWorkers(
            reader,
            self._sampler,
            num_workers=count,
            start_method=_start_method(self.worker_type),
            pin_memory=pin,
        )

    def _make_cache(self) -> PixelCache:
        if not self._has_processes:
            return LocalCache(self.cache_bytes)
        context = multiprocessing.get_context(_start_method(self.worker_type))
        return SharedCache(len(self.dataset), self.cache_bytes, context)


def _start_method(worker_type: str) -> str | None:
    return None if worker_type == "process" else worker_type


def resolve_num_workers(num_workers: int | str, *, num_images: int) -> int:
    """Turn a choice of workers into a number.

    Args:
        num_workers: A number of at least 0, or "auto".
        num_images: How many pictures a pass loads.

    Returns:
        The number of threads or processes.

    Raises:
        ConfigError: It is neither.
    """
    if num_workers == "auto":
        # A handful of pictures is loaded before the workers are even up.
        return min(MAX_AUTO_WORKERS, num_cores()) if num_images > 64 else 0
    try:
        return check_integer("num_workers", num_workers, minimum=0)
    except ConfigError:
        raise ConfigError(
            f'`num_workers` should be "auto" or an integer of at least 0, found {num_workers!r}.'
        ) from None


def resolve_worker_type(worker_type: str, transform: Transform) -> str:
    """Turn a choice of the workers' type into one that is not "auto".

    Raises:
        ConfigError: There is no such type on this system.
    """
    if worker_type == "auto":
        return "thread" if is_seedable(transform) else "process"
    known = ["auto", "thread", "process", *multiprocessing.get_all_start_methods()]
    if worker_type not in known:
        raise ConfigError(
            f"`worker_type` should be one of {', '.join(map(repr, known))} on this system, "
            f"found {worker_type!r}."
        )
    return worker_type


def check_on_error(value: OnError) -> OnError:
    """Return what to do about pictures that cannot be read.

    Raises:
        ConfigError: It is neither "raise" nor "skip".
    """
    if value not in ("raise", "skip"):
        raise ConfigError(f'`on_error` should be "raise" or "skip", found {value!r}.')
    return value


def check_share(name: str, value: float) -> float:
    """Return a share in [0, 1].

    Raises:
        ConfigError: It is something else.
    """
    return check_number(name, value, lambda share: 0 <= share <= 1, "in [0, 1]")


def num_cores() -> int:
    """Return the number of cores this process may use, which may be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
