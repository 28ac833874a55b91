"""Keeping the weights of the best epoch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from transferkit.training.history import EpochRecord, rank


class BestWeights:
    """Hold a copy of the weights of the best epoch offered so far.

    Only what changes in training is copied: a frozen backbone of gigabytes costs nothing.
    Before the first offer the copy is of the weights at the start.

    Args:
        model: The model whose weights are copied, and restored in place.
        trainable: The names of the parameters that train at any time of the fit.
    """

    def __init__(self, model: nn.Module, trainable: Collection[str]) -> None:
        self._model = model
        self._names = {*trainable, *(name for name, _ in model.named_buffers())}
        self._rank: tuple[bool, float, float] | None = None
        self._copy = self._clone()

    def offer(self, record: EpochRecord) -> bool:
        """Copy the present weights if this epoch is better than all before, and tell so."""
        if self._rank is not None and rank(record) >= self._rank:
            return False
        # A new copy rather than a change of the old one: Ctrl-C may come in between.
        self._copy = self._clone()
        self._rank = rank(record)
        return True

    def state_dict(self, *, is_present: bool) -> dict[str, Any]:
        """Return the rank and the copy, as plain data and tensors.

        Args:
            is_present: The model holds the best weights now: no copy is needed.
        """
        return {"rank": self._rank, "copy": None if is_present else self._copy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; without a copy the present weights are best."""
        self._rank = state["rank"]
        if state["copy"] is None:
            self._copy = self._clone()
            return
        present = self._changing()
        self._copy = {
            name: torch.empty_like(present[name]).copy_(value)
            for name, value in state["copy"].items()
        }

    def keep(self) -> None:
        """Take the present weights for the best."""
        self._copy = self._clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copy back into the model."""
        for name, value in self._changing().items():
            value.copy_(self._copy[name])

    def _clone(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self._changing().items()}

    def _changing(self) -> dict[str, Tensor]:
        """Return what trains, and all buffers, which may follow the batches."""
        tensors = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        return {name: each.detach() for name, each in tensors.items() if name in self._names}
