"""How a fit loads its pictures, as one value that every loader of the fit is made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from transferkit._checks import check_callable, check_integer, check_type
from transferkit._device import has_streams
from transferkit._seeding import seeded
from transferkit.data import Batch, ImageDataset, ImageLoader, ImageSplits, class_weights
from transferkit.data.loader import (
    OnError,
    WorkerType,
    check_on_error,
    check_share,
    num_cores,
    resolve_num_workers,
)
from transferkit.data.prefetch import Numbered, prefetch, to_images
from transferkit.errors import ConfigError
from transferkit.evaluation import Metric
from transferkit.images import Augmentation, Transform, decode_image, make_batch_augmentation
from transferkit.models import Classifier
from transferkit.training.distributed import World
from transferkit.training.forward import Criterion
from transferkit.training.history import RECORD_FIELDS
from transferkit.training.resident import KeptBatches

BatchTransform: TypeAlias = "Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]"
"""A callable from images (N, C, h, w) and targets (N,) to images and soft targets (N, classes)."""

Balance: TypeAlias = Literal["sampler", "weights"]

DEFAULT_CACHE_BYTES = 2**29

_OF_METRICS = ("reset", "update", "compute")

# Keeps the draws for a whole batch apart from those for its pictures.
_BATCH_DRAWS = 2**32


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a fit loads its pictures; see `Trainer` for the fields.

    Raises:
        ConfigError: A value cannot work.
    """

    model: Classifier
    batch_size: int
    seed: int
    device: torch.device
    num_workers: int | Literal["auto"]
    worker_type: WorkerType
    cache_bytes: int
    on_error: OnError
    max_skipped: float
    verbose: bool = False
    world: World = field(default_factory=World)

    def __post_init__(self) -> None:
        check_integer("cache_bytes", self.cache_bytes, minimum=0)
        check_on_error(self.on_error)
        check_share("max_skipped", self.max_skipped)

    def loader(
        self,
        dataset: ImageDataset,
        transform: Transform,
        *,
        shuffle: bool = False,
        balanced: bool = False,
        cache_share: float = 0.0,
        batch_size: int | None = None,
        is_shared: bool = False,
    ) -> ImageLoader:
        """Make a loader.

        Args:
            dataset: The pictures, decoded as the model's preprocessing says unless the data
                set has a way of its own.
            transform: From pixels to images.
            shuffle: Draw a new order each epoch.
            balanced: Show each class equally often.
            cache_share: The part of the memory for kept pictures that it may use.
            batch_size: Pictures in a batch; None takes the fit's.
            is_shared: Give this process's part of each batch only.
        """
        if dataset.decode is decode_image:
            dataset = dataset.with_decode(self.model.preprocess.decode)
        return ImageLoader(
            dataset,
            transform,
            batch_size=self.batch_size if batch_size is None else batch_size,
            shuffle=shuffle,
            balanced=balanced,
            seed=self.seed,
            num_workers=self._choose_num_workers(len(dataset)),
            worker_type=self.worker_type,
            cache_bytes=int(self.cache_bytes * cache_share),
            on_error=self.on_error,
            max_skipped=self.max_skipped,
            pin_memory=has_streams(self.device),
            part=(self.world.rank, self.world.size) if is_shared else (0, 1),
        )

    def passes(
        self, data: ImageSplits, augmentation: str | Augmentation, *, balanced: bool
    ) -> tuple[ImageLoader, ImageLoader]:
        """Make the loaders of the training and the validation passes.

        Args:
            data: The splits.
            augmentation: How training pictures are augmented.
            balanced: Show each class equally often in training.
        """
        share = self._share(data)
        train = self.loader(
            data.train,
            self.train_transform(augmentation),
            shuffle=True,
            balanced=balanced,
            cache_share=share,
            is_shared=True,
        )
        # On the CPU, `keep` has that share of the memory.
        share = 0.0 if self.device.type == "cpu" else 1 - share
        pixels = self.model.preprocess.eval(normalize=False)
        return train, self.loader(data.val, pixels, cache_share=share, is_shared=True)

    def keep(self, val: ImageLoader, data: ImageSplits) -> KeptBatches:
        """Return what gives the validation batches pass after pass, and keeps those that fit.

        Args:
            val: Their loader.
            data: The splits.
        """
        budget = int(self.cache_bytes * (1 - self._share(data)))
        return KeptBatches(val, self.device, budget=budget)

    def _share(self, data: ImageSplits) -> float:
        """Return the part of the memory for kept pictures that training pictures may take."""
        return len(data.train) / (len(data.train) + len(data.val))

    def train_transform(self, augmentation: str | Augmentation) -> Transform:
        """Return the random transform of training; an accelerator normalises by itself."""
        return self.model.preprocess.train(augmentation, normalize=not self.sends_pixels)

    def eval_transform(self) -> Transform:
        """Return the deterministic transform, likewise."""
        return self.model.preprocess.eval(normalize=not self.sends_pixels)

    @property
    def sends_pixels(self) -> bool:
        """Whether loaders give pixels, which `images` normalises on the device."""
        return self.device.type != "cpu"

    def images(self, loaded: Iterable[Numbered]) -> Iterator[Numbered]:
        """Bring numbered batches to the device, and make images of pixels there."""
        return to_images(prefetch(loaded, self.device), self.model.preprocess)

    def _choose_num_workers(self, num_images: int) -> int | Literal["auto"]:
        # A network that computes on the CPU has all cores busy, but for the gaps between its
        # layers: one worker fills them, more would take turns with it.
        if self.num_workers == "auto" and self.device.type == "cpu":
            return min(1, resolve_num_workers("auto", num_images=num_images), num_cores() - 1)
        return self.num_workers


