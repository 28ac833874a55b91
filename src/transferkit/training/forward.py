"""The forward pass of a training step: from images to a loss that can be trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from transferkit.errors import ConfigError
from transferkit.training.feeds import Feed

Criterion: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"
"""A callable from logits (N, C) and targets (N,) to the batch's mean loss, a scalar."""


def forward(
    feed: Feed, criterion: Criterion, inputs: Tensor, targets: Tensor, *, backbone_name: str
) -> tuple[Tensor, Tensor]:
    """Compute the loss and the logits of a batch.

    Args:
        feed: Makes logits of the inputs that it gave; its model is in training mode.
        criterion: Maps logits and targets to the mean loss.
        inputs: Images float32 `(N, C, H, W)`, or activations.
        targets: int64 `(N,)`, or soft ones `(N, classes)`.
        backbone_name: The backbone's name, for the error text.

    Returns:
        The loss, a scalar, and the logits `(N, C)`.

    Raises:
        ConfigError: The criterion gives no scalar tensor, or the backbone cannot work with
            the channels last.
    """
    try:
        logits = feed.logits(inputs)
    except RuntimeError as error:
        if "view size is not compatible" in str(error):
            raise ConfigError(
                f"The backbone `{backbone_name}` calls `view` on activations, "
                f"which works with the channels first only. Pass `channels_last=False`."
            ) from error
        raise
    loss = criterion(logits, targets)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(
            f"The criterion should return the mean loss of the batch as a scalar tensor, "
            f"found {found}."
        )
    return loss, logits
