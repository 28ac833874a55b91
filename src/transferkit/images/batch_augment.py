"""Augmentation of whole batches: pictures are mixed, and their targets with them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchvision.transforms import v2

from transferkit._checks import check_integer, check_number
from transferkit.errors import ConfigError, unknown_name

MIXUP_ALPHA = 0.2
CUTMIX_ALPHA = 1.0
ALPHAS = (0.01, 1000.0)
"""Smallest and largest alpha. At these, the shares are 0 or 1, and 1/2, to the eye. PyTorch draws
in single precision: below, it gives 1/2 where one of the two should prevail."""

_NAMES = ("cutmix", "mixup", "mixup_or_cutmix")


@dataclass(frozen=True, kw_only=True)
class BatchAugmentation:
    """Mix the pictures of a batch with their neighbours, and the targets alike.

    Args:
        name: "mixup", "cutmix" or "mixup_or_cutmix".
        num_classes: Number of classes, at least 1.
        alpha: Both parameters of the Beta distribution that the share of a picture is drawn
            from. None takes 0.2 for mixup and 1 for CutMix.

    Raises:
        UnknownNameError: There is no batch augmentation of that name.
        ConfigError: Another value cannot work.

    Example:
        >>> mix = BatchAugmentation(name="mixup", num_classes=3)
        >>> images, targets = mix(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 1]))
        >>> images.shape, targets.shape
        (torch.Size([4, 3, 8, 8]), torch.Size([4, 3]))
    """

    name: str
    num_classes: int
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.name not in _NAMES:
            lister = "transferkit.images.list_batch_augmentations()"
            raise unknown_name("batch augmentation", self.name, _NAMES, lister=lister)
        num_classes = check_integer("num_classes", self.num_classes, minimum=1)
        object.__setattr__(self, "num_classes", num_classes)
        if self.alpha is not None:
            low, high = ALPHAS
            words = f"from {low:g} to {high:g}"
            alpha = check_number("alpha", self.alpha, lambda value: low <= value <= high, words)
            object.__setattr__(self, "alpha", alpha)

    @property
    def _alphas(self) -> dict[str, float]:
        """The alpha of each way to mix, by its name."""
        defaults = {"mixup": MIXUP_ALPHA, "cutmix": CUTMIX_ALPHA}
        return {
            way: default if self.alpha is None else self.alpha
            for way, default in defaults.items()
            if self.name in (way, "mixup_or_cutmix")
        }

    @cached_property
    def _mix(self) -> Any:
        kinds = {"mixup": v2.MixUp, "cutmix": v2.CutMix}
        ways = [
            kinds[way](alpha=alpha, num_classes=self.num_classes)
            for way, alpha in self._alphas.items()
        ]
        return ways[0] if len(ways) == 1 else v2.RandomChoice(ways)

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Its randomness comes from PyTorch's global generator of the CPU, wherever the batch
        is. Each picture is mixed with the one before it, so the batch should be shuffled.

        Args:
            images: float32 `(N, C, h, w)`, at least one. Not changed.
            targets: int64 `(N,)`, class indices in `[0, num_classes)`; the range is checked
                on the CPU alone, since elsewhere that would wait for the device.

        Returns:
            The mixed images, float32 `(N, C, h, w)`, and soft targets, float32
            `(N, num_classes)`, whose rows sum to 1. A batch of one comes back as it is.

        Raises:
            ConfigError: The tensors have other shapes, dtypes or values.
        """
        self._check(images, targets)
        if len(images) == 1:
            return images, one_hot(targets, self.num_classes).to(torch.float32)
        mixed, soft_targets = self._mix(images, targets)
        return mixed, soft_targets

    def _check(self, images: Tensor, targets: Tensor) -> None:
        if images.dtype != torch.float32 or images.dim() != 4 or 0 in images.shape:
            raise ConfigError(
                f"`images` should be float32 (N, C, h, w), found {_describe(images)}."
            )
        if targets.dtype != torch.int64 or targets.shape != images.shape[:1]:
            raise ConfigError(
                f"`targets` should be int64 ({len(images)},), found {_describe(targets)}."
            )
        if targets.device.type != "cpu":
            return
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= self.num_classes:
            raise ConfigError(
                f"`targets` should be in [0, {self.num_classes}), found {low if low < 0 else high}."
            )

    def describe(self) -> str:
        """Return what it does in words.

        Example:
            >>> print(BatchAugmentation(name="cutmix", num_classes=2).describe())
            CutMix: a box of the neighbour's pixels, the share kept from Beta(1, 1)
        """
        words = {
            "mixup": "mixup: a sum with the neighbour, the share kept from Beta({0:g}, {0:g})",
            "cutmix": "CutMix: a box of the neighbour's pixels, the share kept from "
            "Beta({0:g}, {0:g})",
        }
        ways = [words[way].format(alpha) for way, alpha in self._alphas.items()]
        return ways[0] if len(ways) == 1 else f"with probability 0.5 each, {'; or '.join(ways)}"


def make_batch_augmentation(
    name: str, *, num_classes: int, alpha: float | None = None
) -> BatchAugmentation:
    """Build the batch augmentation called `name`.

    It is called with images float32 `(N, C, h, w)` and targets int64 `(N,)`, changes neither,
    and returns mixed images of the same shape and soft targets float32 `(N, num_classes)`.
    Each picture is mixed with the one before it, and a batch of one comes back as it is. Its
    randomness comes from PyTorch's global generator of the CPU.

    Args:
        name: "mixup" adds to each picture another one, weighted; "cutmix" puts a box of
            another one into it; "mixup_or_cutmix" does either, with probability 0.5 each.
        num_classes: Number of classes, at least 1.
        alpha: Both parameters of the Beta distribution that the share of a picture is drawn
            from, 0.01 to 1000: below 1 one picture mostly prevails, far above 1 both count
            alike. None takes 0.2 for mixup and 1 for CutMix.

    Returns:
        The callable; it can be pickled.

    Raises:
        UnknownNameError: There is no batch augmentation of that name.
        ConfigError: Another value cannot work.

    Example:
        >>> mix = make_batch_augmentation("mixup", num_classes=2, alpha=0.4)
        >>> images, targets = mix(torch.rand(1, 3, 8, 8), torch.tensor([1]))
        >>> targets
        tensor([[0., 1.]])

    References:
        Zhang et al., mixup: Beyond Empirical Risk Minimization, 2018,
        https://arxiv.org/abs/1710.09412

        Yun et al., CutMix: Regularization Strategy to Train Strong Classifiers with
        Localizable Features, 2019, https://arxiv.org/abs/1905.04899
    """
    return BatchAugmentation(name=name, num_classes=num_classes, alpha=alpha)


def list_batch_augmentations() -> list[str]:
    """Return the names of the batch augmentations, sorted.

    Example:
        >>> list_batch_augmentations()
        ['cutmix', 'mixup', 'mixup_or_cutmix']
    """
    return sorted(_NAMES)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