def list_skipped(**loaders: ImageLoader) -> list[dict[str, str]]:
    """Return the pictures that each split's loader left out so far, as plain data."""
    return [
        {"split": name, "path": str(each.path), "reason": each.reason}
        for name, loader in loaders.items()
        for each in loader.skipped
    ]


def find_split(data: ImageSplits, split: str | ImageDataset) -> ImageDataset:
    """Return a split by name, or the data set that was given in its place.

    Raises:
        ConfigError: There is no such split, or the class names differ.
    """
    splits = data.named()
    if isinstance(split, str):
        if split not in splits:
            raise ConfigError(f"There is no split `{split}`; there are {', '.join(splits)}.")
        return splits[split]
    check_type("split", split, ImageDataset, "the name of a split or an ImageDataset")
    if split.class_names != data.class_names:
        raise ConfigError(
            f"The data set has the classes {list(split.class_names)}, the model was trained "
            f"on {list(data.class_names)}. They should be the same in the same order."
        )
    return split


def check_balance(balance: Balance | None, criterion: Criterion | None) -> Balance | None:
    """Return how rare classes are made to count.

    Raises:
        ConfigError: There is no such way, or a criterion would be ignored.
    """
    if balance not in (None, "sampler", "weights"):
        raise ConfigError(f'`balance` should be "sampler", "weights" or None, found {balance!r}.')
    if balance == "weights" and criterion is not None:
        raise ConfigError(
            '`balance="weights"` makes the criterion, so that yours would be ignored. Leave one '
            "out, or give yours the weights of `class_weights(data.train)`."
        )
    return balance


def make_criterion(
    criterion: Criterion | None,
    balance: Balance | None,
    dataset: ImageDataset,
    *,
    label_smoothing: float = 0.0,
) -> Criterion:
    """Return the criterion: the given one, or cross-entropy, weighted where that was asked.

    Args:
        criterion: The given one, or None.
        balance: How rare classes are made to count.
        dataset: The training pictures.
        label_smoothing: The share of each target that goes to all classes alike, in [0, 1).

    Raises:
        ConfigError: The smoothing is out of range, or would be ignored.
    """
    smoothing = check_share("label_smoothing", label_smoothing)
    if criterion is not None and smoothing:
        raise ConfigError(
            "`label_smoothing` belongs to the default criterion and would be ignored with yours. "
            "Leave one out, or give yours the smoothing."
        )
    if criterion is not None:
        return criterion
    weight = class_weights(dataset) if balance == "weights" else None
    return nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)


def check_metrics(metrics: Mapping[str, Metric] | None, device: torch.device) -> dict[str, Metric]:
    """Return further metrics, those that are modules on the device.

    Raises:
        ConfigError: One is no metric, or has the name of what records have anyway.
    """
    if metrics is None:
        return {}
    check_type("metrics", metrics, Mapping, "a mapping from names to metrics")
    for name, metric in metrics.items():
        if not isinstance(name, str) or name in (*RECORD_FIELDS, "metrics"):
            raise ConfigError(
                f"The name of a metric should be a text that records do not have yet, found "
                f"{name!r}."
            )
        if not all(callable(getattr(metric, each, None)) for each in _OF_METRICS):
            raise ConfigError(
                f"The metric `{name}` should have {', '.join(_OF_METRICS)}, as those of "
                f"torchmetrics do, found {type(metric).__name__}."
            )
        if isinstance(metric, nn.Module):
            metric.to(device)
    return dict(metrics)


def make_batch_transform(
    batch_augmentation: str | BatchTransform | None, num_classes: int
) -> BatchTransform | None:
    """Return what mixes the pictures of a batch.

    Raises:
        UnknownNameError: There is none of that name.
        ConfigError: It cannot be called.
    """
    if isinstance(batch_augmentation, str):
        return make_batch_augmentation(batch_augmentation, num_classes=num_classes)
    if batch_augmentation is not None:
        words = "a name, or a callable from (images, targets) to both"
        check_callable("batch_augmentation", batch_augmentation, words)
    return batch_augmentation


def mix(transform: BatchTransform, batch: Batch, *, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Mix a batch under a seed of its own: a function of (seed, epoch, its pictures).

    Args:
        transform: What mixes.
        batch: The batch, on any device.
        seed: The seed.
        epoch: The epoch.

    Returns:
        Images `(N, C, h, w)` and soft targets `(N, classes)`.
    """
    with seeded(seed, epoch, _BATCH_DRAWS, int(batch.indices[0])):
        return transform(batch.images, batch.targets)
