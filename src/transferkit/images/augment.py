"""Augmentation presets: the random way from a picture to a training view of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor
from torchvision.transforms import v2

from transferkit._registry import Registry
from transferkit.images.geometry import trim_extreme

Augmentation: TypeAlias = "Callable[[Tensor], Tensor]"
"""A callable from pixels uint8 (3, H, W) to pixels uint8 (3, size, size)."""

AugmentationFactory: TypeAlias = "Callable[[int, v2.InterpolationMode], Augmentation]"

_PRESETS: Registry[AugmentationFactory] = Registry(
    "augmentation", lister="transferkit.images.list_augmentations()"
)


@_PRESETS.decorator("tutorial")
def _tutorial(size: int, interpolation: v2.InterpolationMode) -> Augmentation:
    """Random resized crop and horizontal flip, as in the ants-and-bees lesson."""
    views: Augmentation = v2.Compose(
        [
            v2.RandomResizedCrop(size, interpolation=interpolation, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )
    return views


@_PRESETS.decorator("none")
def _none(size: int, interpolation: v2.InterpolationMode) -> Augmentation:
    """No randomness: the shorter side to `size`, centre crop."""
    view: Augmentation = v2.Compose(
        [
            trim_extreme,
            v2.Resize([size], interpolation=interpolation, antialias=True),
            v2.CenterCrop([size, size]),
        ]
    )
    return view


def make_augmentation(name: str, *, size: int, interpolation: str = "bilinear") -> Augmentation:
    """Build the augmentation preset called `name`.

    Args:
        name: "tutorial" is a random resized crop (8 to 100 % of the area, sides 3:4 to 4:3)
            and a horizontal flip with probability 0.5; "none" is a centre crop.
        size: Height and width of the result in pixels.
        interpolation: "bilinear" or "bicubic", antialiased.

    Returns:
        A callable from uint8 `(3, H, W)` to uint8 `(3, size, size)`. Its randomness comes
        from PyTorch's global generator.

    Raises:
        UnknownNameError: No preset has this name.

    Example:
        >>> import torch
        >>> view = make_augmentation("tutorial", size=8)
        >>> view(torch.zeros(3, 20, 30, dtype=torch.uint8)).shape
        torch.Size([3, 8, 8])

    References:
        Random resized crops: Szegedy et al., Going Deeper with Convolutions, 2014,
        https://arxiv.org/abs/1409.4842
    """
    return _PRESETS.get(name)(size, v2.InterpolationMode(interpolation))


def list_augmentations() -> list[str]:
    """Return the names of the augmentation presets, sorted.

    Example:
        >>> list_augmentations()
        ['none', 'tutorial']
    """
    return _PRESETS.names()
