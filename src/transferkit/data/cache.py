"""Decoded pictures kept in memory, as many as fit a budget: the same pixels, sooner."""

from __future__ import annotations

import multiprocessing
import os
import threading
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from transferkit.errors import ConfigError

_SHARED_FOLDER = Path("/dev/shm")
"""Where Linux keeps memory that processes share; containers often have little of it."""


class PixelCache(Protocol):
    """Keeps decoded pictures by index. What does not fit any more is not kept."""

    def get(self, index: int) -> Tensor | None:
        """Return a copy of the picture's pixels, uint8 `(C, H, W)`, or None."""
        ...

    def put(self, index: int, pixels: Tensor) -> None:
        """Keep a copy of the pixels where there is room."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


class LocalCache:
    """A cache for this process and its threads.

    Args:
        budget: Bytes of pixels that are kept at the most.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.num_bytes: int = 0
        self._pictures: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def get(self, index: int) -> Tensor | None:
        """Return a copy, which the caller may change, or None."""
        pixels = self._pictures.get(index)
        return None if pixels is None else pixels.clone()

    def put(self, index: int, pixels: Tensor) -> None:
        """Keep a copy of the pixels where there is room."""
        size = pixels.numel()
        with self._lock:
            if index in self._pictures or self.num_bytes + size > self.budget:
                return
            self.num_bytes += size
            self._pictures[index] = pixels.clone()

    def close(self) -> None:
        """Forget all pictures."""
        with self._lock:
            self._pictures.clear()
            self.num_bytes = 0


class SharedCache:
    """A cache that worker processes share, whatever their start method.

    Args:
        num_images: How many pictures there are.
        budget: Bytes of pixels that are kept at the most; less where the machine has less
            memory to share.
        context: Makes the lock; the one that the workers are started with.
    """

    def __init__(
        self, num_images: int, budget: int, context: multiprocessing.context.BaseContext
    ) -> None:
        self.budget: int = min(budget, _free_shared_memory())
        self._memory = SharedMemory(create=True, size=max(1, self.budget))
        # Row by picture: where its pixels begin (-1: not kept), channels, height, width. The
        # row behind the last holds the number of bytes used.
        table = torch.full((num_images + 1, 4), -1, dtype=torch.int64)
        self._table: Tensor = table.share_memory_()  # type: ignore[no-untyped-call]
        self._table[-1] = 0
        self._lock = context.Lock()

    @property
    def num_bytes(self) -> int:
        """The number of bytes used."""
        return int(self._table[-1, 0])

    def get(self, index: int) -> Tensor | None:
        """Return a copy, which the caller may change, or None."""
        with self._lock:
            start, channels, height, width = self._table[index].tolist()
        if start < 0:
            return None
        size = channels * height * width
        # From a copy of the bytes: a view of the block would keep it from being closed.
        pixels = bytearray(self._view()[start : start + size])
        image = torch.frombuffer(pixels, dtype=torch.uint8).view(height, width, channels)
        return image.permute(2, 0, 1)

    def put(self, index: int, pixels: Tensor) -> None:
        """Keep a copy of the pixels where there is room."""
        size = pixels.numel()
        with self._lock:
            start = self.num_bytes
            if start + size > self.budget or self._table[index, 0] >= 0:
                return
            content = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
            self._view()[start : start + size] = content.reshape(-1).data
            self._table[-1, 0] = start + size
            self._table[index] = torch.tensor([start, *pixels.shape])

    def _view(self) -> memoryview:
        view = self._memory.buf
        if view is None:
            raise ConfigError("The loader was closed during this pass. Start a new one.")
        return view

    def close(self) -> None:
        """Give the memory back. Workers must have ended before."""
        self._memory.close()
        with suppress(FileNotFoundError):
            self._memory.unlink()


def _free_shared_memory() -> int:
    """Return how many bytes may be shared: writing beyond what there is would kill us."""
    if not _SHARED_FOLDER.is_dir():
        return 2**62  # Not Linux: shared memory is ordinary memory.
    status = os.statvfs(_SHARED_FOLDER)
    return status.f_bavail * status.f_frsize // 2
