"""Test-time augmentation: several views of a picture, and the mean of what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import five_crop

from transferkit.errors import ConfigError
from transferkit.images import Preprocess, Transform

TTA: TypeAlias = Literal["flip", "five_crop"]


def check_tta(tta: object, preprocess: Preprocess) -> TTA | None:
    """Return the name of a test-time augmentation, or None.

    Raises:
        ConfigError: There is none of that name, or it would show one view five times.
    """
    if tta is not None and tta not in get_args(TTA):
        raise ConfigError(f'`tta` should be "flip", "five_crop" or None, found {tta!r}.')
    spec = preprocess
    if tta == "five_crop" and spec.resize_mode == "squash" and spec.resize_size == spec.crop_size:
        raise ConfigError(
            f'tta="five_crop" needs room around the crop, and this model sees the whole picture: '
            f'{spec.describe().partition(", mean")[0]}. Take tta="flip", or none.'
        )
    return tta  # type: ignore[return-value]


def make_transform(preprocess: Preprocess, tta: TTA | None) -> Transform:
    """Build the transform of pictures for a test-time augmentation.

    Args:
        preprocess: How pictures become images.
        tta: Which.

    Returns:
        A callable from uint8 `(C, H, W)` to uint8 `(C, crop_size, crop_size)`, the view that
        evaluation sees; for "five_crop" to `(5, C, crop_size, crop_size)`, the corners of the
        resized picture and its centre, which is that view.

    Example:
        >>> transform = make_transform(Preprocess(crop_size=32, resize_size=40), "five_crop")
        >>> transform(torch.zeros(3, 60, 50, dtype=torch.uint8)).shape
        torch.Size([5, 3, 32, 32])
    """
    if tta == "five_crop":
        return partial(_five_crops, preprocess)
    return preprocess.eval(normalize=False)


def _five_crops(spec: Preprocess, pixels: Tensor) -> Tensor:
    return torch.stack(five_crop(spec.resize(pixels), [spec.crop_size, spec.crop_size]))


def split_views(images: Tensor, tta: TTA | None) -> list[Tensor]:
    """Return the views of some pictures, each as a batch for the network.

    Args:
        images: What the transform gave, stacked and normalised: float32 `(N, C, H, W)`, or
            `(N, 5, C, H, W)`.
        tta: The test-time augmentation of that transform.

    Returns:
        Tensors `(N, C, H, W)`, one for each view.
    """
    if tta == "five_crop":
        return list(images.unbind(1))
    return [images, images.flip(-1)] if tta == "flip" else [images]


def mean_probabilities(views: Sequence[Tensor], temperature: float) -> Tensor:
    """Return the mean of the views' probabilities.

    Args:
        views: The logits of each view, float32 `(N, C)`.
        temperature: What logits are divided by, above 0.

    Returns:
        float32 `(N, C)`.

    Example:
        >>> mean_probabilities([torch.tensor([[0.0, 0.0]]), torch.tensor([[9.0, 9.0]])], 1.0)
        tensor([[0.5000, 0.5000]])
    """
    first, *others = ((logits / temperature).softmax(dim=1) for logits in views)
    return sum(others, first) / len(views)
