"""Augmentation presets that draw from a generator of their own, so that threads may share them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional as F

from transferkit._checks import check_integer
from transferkit.errors import ConfigError
from transferkit.images.geometry import resize, trim_extreme

INTERPOLATIONS = ("bilinear", "bicubic")

TUTORIAL_SCALE = (0.08, 1.0)
"""Smallest and largest share of the area in a random crop, as in the lesson."""

LIGHT_SCALE = (0.5, 1.0)
LIGHT_FACTORS = (0.8, 1.2)
"""Smallest and largest factor of brightness, and of contrast."""

SIDE_RATIOS = (3 / 4, 4 / 3)
"""Smallest and largest width of a random crop relative to its height."""

FLIP_PROBABILITY = 0.5
NUM_TRIES = 10
"""How often a crop is drawn that must lie within the picture, before the middle is taken."""

# In single precision like torchvision's, so that the drawn numbers are the same to the bit.
_LOG_RATIOS: tuple[float, float] = tuple(torch.log(torch.tensor(SIDE_RATIOS)).tolist())

Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


@dataclass(frozen=True, kw_only=True)
class View:
    """What all presets have.

    Args:
        size: Height and width of the result in pixels, at least 1.
        interpolation: "bilinear" or "bicubic", antialiased.

    Raises:
        ConfigError: A value cannot work.
    """

    size: int
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", check_integer("size", self.size, minimum=1))
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(
                f"`interpolation` should be one of {', '.join(map(repr, INTERPOLATIONS))}, "
                f"found {self.interpolation!r}."
            )


@dataclass(frozen=True, kw_only=True)
class CentreView(View):
    """The middle of the picture, nothing random.

    Example:
        >>> print(CentreView(size=224).describe())
        shorter side to 224 (bilinear), centre crop 224x224
    """

    seedable: ClassVar[bool] = True

    def __call__(self, image: Tensor, generator: Generator | None = None) -> Tensor:
        """Return the view, uint8 `(C, size, size)`, of a picture, uint8 `(C, H, W)`."""
        image = resize(trim_extreme(image), [self.size], self.interpolation)
        view: Tensor = F.center_crop(image, [self.size, self.size])
        return view

    def describe(self) -> str:
        """Return the preset in words."""
        return (
            f"shorter side to {self.size} ({self.interpolation}), "
            f"centre crop {self.size}x{self.size}"
        )


@dataclass(frozen=True, kw_only=True)
class TutorialView(View):
    """Random resized crop and flip; draws what torchvision's transforms draw.

    Example:
        >>> view = TutorialView(size=8)
        >>> image = torch.arange(600, dtype=torch.uint8).view(3, 10, 20)
        >>> first, second = (view(image, torch.Generator().manual_seed(1)) for _ in range(2))
        >>> torch.equal(first, second)
        True
    """

    seedable: ClassVar[bool] = True

    def __call__(self, image: Tensor, generator: Generator | None = None) -> Tensor:
        """Return a view, uint8 `(C, size, size)`, of a picture, uint8 `(C, H, W)`."""
        return crop_and_flip(image, self, TUTORIAL_SCALE, generator)

    def describe(self) -> str:
        """Return the preset in words."""
        return describe_crop_and_flip(self, TUTORIAL_SCALE)


@dataclass(frozen=True, kw_only=True)
class LightView(View):
    """A larger crop, flip, and a little more or less brightness and contrast."""

    seedable: ClassVar[bool] = True

    def __call__(self, image: Tensor, generator: Generator | None = None) -> Tensor:
        """Return a view, uint8 `(C, size, size)`, of a picture, uint8 `(C, H, W)`."""
        image = crop_and_flip(image, self, LIGHT_SCALE, generator)
        brightness, contrast = (_draw(*LIGHT_FACTORS, generator).item() for _ in range(2))
        return change_light(image, brightness=brightness, contrast=contrast)

    def describe(self) -> str:
        """Return the preset in words."""
        factors = f"times {LIGHT_FACTORS[0]:g} to {LIGHT_FACTORS[1]:g}"
        crop = describe_crop_and_flip(self, LIGHT_SCALE)
        return f"{crop}, brightness {factors}, contrast {factors}"


def crop_and_flip(
    image: Tensor, view: View, scale: tuple[float, float], generator: Generator | None
) -> Tensor:
    """Cut a random box out of a picture, resize it, and flip it left to right or not.

    Args:
        image: uint8 `(C, H, W)`. Not changed, but the result may share its memory.
        view: Says the size and the interpolation.
        scale: Smallest and largest share of the area.
        generator: What to draw from; None is PyTorch's global generator.

    Returns:
        uint8 `(C, size, size)`.
    """
    top, left, height, width = draw_box(image.shape[-2], image.shape[-1], scale, generator)
    image = F.crop(image, top, left, height, width)
    image = resize(image, [view.size, view.size], view.interpolation)
    if torch.rand(1, generator=generator) < FLIP_PROBABILITY:
        image = F.horizontal_flip(image)
    return image


def draw_box(
    height: int, width: int, scale: tuple[float, float], generator: Generator | None
) -> Box:
    """Draw a box within a picture.

    Where no box of the drawn areas and proportions fits, as in a very long picture, it is
    the largest box in the middle whose proportions are allowed.

    Args:
        height: Height of the picture, at least 1.
        width: Width of the picture, at least 1.
        scale: Smallest and largest share of the area.
        generator: What to draw from; None is PyTorch's global generator.

    Returns:
        Top, left, height and width, all within the picture.

    References:
        Szegedy et al., Going Deeper with Convolutions, 2014, https://arxiv.org/abs/1409.4842
    """
    for _ in range(NUM_TRIES):
        area = height * width * _draw(*scale, generator).item()
        ratio = torch.exp(_draw(*_LOG_RATIOS, generator)).item()
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = _draw_integer(height - box_height + 1, generator)
            left = _draw_integer(width - box_width + 1, generator)
            return top, left, box_height, box_width
    box_height = min(height, round(width / SIDE_RATIOS[0]))
    box_width = min(width, round(height * SIDE_RATIOS[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def change_light(image: Tensor, *, brightness: float, contrast: float) -> Tensor:
    """Multiply the values of a picture, and their distances from their mean.

    Which of the two is done first makes no difference.

    Args:
        image: uint8 `(C, H, W)`. Not changed.
        brightness: Factor of all values; 1 changes nothing.
        contrast: Factor of the distances from the mean of all channels; 1 changes nothing.

    Returns:
        uint8 `(C, H, W)`, rounded and clipped to [0, 255].

    Example:
        >>> image = torch.tensor([80, 120], dtype=torch.uint8).view(1, 1, 2)
        >>> change_light(image, brightness=1.5, contrast=0.5).tolist()
        [[[135, 165]]]
    """
    # A sum of integers is the same to the bit in every memory layout.
    mean = image.sum(dtype=torch.int64).item() / image.numel()
    values = image.to(torch.float32).mul_(brightness * contrast)
    values.add_(brightness * (1 - contrast) * mean)
    return values.round_().clamp_(0, 255).to(torch.uint8)


def describe_crop_and_flip(view: View, scale: tuple[float, float]) -> str:
    """Return `crop_and_flip` in words."""
    return (
        f"random crop of {100 * scale[0]:g} to {100 * scale[1]:g} % of the area with sides "
        f"3:4 to 4:3, resized to {view.size}x{view.size} ({view.interpolation}), "
        f"flipped left to right with probability {FLIP_PROBABILITY:g}"
    )


def _draw(low: float, high: float, generator: Generator | None) -> Tensor:
    return torch.empty(1).uniform_(low, high, generator=generator)


def _draw_integer(count: int, generator: Generator | None) -> int:
    return int(torch.randint(0, count, size=(1,), generator=generator).item())
