"""Augmentation presets on torchvision's policies, which draw from the global generators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor
from torchvision.transforms import v2

from transferkit.errors import ConfigError
from transferkit.images.views import (
    TUTORIAL_SCALE,
    View,
    crop_and_flip,
    describe_crop_and_flip,
)

NUM_STRENGTHS = 31
"""The strengths of an operation are numbered from 0 to 30, as in the papers."""

RAND_STRENGTH = 9
STRONG_STRENGTH = 15
NUM_OPERATIONS = 2

ERASING_PROBABILITY = 0.25
ERASING_SCALE = (0.02, 0.33)
ERASING_RATIOS = (0.3, 3.3)
ERASING_VALUE = 127
"""Grey, close to the mean of photographs, which normalisation brings close to 0."""

# Of the interpolations, torchvision shears and rotates tensors with this one and "nearest".
_MODE = v2.InterpolationMode.BILINEAR
_OPERATIONS = (
    "identity, shear, shift, rotation, brightness, colour, contrast, sharpness, posterize, "
    "solarize, autocontrast, equalize"
)


@dataclass(frozen=True, kw_only=True)
class PolicyView(View, ABC):
    """The crop and flip of the lesson, and then transforms of torchvision.

    These know of no generator but PyTorch's global one, which threads share. So the views
    are made one at a time where threads load the pictures.
    """

    name: ClassVar[str]
    seedable: ClassVar[bool] = False

    @abstractmethod
    def build(self) -> Callable[[Tensor], Tensor]:
        """Return what follows the crop and flip, from uint8 `(C, h, w)` to the same."""

    @abstractmethod
    def describe_policy(self) -> str:
        """Return what follows the crop and flip in words."""

    @cached_property
    def _policy(self) -> Callable[[Tensor], Tensor]:
        return self.build()

    def __call__(self, image: Tensor) -> Tensor:
        """Return a view, uint8 `(C, size, size)`, of a picture, uint8 `(C, H, W)`.

        Raises:
            ConfigError: The picture has neither 1 nor 3 channels.
        """
        if image.shape[-3] not in (1, 3):
            raise ConfigError(
                f"The augmentation `{self.name}` is for pictures of 1 or 3 channels, found "
                f"{image.shape[-3]}. `tutorial`, `light` and `none` take any number."
            )
        return self._policy(crop_and_flip(image, self, TUTORIAL_SCALE, None))

    def describe(self) -> str:
        """Return the preset in words."""
        return f"{describe_crop_and_flip(self, TUTORIAL_SCALE)}, {self.describe_policy()}"


@dataclass(frozen=True, kw_only=True)
class TrivialAugmentView(PolicyView):
    """One random operation of a random strength.

    References:
        Müller and Hutter, TrivialAugment: Tuning-free Yet State-of-the-Art Data
        Augmentation, 2021, https://arxiv.org/abs/2103.10158
    """

    name: ClassVar[str] = "trivial_augment"

    def build(self) -> Callable[[Tensor], Tensor]:
        """Return TrivialAugment, "wide" in the paper."""
        policy: Callable[[Tensor], Tensor] = v2.TrivialAugmentWide(
            num_magnitude_bins=NUM_STRENGTHS, interpolation=_MODE
        )
        return policy

    def describe_policy(self) -> str:
        """Return TrivialAugment in words."""
        return (
            f"one random operation of TrivialAugment Wide ({_OPERATIONS}), of a random "
            f"strength from 0 to {NUM_STRENGTHS - 1}"
        )


@dataclass(frozen=True, kw_only=True)
class RandAugmentView(PolicyView):
    """Two random operations of one strength.

    References:
        Cubuk et al., RandAugment: Practical automated data augmentation with a reduced
        search space, 2020, https://arxiv.org/abs/1909.13719
    """

    name: ClassVar[str] = "rand_augment"

    def build(self) -> Callable[[Tensor], Tensor]:
        """Return RandAugment."""
        return _rand_augment(RAND_STRENGTH)

    def describe_policy(self) -> str:
        """Return RandAugment in words."""
        return _describe_rand_augment(RAND_STRENGTH)


@dataclass(frozen=True, kw_only=True)
class StrongView(PolicyView):
    """RandAugment of a higher strength, and a rectangle that is erased now and then.

    References:
        Cubuk et al., RandAugment: Practical automated data augmentation with a reduced
        search space, 2020, https://arxiv.org/abs/1909.13719

        Zhong et al., Random Erasing Data Augmentation, 2020,
        https://arxiv.org/abs/1708.04896
    """

    name: ClassVar[str] = "strong"

    def build(self) -> Callable[[Tensor], Tensor]:
        """Return RandAugment and random erasing."""
        erasing = v2.RandomErasing(
            p=ERASING_PROBABILITY, scale=ERASING_SCALE, ratio=ERASING_RATIOS, value=ERASING_VALUE
        )
        policy: Callable[[Tensor], Tensor] = v2.Compose([_rand_augment(STRONG_STRENGTH), erasing])
        return policy

    def describe_policy(self) -> str:
        """Return RandAugment and random erasing in words."""
        return (
            f"{_describe_rand_augment(STRONG_STRENGTH)}, a rectangle of "
            f"{100 * ERASING_SCALE[0]:g} to {100 * ERASING_SCALE[1]:g} % of the area with sides "
            f"{ERASING_RATIOS[0]:g} to {ERASING_RATIOS[1]:g} set to grey ({ERASING_VALUE}) "
            f"with probability {ERASING_PROBABILITY:g}"
        )


def _rand_augment(strength: int) -> Callable[[Tensor], Tensor]:
    policy: Callable[[Tensor], Tensor] = v2.RandAugment(
        num_ops=NUM_OPERATIONS,
        magnitude=strength,
        num_magnitude_bins=NUM_STRENGTHS,
        interpolation=_MODE,
    )
    return policy


def _describe_rand_augment(strength: int) -> str:
    return (
        f"{NUM_OPERATIONS} random operations of RandAugment ({_OPERATIONS}), of strength "
        f"{strength} of {NUM_STRENGTHS - 1}"
    )
