"""`Preprocess`: the way from pixels to the network's input, as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from transferkit._checks import check_integer
from transferkit.errors import ConfigError
from transferkit.images.augment import Augmentation, make_augmentation
from transferkit.images.channels import decode_channels
from transferkit.images.decode import (
    MAX_PIXELS,
    Decoder,
    ImageSource,
    check_decoding,
)
from transferkit.images.geometry import resize, trim_extreme
from transferkit.images.seedable import is_seedable

Transform: TypeAlias = "Callable[[Tensor], Tensor]"
"""A callable from pixels uint8 (C, H, W) to the network's input float32 (C, h, w)."""

Interpolation: TypeAlias = Literal["bilinear", "bicubic"]
ResizeMode: TypeAlias = Literal["shorter", "squash"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Describe how pixels become the input of a network.

    The description comes from the backbone's weights, travels in the artifact and builds
    both transforms, so that prediction never guesses.

    Args:
        crop_size: Height and width in pixels of what the network sees.
        resize_size: Size in pixels to resize to before the centre crop; at least `crop_size`.
        resize_mode: "shorter" brings the shorter side to `resize_size` and keeps the
            proportions; "squash" makes a square of it.
        interpolation: Resampling, always antialiased.
        mean: Mean of each channel, for pixels in [0, 1]. Three channels are RGB, one is
            grey. There are as many channels as means.
        std: Standard deviation of each channel, for pixels in [0, 1].
        decoder: What decodes plain JPEG files, see `decode_image`.
        max_pixels: The most pixels of a picture that is decoded.

    Raises:
        ConfigError: A value cannot work.

    Example:
        >>> preprocess = Preprocess(crop_size=224, resize_size=256)
        >>> preprocess.eval()(torch.zeros(3, 300, 400, dtype=torch.uint8)).shape
        torch.Size([3, 224, 224])
        >>> print(preprocess.describe())
        shorter side to 256 (bilinear), centre crop 224x224, \
mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)
    """

    crop_size: int = 224
    resize_size: int = 256
    resize_mode: ResizeMode = "shorter"
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    decoder: Decoder = "torchvision"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        for name in ("crop_size", "resize_size"):
            value = check_integer(name, getattr(self, name), minimum=1)
            object.__setattr__(self, name, value)
        if self.resize_size < self.crop_size:
            raise ConfigError(
                f"`resize_size` should be at least `crop_size` ({self.crop_size}), "
                f"found {self.resize_size}."
            )
        _check_choice("resize_mode", self.resize_mode, get_args(ResizeMode))
        _check_choice("interpolation", self.interpolation, get_args(Interpolation))
        object.__setattr__(self, "mean", _check_channels("mean", self.mean))
        object.__setattr__(self, "std", _check_channels("std", self.std))
        if len(self.mean) != len(self.std):
            raise ConfigError(
                f"`mean` and `std` should have one number for each channel, found "
                f"{len(self.mean)} and {len(self.std)}: {self.mean} and {self.std}."
            )
        if min(self.std) <= 0:
            raise ConfigError(f"`std` should be above 0 in every channel, found {self.std}.")
        object.__setattr__(self, "max_pixels", check_decoding(self.decoder, self.max_pixels))

    @property
    def num_channels(self) -> int:
        """The number of channels C of the images: 3 for RGB, 1 for grey."""
        return len(self.mean)

    def decode(self, source: ImageSource) -> Tensor:
        """Read one picture as upright pixels, with this description's decoder and limit.

        Args:
            source: For 3 channels what `decode_image` takes. For 1 channel that too, made
                grey by its luma (ITU-R BT.601), and grey pixels uint8 as an array `(H, W)`
                or `(H, W, 1)` or a tensor `(H, W)` or `(1, H, W)`. For any other number of
                channels C, uint8, an array `(H, W, C)` or a tensor `(C, H, W)`.

        Returns:
            uint8 `(C, H, W)`.

        Raises:
            ImageError: It cannot be read as a picture with so many channels.
        """
        return decode_channels(
            source, self.num_channels, decoder=self.decoder, max_pixels=self.max_pixels
        )

    def resize(self, pixels: Tensor) -> Tensor:
        """Bring a picture to the size from which the network's view is cropped.

        Args:
            pixels: uint8 `(C, H, W)`.

        Returns:
            uint8 `(C, h, w)`, no side shorter than `resize_size`.

        Example:
            >>> preprocess = Preprocess(crop_size=24, resize_size=30)
            >>> preprocess.resize(torch.zeros(3, 120, 60, dtype=torch.uint8)).shape
            torch.Size([3, 60, 30])
        """
        if self.resize_mode == "squash":
            return resize(pixels, [self.resize_size, self.resize_size], self.interpolation)
        return resize(trim_extreme(pixels), [self.resize_size], self.interpolation)

    def eval(self, *, normalize: bool = True) -> Transform:
        """Build the deterministic transform for validation and prediction.

        Args:
            normalize: Normalise each picture. False leaves that to `normalize`, which does it
                for a whole batch on any device: pixels are a quarter of the bytes to move there.

        Returns:
            A callable from uint8 `(C, H, W)` to `(C, crop_size, crop_size)`: float32, or uint8
            without normalisation.
        """
        return _EvalTransform(self, normalize)

    def train(
        self, augmentation: str | Augmentation = "tutorial", *, normalize: bool = True
    ) -> Transform:
        """Build the random transform for training.

        Args:
            augmentation: A preset's name (`list_augmentations()` names them) or any
                callable from uint8 `(C, H, W)` to uint8 `(C, crop_size, crop_size)`,
                such as a torchvision v2 transform. One that is seedable (`is_seedable`) is
                given a generator by the loader, seeded by (seed, epoch, index); others draw
                from the global generators, which the loader seeds so.
            normalize: As for `eval`.

        Returns:
            A callable from uint8 `(C, H, W)` to `(C, crop_size, crop_size)`: float32, or uint8
            without normalisation.

        Raises:
            UnknownNameError: No preset has this name.
        """
        if isinstance(augmentation, str):
            augmentation = make_augmentation(
                augmentation, size=self.crop_size, interpolation=self.interpolation
            )
        return _TrainTransform(self, augmentation, normalize)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Turn pixels into normalised values, where the pixels are.

        On the CPU a picture gives the same bits by itself and in a batch. An accelerator may
        round the last bit in another way.

        Args:
            pixels: uint8 `(..., C, H, W)` in [0, 255], on any device.

        Returns:
            float32 of the same shape on the same device, `(pixels / 255 - mean) / std`, the
            channels last in memory.

        Raises:
            ConfigError: They have another number of channels.
        """
        self._check_num_channels(pixels)
        layout = torch.contiguous_format
        values = pixels.movedim(-3, -1).to(torch.float32, memory_format=layout)
        # One multiplication and addition along whole rows is five times as fast as a
        # channel after the other.
        rows = values.flatten(-2)
        factor, shift = _make_affine(self.mean, self.std, values.shape[-2], rows.device)
        torch.addcmul(shift, rows, factor, out=rows)
        return values.movedim(-1, -3)

    def denormalize(self, images: Tensor) -> Tensor:
        """Undo `normalize` up to the rounding to 8 bits, for looking at the result.

        Args:
            images: Normalised float `(..., C, H, W)`. Not changed.

        Returns:
            float32 of the same shape on the same device, clipped to [0, 1].

        Raises:
            ConfigError: They have another number of channels.
        """
        self._check_num_channels(images)
        shape = (self.num_channels, 1, 1)
        mean = torch.tensor(self.mean, device=images.device).view(shape)
        std = torch.tensor(self.std, device=images.device).view(shape)
        return (images.float() * std + mean).clamp(0.0, 1.0)

    def _check_num_channels(self, images: Tensor) -> None:
        # One mean would be spread over any number of channels, without a word.
        if images.dim() < 3 or images.shape[-3] != self.num_channels:
            raise ConfigError(
                f"Images of this preprocessing should have the shape "
                f"(..., {self.num_channels}, H, W), found {tuple(images.shape)}. "
                f"`Preprocess.decode` reads pictures so."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the description as plain JSON data."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocess:
        """Build the description from what `to_dict` returned.

        The decoder may be missing: it was Pillow before there was a choice.

        Raises:
            ConfigError: A field is missing, unknown or has a value that cannot work.
        """
        # Descriptions from before there was a choice were all of pictures that Pillow decoded.
        data = {"decoder": "pillow", "max_pixels": MAX_PIXELS, **data}
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            raise ConfigError(
                f"A preprocess description should have the fields {sorted(names)}, "
                f"found {sorted(data)}."
            )
        return cls(**data)

    def describe(self) -> str:
        """Return the description in words."""
        resize = (
            f"shorter side to {self.resize_size}"
            if self.resize_mode == "shorter"
            else f"resize to {self.resize_size}x{self.resize_size}"
        )
        mean, std = (tuple(round(value, 4) for value in each) for each in (self.mean, self.std))
        return (
            f"{resize} ({self.interpolation}), centre crop {self.crop_size}x{self.crop_size}, "
            f"mean {mean}, std {std}"
        )


@dataclass(frozen=True)
class _EvalTransform:
    """Resize, crop and normalise; a class rather than a closure, so that workers can pickle it."""

    preprocess: Preprocess
    normalize: bool = True
    seedable: ClassVar[bool] = True

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        spec = self.preprocess
        view: Tensor = F.center_crop(spec.resize(image), [spec.crop_size, spec.crop_size])
        return spec.normalize(view) if self.normalize else view


@dataclass(frozen=True)
class _TrainTransform:
    """Augment and normalise."""

    preprocess: Preprocess
    augmentation: Augmentation
    normalize: bool = True

    @property
    def seedable(self) -> bool:
        return is_seedable(self.augmentation)

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if generator is None:
            image = self.augmentation(image)
        else:
            image = self.augmentation(image, generator=generator)  # type: ignore[call-arg]
        channels, size = self.preprocess.num_channels, self.preprocess.crop_size
        if image.dtype != torch.uint8 or image.shape != (channels, size, size):
            raise ConfigError(
                f"An augmentation should return uint8 ({channels}, {size}, {size}), found "
                f"{str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}. "
                f"Normalisation is done after it."
            )
        return self.preprocess.normalize(image) if self.normalize else image


@lru_cache(maxsize=32)
def _make_affine(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return what a row of pixels, the channels last, is multiplied with, and what is added.

    They are kept on the device: to bring them there for each batch would make it wait.
    """
    means, stds = torch.tensor(mean), torch.tensor(std)
    factor, shift = 1 / (255 * stds), -means / stds
    return factor.repeat(width).to(device), shift.repeat(width).to(device)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(
            f"`{name}` should be one of {', '.join(map(repr, choices))}, found {value!r}."
        )


def _check_channels(name: str, values: Any) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
        if not numbers or not all(math.isfinite(value) for value in numbers):
            raise ValueError
    except (TypeError, ValueError):
        raise ConfigError(
            f"`{name}` should be finite numbers, one for each channel (three for red, green and "
            f"blue), found {values!r}."
        ) from None
    return numbers
