"""Batches on their way to the device: copied there while it still computes with earlier ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from transferkit._device import has_streams
from transferkit.data.reading import Batch
from transferkit.images import Preprocess

NUM_AHEAD = 1
"""Batches that are copied while one is in use. The loader keeps others ready on the CPU."""

Numbered: TypeAlias = "tuple[int, Batch]"
"""A batch with its number in the epoch."""


def prefetch(batches: Iterable[Numbered], device: torch.device) -> Iterator[Numbered]:
    """Bring batches to the device, the next one while the one before it is in use.

    Where the device can (`has_streams`), a batch is copied out of page-locked memory by a
    stream of its own, so that neither the device nor this thread waits for it. What comes out,
    in which order and after what error, does not depend on that.

    Args:
        batches: Numbered batches, in any memory. Closed when this iterator is, if they can be.
        device: Where they should be.

    Returns:
        An iterator over the same batches, images and targets on the device.

    Example:
        >>> batch = Batch(torch.zeros(1, 3, 8, 8), torch.tensor([0]), torch.tensor([7]))
        >>> [number for number, _ in prefetch([(0, batch), (1, batch)], torch.device("cpu"))]
        [0, 1]
    """
    with _closing(iter(batches)) as source:
        if has_streams(device):
            yield from _copy_ahead(source, _SideStream(device))
        else:
            for number, batch in source:
                yield number, batch.to(device)


def to_images(batches: Iterable[Numbered], preprocess: Preprocess) -> Iterator[Numbered]:
    """Normalise the batches that hold pixels, where they are, and give others as they are.

    Args:
        batches: Numbered batches of images, uint8 or float32. Closed when this iterator is, if
            they can be.
        preprocess: Normalises.

    Returns:
        An iterator over batches of images, float32 `(N, C, H, W)`.
    """
    with _closing(iter(batches)) as source:
        for number, batch in source:
            yield number, normalized(batch, preprocess)


def normalized(batch: Batch, preprocess: Preprocess) -> Batch:
    """Return a batch with normalised images, where they are pixels, uint8 `(N, C, H, W)`."""
    if batch.images.dtype != torch.uint8:
        return batch
    return batch._replace(images=preprocess.normalize(batch.images))


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on the device, without waiting for it where that can be.

    A copy out of ordinary memory would wait until the device has done what it was told so far.
    """
    if has_streams(device) and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class _SideStream:
    """Copies batches to a device by a stream of its own.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device)

    def start(self, batch: Batch) -> tuple[Batch, torch.Event]:
        """Begin to copy a batch; return it as it will be, and what happens when it is."""
        with self._stream:
            images, targets = (upload(each, self._device) for each in batch[:2])
        return Batch(images, targets, batch.indices), self._stream.record_event()

    def finish(self, batch: Batch, copied: torch.Event) -> Batch:
        """Let the stream that computes wait for a copy, and return the batch to it."""
        current = torch.accelerator.current_stream(self._device)
        current.wait_event(copied)
        for each in batch[:2]:
            # Its memory is the side stream's, which must not use it anew before this one has.
            each.record_stream(current)
        return batch


def _copy_ahead(source: Iterator[Numbered], side: _SideStream) -> Iterator[Numbered]:
    """Give out batches, each when the copy of the next one has begun."""
    pending: deque[tuple[int, Batch, torch.Event]] = deque()
    failure: Exception | None = None
    try:
        for number, batch in source:
            pending.append((number, *side.start(batch)))
            if len(pending) > NUM_AHEAD:
                first, waiting, copied = pending.popleft()
                yield first, side.finish(waiting, copied)
    except Exception as error:
        failure = error  # It has its place behind the batches before it.
    for number, waiting, copied in pending:
        yield number, side.finish(waiting, copied)
    if failure is not None:
        raise failure


@contextmanager
def _closing(source: Iterator[Numbered]) -> Iterator[Iterator[Numbered]]:
    """Run a block with an iterator, and close it then, if it can be."""
    try:
        yield source
    finally:
        close = getattr(source, "close", None)
        if close is not None:
            close()
