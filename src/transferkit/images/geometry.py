"""Pictures of extreme proportions."""

from __future__ import annotations

from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

MAX_SIDE_RATIO = 32


def trim_extreme(image: Tensor) -> Tensor:
    """Cut a picture that is over 32 times as long as wide down to the middle of it.

    Resized by its shorter side, a picture of 1 by 20,000 pixels would take gigabytes, of
    which the centre crop that follows sees the middle alone.

    Args:
        image: uint8 `(3, H, W)`.

    Returns:
        The picture itself, or its middle.
    """
    height, width = image.shape[-2:]
    limit = MAX_SIDE_RATIO * min(height, width)
    if max(height, width) <= limit:
        return image
    trimmed: Tensor = F.center_crop(image, [min(height, limit), min(width, limit)])
    return trimmed


def resize(image: Tensor, size: list[int], interpolation: str) -> Tensor:
    """Resize like torchvision, antialiased, to one pixel too.

    Args:
        image: uint8 `(C, H, W)`.
        size: Height and width in pixels, or the shorter side alone.
        interpolation: "bilinear" or "bicubic".

    Returns:
        uint8 `(C, h, w)`.
    """
    if max(size) == 1 and image.is_contiguous():
        # Of three channels one after the other PyTorch cannot make a single pixel, but fails
        # with an internal error. Interleaved ones it can.
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    mode = InterpolationMode(interpolation)
    resized: Tensor = F.resize(image, size, interpolation=mode, antialias=True)
    return resized
