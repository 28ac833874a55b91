"""From a stream of pictures to a stream of results: read ahead, computed in batches, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor
from tqdm import tqdm

from transferkit._allocator import buffers_kept
from transferkit._checks import check_choice, check_flag, check_integer
from transferkit.data.loader import num_cores, resolve_num_workers
from transferkit.images import ImageSource, Preprocess, Transform
from transferkit.inference.doors import find_sources, hold_source, to_source
from transferkit.inference.lanes import run_in_lanes
from transferkit.inference.network import Network
from transferkit.inference.pipeline import Batch, make_batches, read_ahead
from transferkit.inference.prediction import Failure
from transferkit.models.engines import Engine, count_cores, count_lanes

_MAX_WORKERS = 16
_FEW = 8
"""Up to so many pictures are read without threads."""

Row = TypeVar("Row")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Work(Generic[Row, Found]):
    """What is to be done with each of many pictures.

    Args:
        network: What runs them.
        preprocess: How they are decoded.
        transform: What is made of their pixels in the threads that read, uint8.
        compute: Makes of the engine and of a batch, what `transform` gave stacked and
            normalised, a row for each picture.
        make: Makes the result of a picture of its row and its path, if it has one.
    """

    network: Network
    preprocess: Preprocess
    transform: Transform
    compute: Callable[[Engine | None, Tensor], Iterable[Row]]
    make: Callable[[Row, Path | None], Found]

    def read(self, source: ImageSource) -> Tensor:
        """Make of a picture what is stacked to batches."""
        spec = self.preprocess
        return self.transform(spec.decode(to_source(source, spec.num_channels)))

    def finish(self, engine: Engine | None, batch: Batch) -> list[Found | Failure]:
        """Return what becomes of the pictures of a batch."""
        rows: Iterator[Row] = iter(())
        if batch.num_images:
            # For the batch alone: whoever takes the results may do so for hours.
            with buffers_kept():
                images = self.preprocess.normalize(batch.stack())
                rows = iter(self.compute(engine, images))
        return [
            self.make(next(rows), path) if failure is None else failure
            for path, failure in batch.rows()
        ]


def run_many(
    work: Work[Row, Found],
    images: Any,
    *,
    batch_size: int | Literal["auto"],
    on_error: Literal["raise", "skip", "record"],
    num_workers: int | Literal["auto"],
    progress: bool,
) -> Iterator[Found | Failure]:
    """Check the arguments, and return an iterator that does the work as it advances.

    Args:
        work: What is to be done.
        images: As for `Predictor.predict_many`, like all that follow.
        batch_size: Pictures that go through the network together.
        on_error: What comes of a picture that cannot be read.
        num_workers: Threads that read.
        progress: Show a bar.

    Returns:
        A generator of the results, in the order of the pictures.

    Raises:
        DataError: The folder is missing or holds no pictures.
        ConfigError: An argument is out of range.
    """
    if batch_size != "auto":
        batch_size = check_integer("batch_size", batch_size, minimum=1)
    check_choice("on_error", on_error, ("raise", "record", "skip"))
    sources, total = find_sources(images)
    count = resolve_num_workers(num_workers, num_images=0)
    if num_workers == "auto" and (total is None or total > _FEW):
        count = min(num_cores(), _MAX_WORKERS)
    bar_off = None if check_flag("progress", progress) else True
    found = _run(work, sources, total, batch_size, count, on_error)
    return _shown(found, total, bar_off)


def _run(
    work: Work[Row, Found],
    sources: Iterator[ImageSource],
    total: int | None,
    batch_size: int | Literal["auto"],
    num_workers: int,
    on_error: str,
) -> Iterator[Found | Failure]:
    engine = work.network.engine_for(total)
    size = work.network.batch_size_for(engine, total) if batch_size == "auto" else batch_size
    pairs = read_ahead(
        sources,
        work.read,
        hold=lambda source: hold_source(source, work.preprocess),
        num_workers=num_workers,
        num_ahead=2 * max(size, num_workers),
    )
    is_one = total is not None and total <= size
    with closing(pairs):  # type: ignore[type-var]
        found = run_in_lanes(
            make_batches(pairs, size, on_error),
            lambda batch: work.finish(engine, batch),
            num_lanes=1 if is_one else count_lanes(engine),
            cores_each=count_cores(engine),
        )
        with closing(found):  # type: ignore[type-var]
            for results in found:
                yield from results


def _shown(
    found: Iterator[Found | Failure], total: int | None, is_off: bool | None
) -> Iterator[Found | Failure]:
    """Pass results on, and count them on a bar."""
    bar = tqdm(total=total, unit="picture", disable=is_off)
    with bar, closing(found):  # type: ignore[type-var]
        for each in found:
            bar.update()
            yield each
