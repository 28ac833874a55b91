"""Augmentation: the random way from a picture to a training view of it, by name or by callable."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn
from torchvision import transforms as v1
from torchvision.transforms import v2

from transferkit._checks import check_callable
from transferkit._registry import Registry
from transferkit.images.policies import RandAugmentView, StrongView, TrivialAugmentView
from transferkit.images.views import CentreView, LightView, TutorialView

Augmentation: TypeAlias = "Callable[[Tensor], Tensor]"
"""A callable from pixels uint8 (C, H, W) to pixels uint8 (C, size, size)."""

AugmentationFactory: TypeAlias = "Callable[..., Augmentation]"

_PRESETS: Registry[AugmentationFactory] = Registry(
    "augmentation", lister="transferkit.images.list_augmentations()"
)
_PRESETS.add("none", CentreView)
_PRESETS.add("tutorial", TutorialView)
_PRESETS.add("light", LightView)
_PRESETS.add("trivial_augment", TrivialAugmentView)
_PRESETS.add("rand_augment", RandAugmentView)
_PRESETS.add("strong", StrongView)


def make_augmentation(name: str, *, size: int, interpolation: str = "bilinear") -> Augmentation:
    """Build the augmentation preset called `name`.

    It does not change its input, can be pickled and says what it does by `describe()`.
    "tutorial", "light" and "none" are seedable (`is_seedable`): they take any number of
    channels C, and draw from the `generator` that they are given, without one from PyTorch's
    global one. The others take 1 or 3 channels and draw from PyTorch's global generator, so
    that they run one at a time where threads load the pictures.

    Args:
        name: Which one; `describe_augmentation` tells its numbers.

            - "tutorial": random resized crop and horizontal flip, as in the PyTorch lesson
              on transfer learning.
            - "light": a larger crop, flip, a little brightness and contrast.
            - "trivial_augment": crop and flip of "tutorial", then one random operation of a
              random strength.
            - "rand_augment": crop and flip of "tutorial", then two random operations.
            - "strong": the same with stronger operations, and random erasing.
            - "none": the centre crop, nothing random.
        size: Height and width of the result in pixels, at least 1.
        interpolation: "bilinear" or "bicubic", antialiased.

    Returns:
        A callable from uint8 `(C, H, W)` to uint8 `(C, size, size)`.

    Raises:
        UnknownNameError: No preset has this name.
        ConfigError: The size or the interpolation cannot work.

    Example:
        >>> import torch
        >>> view = make_augmentation("tutorial", size=8)
        >>> view(torch.zeros(3, 20, 30, dtype=torch.uint8)).shape
        torch.Size([3, 8, 8])

    References:
        Random resized crops: Szegedy et al., Going Deeper with Convolutions, 2014,
        https://arxiv.org/abs/1409.4842

        RandAugment: Cubuk et al., 2020, https://arxiv.org/abs/1909.13719

        TrivialAugment: Müller and Hutter, 2021, https://arxiv.org/abs/2103.10158

        Random erasing: Zhong et al., 2020, https://arxiv.org/abs/1708.04896
    """
    return _PRESETS.get(name)(size=size, interpolation=interpolation)


def list_augmentations() -> list[str]:
    """Return the names of the augmentation presets, sorted.

    Example:
        >>> list_augmentations()
        ['light', 'none', 'rand_augment', 'strong', 'trivial_augment', 'tutorial']
    """
    return _PRESETS.names()


def describe_augmentation(
    augmentation: str | Augmentation, *, size: int = 224, interpolation: str = "bilinear"
) -> str:
    """Return what an augmentation does in words.

    Args:
        augmentation: A preset's name, or any callable. One with a method `describe` is
            described by it, a chain by its transforms in order, a transform of torchvision
            by its arguments, and a function by its name.
        size: What a preset called by its name is built for, in pixels.
        interpolation: The same.

    Returns:
        The words, in one line.

    Raises:
        UnknownNameError: No preset has this name.
        ConfigError: It is neither a name nor a callable.

    Example:
        >>> print(describe_augmentation("none", size=32))
        shorter side to 32 (bilinear), centre crop 32x32
        >>> flip_and_cut = v2.Compose([v2.RandomVerticalFlip(p=0.5), v2.CenterCrop(32)])
        >>> print(describe_augmentation(flip_and_cut))
        RandomVerticalFlip(p=0.5), CenterCrop(size=(32, 32))
    """
    if isinstance(augmentation, str):
        augmentation = make_augmentation(augmentation, size=size, interpolation=interpolation)
    check_callable("augmentation", augmentation, "a preset's name or a callable")
    return _describe(augmentation)


def _describe(step: Any) -> str:
    """Return one step, or a chain of them, in one line."""
    describe = None if isinstance(step, type) else getattr(step, "describe", None)
    if callable(describe):
        return str(describe())
    if isinstance(step, (v2.Compose, v1.Compose)):
        return _join(step.transforms)
    if isinstance(step, nn.Sequential):
        return _join(step)
    if isinstance(step, partial):
        options = [repr(value) for value in step.args]
        options += [f"{name}={value!r}" for name, value in step.keywords.items()]
        return (
            f"{_describe(step.func)} with {', '.join(options)}" if options else _describe(step.func)
        )
    if hasattr(step, "__qualname__"):
        return f"{step.__module__}.{step.__qualname__}"
    text = " ".join(repr(step).split())
    if text == object.__repr__(step):  # It names an address in memory.
        return f"{type(step).__module__}.{type(step).__qualname__}"
    return text


def _join(steps: Iterable[Any]) -> str:
    return ", ".join(_describe(step) for step in steps) or "nothing"
