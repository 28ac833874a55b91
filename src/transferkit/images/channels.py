"""Pictures with one channel, or with more than red, green and blue."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transferkit.errors import ImageError
from transferkit.images.decode import MAX_PIXELS, Decoder, ImageSource, decode_image

LUMA = (19595, 38470, 7471)
"""The shares of red, green and blue in grey, by ITU-R BT.601, in 65536ths."""


def decode_channels(
    source: ImageSource,
    num_channels: int,
    *,
    decoder: Decoder = "torchvision",
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Read one picture as upright pixels with a given number of channels.

    Args:
        source: For 3 channels what `decode_image` takes. For 1 channel that too, made grey
            by `to_grey`, and grey pixels uint8 as an array `(H, W)` or `(H, W, 1)` or a
            tensor `(H, W)` or `(1, H, W)`. For any other number C, uint8, an array
            `(H, W, C)` or a tensor `(C, H, W)`.
        num_channels: The number of channels C, at least 1.
        decoder: As for `decode_image`.
        max_pixels: As for `decode_image`.

    Returns:
        uint8 `(C, H, W)` in [0, 255], not sharing memory with an array or a PIL image; a
        tensor that has the C channels shares its own.

    Raises:
        ImageError: It cannot be read as a picture with so many channels.

    Example:
        >>> from PIL import Image
        >>> decode_channels(Image.new("RGB", (4, 3), "red"), 1)[0, 0]
        tensor([76, 76, 76, 76], dtype=torch.uint8)
    """
    if num_channels == 3:
        return decode_image(source, decoder=decoder, max_pixels=max_pixels)
    is_raw = isinstance(source, (Tensor, np.ndarray))
    if is_raw and (num_channels > 1 or not _is_rgb(source)):
        return _from_raw(source, num_channels)
    if num_channels == 1:
        return to_grey(decode_image(source, decoder=decoder, max_pixels=max_pixels))
    is_path = isinstance(source, (str, os.PathLike))
    found = f"the file `{os.fspath(source)}`" if is_path else type(source).__name__  # type: ignore[arg-type]
    raise ImageError(
        f"A picture of {num_channels} channels should be an array uint8 (H, W, {num_channels}) "
        f"or a tensor uint8 ({num_channels}, H, W), found {found}. Files and PIL images are "
        f"read with 3 channels or 1."
    )


def to_grey(pixels: Tensor) -> Tensor:
    """Make grey pixels of RGB ones: their luma by ITU-R BT.601, rounded.

    Pixels that are grey already keep their values. These are the values of Pillow's
    `convert("L")`, too.

    Args:
        pixels: uint8 `(3, H, W)`. Not changed.

    Returns:
        uint8 `(1, H, W)`.

    Example:
        >>> to_grey(torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)).item()
        76

    References:
        Recommendation ITU-R BT.601, https://www.itu.int/rec/R-REC-BT.601
    """
    red, green, blue = pixels
    sums = red.to(torch.int32).mul_(LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
    grey: Tensor = sums.add_(2**15).bitwise_right_shift_(16).to(torch.uint8)
    return grey.unsqueeze(0)


def _is_rgb(source: Any) -> bool:
    return bool(source.ndim == 3 and source.shape[0 if isinstance(source, Tensor) else 2] == 3)


def _from_raw(source: Any, num_channels: int) -> Tensor:
    """Return the pixels of an array or a tensor, or say what was expected of it."""
    is_tensor = isinstance(source, Tensor)
    flat = source.ndim == 2 and num_channels == 1
    full = source.ndim == 3 and source.shape[0 if is_tensor else 2] == num_channels
    if source.dtype not in (torch.uint8, np.uint8) or 0 in source.shape or not (flat or full):
        last = "({}, H, W)" if is_tensor else "(H, W, {})"
        shapes = last.format(num_channels)
        if num_channels == 1:
            shapes = f"(H, W), {shapes} or {last.format(3)}"
        channels = "1 channel" if num_channels == 1 else f"{num_channels} channels"
        raise ImageError(
            f"A picture of {channels} given as {'a tensor' if is_tensor else 'an array'} should "
            f"be uint8 {shapes} in [0, 255], found {str(source.dtype).removeprefix('torch.')} "
            f"{tuple(source.shape)}."
        )
    pixels = source if is_tensor else torch.from_numpy(np.array(source, order="C"))
    if flat:
        return pixels.unsqueeze(0)
    return pixels if is_tensor else pixels.permute(2, 0, 1)
