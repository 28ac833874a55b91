"""Whether a phase trains on cached features, and why or why not."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from transferkit.errors import ConfigError
from transferkit.models import Classifier
from transferkit.models.modes import evaluating
from transferkit.models.splitting import Split
from transferkit.training.feature_cache import FeatureCache

if TYPE_CHECKING:
    from transferkit.training.job import Job

CacheChoice: TypeAlias = "FeatureCache | bool | Literal['auto']"
"""How features are cached: as a `FeatureCache` says; True or "auto" as a default one says, True
with an error where it cannot be; False not at all."""


def check_cache(cache: CacheChoice) -> CacheChoice:
    """Return the choice.

    Raises:
        ConfigError: It is none.
    """
    if isinstance(cache, (FeatureCache, bool)) or cache == "auto":
        return cache
    raise ConfigError(f'`cache` should be "auto", True, False or a FeatureCache, found {cache!r}.')


def settings_of(cache: CacheChoice) -> FeatureCache:
    """Return how features are cached, where they are."""
    return cache if isinstance(cache, FeatureCache) else FeatureCache()


def describe_cache(cache: CacheChoice) -> dict[str, object] | bool | str:
    """Return how features are cached, as plain JSON data."""
    if not isinstance(cache, FeatureCache):
        return cache
    folder = None if cache.folder is None else os.fspath(cache.folder)
    return asdict(cache) | {"folder": folder}


def find_split(job: Job, *, epochs: int) -> Split | str:
    """Return the parts of the backbone between which features are cached.

    Args:
        job: The job; what is frozen in its model is so already.
        epochs: The epochs of the phase.

    Returns:
        The parts, or why nothing is cached.
    """
    if job.cache is False:
        return "switched off by cache=False"
    if job.mixing is not None:
        return "a batch augmentation mixes pictures, not features"
    split = job.model.split()
    if split is None:
        return _why_nothing_is_inert(job.model)
    if job.cache == "auto":
        return _why_there_is_no_room(job, split, epochs=epochs) or split
    return split


def _why_there_is_no_room(job: Job, split: Split, *, epochs: int) -> str | None:
    """Say why features that nobody asked for are too many; None where they are not."""
    settings = settings_of(job.cache)
    images = len(job.data.train) * settings.num_passes(epochs) + len(job.data.val)
    # Activations inside a network are large: only if they fit the memory. Features may spill.
    per_image = job.model.num_features if split.is_whole else activation_size(job.model, split)
    size = 4 * images * per_image
    if size <= settings.memory_bytes:
        return None
    if not split.is_whole:
        return (
            f"the activations of {images:,} pictures take {size:,} bytes, more than the "
            f"{settings.memory_bytes:,} of `memory_bytes`"
        )
    room = shutil.disk_usage(tempfile.gettempdir()).free // 2
    if size - settings.memory_bytes <= room:
        return None
    return (
        f"the features of {images:,} pictures take {size:,} bytes, more than the "
        f"{settings.memory_bytes:,} of `memory_bytes` and half of what is free in "
        f"`{tempfile.gettempdir()}`"
    )


def _why_nothing_is_inert(model: Classifier) -> str:
    if model.freeze_plan.bn in ("adapt", "train"):
        return f'bn="{model.freeze_plan.bn}" changes the frozen part'
    if model.num_inert_stages or model.is_backbone_frozen:
        return "the backbone cannot be cut at a stage that is frozen"
    return "the first stage of the backbone trains"


def activation_size(model: Classifier, split: Split) -> int:
    """Return the number of values that the prefix gives for one picture."""
    size = model.preprocess.crop_size
    parameter = next(model.parameters())
    image = torch.zeros(1, model.preprocess.num_channels, size, size, device=parameter.device)
    with evaluating(model), torch.no_grad():
        return int(split.prefix(image).numel())
