"""Reading pictures ahead of the network, in threads, and in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from transferkit.data.workers import start_threads
from transferkit.errors import ImageError
from transferkit.images import ImageSource
from transferkit.inference.prediction import Failure


@dataclass(frozen=True)
class Broken:
    """An error that ends the run: of the iterator of pictures, or of a kind not foreseen.

    Args:
        error: The error, which is none about the content of a picture.
    """

    error: Exception


Read: TypeAlias = "Tensor | ImageError | Broken"


def read_ahead(
    sources: Iterator[ImageSource],
    read: Callable[[ImageSource], Tensor],
    *,
    hold: Callable[[ImageSource], ImageSource],
    num_workers: int,
    num_ahead: int,
) -> Iterator[tuple[ImageSource | None, Read]]:
    """Read pictures in threads, a fixed number of them ahead, and yield them in order.

    The iterator of the pictures is advanced in the caller's thread, no further than it has to
    be. The threads have ended when this iterator has, or is closed.

    Args:
        sources: The pictures; they may be endless.
        read: Makes an image of one.
        hold: Makes of one, in the caller's thread, what stays as it is when `sources` goes on.
        num_workers: Number of threads; 0 reads in the caller's.
        num_ahead: The most pictures that are read or being read and not yielded yet.

    Yields:
        Each picture, and the image, or the error why there is none. An error of `sources`
        comes last, as `Broken`, and so does one of `read` that is no `ImageError`.
    """

    def attempt(source: ImageSource) -> Read:
        try:
            return read(source)
        except ImageError as error:
            # Without its frames, which hold the pixels that there were.
            return error.with_traceback(None)
        except Exception as error:
            return Broken(error)

    guarded = _Guarded(sources)
    if num_workers == 0:
        for source in guarded:
            yield source, attempt(source)
        if guarded.error is not None:
            yield None, Broken(guarded.error)
        return
    pool = start_threads(num_workers)

    def start(source: ImageSource) -> Future[Read]:
        failed: Future[Read] = Future()
        try:
            return pool.submit(attempt, hold(source))
        except ImageError as error:
            failed.set_result(error.with_traceback(None))
        except Exception as error:
            failed.set_result(Broken(error))
        return failed

    waiting: deque[tuple[ImageSource, Future[Read]]] = deque()
    try:
        while True:
            for drawn in islice(guarded, num_ahead - len(waiting)):
                waiting.append((drawn, start(drawn)))
            if not waiting:
                break
            first, future = waiting.popleft()
            yield first, future.result()
        if guarded.error is not None:
            yield None, Broken(guarded.error)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Guarded:
    """An iterator that ends at an error and keeps it."""

    def __init__(self, sources: Iterator[ImageSource]) -> None:
        self._sources = sources
        self._is_over = False
        self.error: Exception | None = None

    def __iter__(self) -> _Guarded:
        return self

    def __next__(self) -> ImageSource:
        if self._is_over:
            raise StopIteration
        try:
            return next(self._sources)
        except StopIteration:
            self._is_over = True
            raise
        except Exception as error:
            self._is_over, self.error = True, error
            raise StopIteration from None


class Batch:
    """The pictures that go through the network together, and those between that failed."""

    def __init__(self, on_error: str) -> None:
        self._on_error = on_error
        self._rows: list[tuple[Path | None, Failure | None]] = []
        self._images: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_images(self) -> int:
        """How many of them were read."""
        return len(self._images)

    def ends_at(self, found: Broken | ImageError) -> bool:
        """Tell whether an error ends the run."""
        return isinstance(found, Broken) or self._on_error == "raise"

    def add(self, source: ImageSource | None, found: Tensor | ImageError | Broken) -> None:
        """Add a picture."""
        path = Path(source) if isinstance(source, (str, os.PathLike)) else None
        if isinstance(found, Tensor):
            self._images.append(found)
            self._rows.append((path, None))
        elif self._on_error == "record" and isinstance(found, ImageError):
            self._rows.append((path, Failure(str(found), path)))

    def stack(self) -> Tensor:
        """Return the pixels `(N, ..., C, H, W)`, the channels last in memory, as decoders do."""
        return torch.stack([each.movedim(-3, -1) for each in self._images]).movedim(-1, -3)

    def rows(self) -> Iterator[tuple[Path | None, Failure | None]]:
        """Yield the path of each picture, and why it failed, if it did."""
        return iter(self._rows)


def make_batches(
    pairs: Iterator[tuple[ImageSource | None, Read]], size: int, on_error: str
) -> Iterator[Batch]:
    """Put pictures together into batches.

    Args:
        pairs: What `read_ahead` yields.
        size: The images of a batch.
        on_error: "raise", "record" or "skip".

    Yields:
        Full batches, and the last one as it is; those with many failures are ended earlier.

    Raises:
        ImageError: A picture cannot be read, after the batch of those before it. So do errors
            of other classes that end the run.
    """
    batch = Batch(on_error)
    for source, found in pairs:
        if isinstance(found, (Broken, ImageError)) and batch.ends_at(found):
            # Its turn comes after the good ones before it.
            yield batch
            raise found.error if isinstance(found, Broken) else found
        batch.add(source, found)
        if batch.num_images == size or len(batch) >= 4 * size:
            yield batch
            batch = Batch(on_error)
    yield batch
