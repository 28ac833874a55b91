"""What stays where the network computes: pixels and activations that are the same in each pass."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import torch
from torch import Tensor

from transferkit._device import free_device_memory
from transferkit.data import Batch, ImageLoader
from transferkit.data.prefetch import Numbered, prefetch

SHARE = 0.25
"""The part of an accelerator's free memory that may be filled so, each time that it is asked."""


def room_on(device: torch.device) -> int:
    """Return how many bytes may stay on an accelerator; 0 on the CPU, where all lies anyway."""
    return 0 if device.type == "cpu" else int(SHARE * free_device_memory(device))


class KeptBatches:
    """Give the batches of a split that are the same in each pass, and keep those that fit.

    The first pass loads them, and keeps the first ones on the device; later passes load what
    did not fit.

    Args:
        loader: Loads the batches; its transform is deterministic, and gives pixels.
        device: Where the network computes.
        budget: The most bytes that are kept on the CPU; on an accelerator it is `SHARE` of what
            is free there when the first pass begins, and nothing where this is 0.
    """

    def __init__(self, loader: ImageLoader, device: torch.device, *, budget: int) -> None:
        self.loader: ImageLoader = loader
        self.num_bytes: int = 0
        self._device = device
        self._budget = budget
        self._room: int | None = None
        self._kept: list[Numbered] = []

    def batches(self) -> Iterator[Numbered]:
        """Iterate over the batches of a pass, with their numbers.

        Their images are pixels uint8 `(N, C, H, W)`, on the device.
        """
        start = 0
        for number, batch in self._kept:
            # A criterion that changes its targets in place must not reach the next pass.
            yield number, batch._replace(targets=batch.targets.clone())
            start = number + 1
        if start == len(self.loader):
            return
        loaded = self.loader.numbered_batches(start=start)
        for number, batch in prefetch(loaded, self._device):
            self._keep(number, batch)
            yield number, batch
        if self._next == len(self.loader):
            self.loader.close()  # It has nothing left to load.

    @property
    def _next(self) -> int:
        """The number of the first batch that is not kept."""
        return self._kept[-1][0] + 1 if self._kept else 0

    def _keep(self, number: int, batch: Batch) -> None:
        """Keep a batch where there is room, and all before it were kept."""
        if self._room is None:
            is_filled = self._device.type != "cpu" and self._budget > 0
            self._room = room_on(self._device) if is_filled else self._budget
        if self.num_bytes + batch.images.nbytes > self._room:
            self._room = 0  # Kept batches have no gaps.
        elif number >= self._next:
            own = Batch(_own(batch.images), batch.targets.clone(), _own(batch.indices))
            self._kept.append((number, own))
            self.num_bytes += batch.images.nbytes

    def close(self) -> None:
        """Forget the batches and end the loader's workers; a later pass starts anew."""
        self._kept, self._room, self.num_bytes = [], None, 0
        self.loader.close()


def _own(tensor: Tensor) -> Tensor:
    """Return a tensor in memory of this process alone: each shared one takes up an open file."""
    is_shared = tensor.device.type == "cpu" and tensor.is_shared()  # type: ignore[no-untyped-call]
    return tensor.clone() if is_shared else tensor


class ResidentTensors:
    """Keep copies of tensors on an accelerator, as long as they fit `SHARE` of what is free.

    Args:
        device: The device; on the CPU the tensors themselves are given.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: dict[Hashable, Tensor] = {}

    def get(self, key: Hashable, tensor: Tensor) -> Tensor:
        """Return what of a tensor is nearest to the network: its copy there, or the tensor.

        Args:
            key: Its name; what it was when it was asked for first, it is taken to be still.
            tensor: The tensor, on the CPU.
        """
        if self._device.type == "cpu":
            return tensor
        if key not in self._copies:
            fits = tensor.nbytes <= room_on(self._device)
            self._copies[key] = tensor.to(self._device) if fits else tensor
        return self._copies[key]

    def clear(self) -> None:
        """Give the device's memory back."""
        self._copies.clear()
