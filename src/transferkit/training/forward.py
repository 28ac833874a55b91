"""The forward pass of a training step: from images to a loss that can be trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from transferkit.errors import ConfigError
from transferkit.models import Classifier

Criterion: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"
"""A callable from logits (N, C) and targets (N,) to the batch's mean loss, a scalar."""


def forward(
    model: Classifier, criterion: Criterion, images: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the loss and the logits of a batch.

    Args:
        model: The classifier, in training mode.
        criterion: Maps logits and targets to the mean loss.
        images: float32 `(N, 3, H, W)`.
        targets: int64 `(N,)`.

    Returns:
        The loss, a scalar, and the logits `(N, C)`.

    Raises:
        ConfigError: The criterion gives no scalar tensor, or the backbone cannot work with
            the channels last.
    """
    try:
        logits: Tensor = model(images)
    except RuntimeError as error:
        if "view size is not compatible" in str(error):
            raise ConfigError(
                f"The backbone `{model.backbone_name}` calls `view` on activations, "
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
