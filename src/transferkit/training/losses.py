"""Losses that are not finite: found before they reach the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from transferkit._checks import check_integer
from transferkit._device import has_streams
from transferkit.errors import ConfigError, LossError

NanPolicy: TypeAlias = "Literal['raise'] | int"
"""What to do about a loss that is not finite: end the fit, or leave out so many batches."""

NUM_NAMED = 5
"""How many pictures of a batch are named."""


def check_nan_policy(policy: NanPolicy) -> NanPolicy:
    """Return the policy.

    Raises:
        ConfigError: There is no such policy.
    """
    if isinstance(policy, str) and policy == "raise":
        return "raise"
    try:
        return check_integer("nan_policy", policy, minimum=1)
    except ConfigError:
        raise ConfigError(
            f'`nan_policy` should be "raise" or the number of batches that may be left out, at '
            f"least 1, found {policy!r}."
        ) from None


class LossWatch:
    """Look at each batch's loss before it is trained on.

    Reading a loss makes an accelerator wait, so that there, under "raise", a loss is looked at
    when the next one has been computed: the fit ends a step later, with the best weights.

    Args:
        policy: What to do.
        device: Where losses are computed.
        name_of: Names a picture of the training split.
    """

    def __init__(
        self, policy: NanPolicy, device: torch.device, name_of: Callable[[int], str]
    ) -> None:
        self._policy = policy
        self._is_late = device.type != "cpu" and policy == "raise"
        self._name_of = name_of
        self._pending: tuple[Callable[[], float], dict[str, Any]] | None = None
        self.skipped: list[dict[str, Any]] = []

    def admits(self, loss: Tensor, *, epoch: int, batch: int, lr: float, indices: Tensor) -> bool:
        """Tell whether to train on a batch.

        Args:
            loss: Its mean loss.
            epoch: The epoch.
            batch: The batch's number in it, from 0.
            lr: The learning rate.
            indices: The places of its pictures.

        Raises:
            LossError: The loss, or on an accelerator one before, is not finite.
        """
        where = {"epoch": epoch, "batch": batch, "lr": lr, "indices": indices}
        if self._is_late:
            pending, self._pending = self._pending, (_read_later(loss.detach()), where)
            return pending is None or self._admits(pending[0](), pending[1])
        return self._admits(loss.item(), where)

    def finish(self) -> None:
        """Look at what has not been looked at yet, at the end of an epoch and before a save.

        Raises:
            LossError: It is not finite.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self._admits(pending[0](), pending[1])

    def _admits(self, value: float, where: dict[str, Any]) -> bool:
        if math.isfinite(value):
            return True
        names = [self._name_of(index) for index in where["indices"].tolist()]
        more = len(names) - NUM_NAMED
        listed = ", ".join(f"`{name}`" for name in names[:NUM_NAMED])
        listed += f" and {more} more" if more > 0 else ""
        text = (
            f"The loss is {value} in epoch {where['epoch']}, batch {where['batch']}, at the "
            f"learning rate {where['lr']:g}. Its pictures: {listed}."
        )
        if self._policy == "raise":
            raise LossError(
                f"{text} The weights are those of the best epoch so far. Take a lower learning "
                f"rate, clip the gradients by `clip_norm`, or let some batches be left out by "
                f"`nan_policy`."
            )
        if len(self.skipped) >= self._policy:
            raise LossError(
                f"{text} The {self._policy} batches that `nan_policy` lets be left out are used "
                f"up. The weights are those of the best epoch so far. Take a lower learning rate, "
                f"or clip the gradients by `clip_norm`."
            )
        self.skipped.append(
            {"epoch": where["epoch"], "batch": where["batch"], "loss": repr(value), "paths": names}
        )
        return False


def _read_later(loss: Tensor) -> Callable[[], float]:
    """Begin to copy a loss from its device; return what waits for it, and for nothing after it."""
    if not has_streams(loss.device):
        return loss.item
    copied = torch.empty((), dtype=loss.dtype, pin_memory=True)
    copied.copy_(loss, non_blocking=True)
    event = torch.accelerator.current_stream(loss.device).record_event()

    def read() -> float:
        event.synchronize()
        return copied.item()

    return read
