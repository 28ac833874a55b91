"""Where a fit's batches come from: pictures through the whole network, or cached features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from transferkit.data import Batch, ImageLoader
from transferkit.data.prefetch import prefetch, to_images
from transferkit.models import Classifier
from transferkit.training.resident import KeptBatches


class Feed(Protocol):
    """What the training loop asks for batches, and what makes logits of them."""

    num_batches: int
    """The batches of an epoch."""
    module: nn.Module
    """What runs in a step, and has to be in the mode for it."""

    def train(self, epoch: int, *, start: int = 0) -> Iterator[tuple[int, Batch]]:
        """Iterate over the batches of an epoch in its order, from number `start` on.

        Epochs are numbered from 1, batches from 0; a batch's number comes with it.
        """
        ...

    def val(self) -> Iterator[Batch]:
        """Iterate over the validation batches."""
        ...

    def logits(self, inputs: Tensor) -> Tensor:
        """Compute the logits `(N, C)` of the inputs of a batch."""
        ...

    def describe(self) -> dict[str, object]:
        """Return what the feed does, as plain JSON data for the history."""
        ...


class LiveFeed:
    """Load and augment pictures anew in each epoch and run the whole network.

    Args:
        model: The model.
        train: Loads the training pictures.
        val: Loads the validation pictures, and keeps what fits.
        device: Where the network computes, and pixels become images if the loaders leave that.
        reason: Why features are not cached, in words.
    """

    def __init__(
        self,
        model: Classifier,
        train: ImageLoader,
        val: KeptBatches,
        *,
        device: torch.device,
        reason: str,
    ) -> None:
        self.module: nn.Module = model
        self._preprocess = model.preprocess
        self._train = train
        self._val = val
        self._device = device
        self.reason: str = reason
        self.num_batches: int = len(train)

    def train(self, epoch: int, *, start: int = 0) -> Iterator[tuple[int, Batch]]:
        """Iterate over the batches of an epoch: images float32 `(N, C, H, W)`, on the device."""
        loaded = self._train.numbered_batches(epoch=epoch, start=start)
        return to_images(prefetch(loaded, self._device), self._preprocess)

    def val(self) -> Iterator[Batch]:
        """Iterate over the validation batches, likewise."""
        for _, batch in to_images(self._val.batches(), self._preprocess):
            yield batch

    def logits(self, inputs: Tensor) -> Tensor:
        """Run the whole network."""
        logits: Tensor = self.module(inputs)
        return logits

    def describe(self) -> dict[str, object]:
        """Say that nothing is cached, and why."""
        return {"cached": False, "reason": self.reason}
