"""`Job`: what every fit of a trainer has in common, the phases it runs, and how it is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from transferkit._checks import check_integer
from transferkit.data import ImageLoader, ImageSplits
from transferkit.errors import ConfigError
from transferkit.evaluation import Metric
from transferkit.images import Augmentation
from transferkit.models import Classifier
from transferkit.training.admission import shorten_solved, trains_whole_head_only
from transferkit.training.averaging import WeightAverage
from transferkit.training.checkpoints import Checkpoints
from transferkit.training.distributed import World
from transferkit.training.execution import ChannelsLast
from transferkit.training.feed_choice import CacheChoice, describe_cache, settings_of
from transferkit.training.forward import Criterion
from transferkit.training.head_start import HeadStart
from transferkit.training.loading import Balance, BatchTransform, Loading
from transferkit.training.losses import NanPolicy
from transferkit.training.optimizers import OptimizerFactory
from transferkit.training.phases import Phase, ResolvedPhase, resolve_phases, spread_epochs
from transferkit.training.precision import Precision
from transferkit.training.recipes import Recipe
from transferkit.training.schedulers import Schedule, SchedulerFactory
from transferkit.training.settings import name_of
from transferkit.training.solving import Solver
from transferkit.training.updates import Updates


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What every fit of a trainer has in common; see `Trainer` for what it means.

    Args:
        given: The names of the trainer's arguments that were given and are not None.
        batch_augmentation: As it was given; `mixing` is what came of it.
        channels_last: Likewise; `memory_format` is what came of it.
    """

    model: Classifier
    data: ImageSplits
    recipe: Recipe
    optimizer: str | OptimizerFactory | Optimizer
    scheduler: str | SchedulerFactory | Schedule | LRScheduler
    augmentation: str | Augmentation
    criterion: Criterion
    batch_augmentation: str | BatchTransform | None
    mixing: BatchTransform | None
    balance: Balance | None
    loading: Loading
    train_loader: ImageLoader
    val_loader: ImageLoader
    cache: CacheChoice
    solver: Solver
    head_start: HeadStart
    label_smoothing: float
    l2_sp: float
    average: WeightAverage | None
    wise_ft: bool
    channels_last: ChannelsLast
    memory_format: torch.memory_format
    precision: Precision
    accumulate: int
    clip_norm: float | None
    recomputes: bool
    nan_policy: NanPolicy
    metrics: Mapping[str, Metric]
    checkpoints: Checkpoints | None
    world: World
    seed: int
    device: torch.device
    given: frozenset[str]

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimizer updates in an epoch."""
        return -(-len(self.train_loader) // self.accumulate)

    def updates(self) -> Updates:
        """Return a new optimizer with its schedules, not built yet."""
        return Updates(
            self.model,
            self.recipe,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            metrics=self.metrics.keys(),
        )

    def solves(self, phase: ResolvedPhase) -> bool:
        """Tell whether the solver takes the place of the optimizer in a phase."""
        return self.solver == "lbfgs" and trains_whole_head_only(phase, self.model)

    def views(self, phase: ResolvedPhase) -> frozenset[int]:
        """Return the numbers of the views of training pictures that a cached phase shows."""
        cache = settings_of(self.cache)
        if cache.views != "epochs" and self.solves(phase):
            return cache.views_of(range(1, max(1, cache.views) + 1))
        return cache.views_of(phase.epochs)


def resize_batches(job: Job, size: int) -> Job:
    """Return the job with batches of another size."""
    loading = replace(job.loading, batch_size=size)
    train, val = loading.passes(job.data, job.augmentation, balanced=job.train_loader.balanced)
    return replace(
        job,
        recipe=replace(job.recipe, batch_size=size),
        loading=loading,
        train_loader=train,
        val_loader=val,
    )


def make_phases(
    job: Job, epochs: int | None, phases: Sequence[Phase] | None
) -> tuple[ResolvedPhase, ...]:
    """Return the phases of a fit: the given ones, the recipe's, or one of so many epochs.

    Args:
        job: The job.
        epochs: As for `Trainer.fit`.
        phases: Likewise.

    Raises:
        ConfigError: Both are given, or they do not fit the recipe and the model.
        FreezeError: What a phase freezes or unfreezes is not there.
    """
    resolved = resolve_phases(job.model, _choose_phases(job, epochs, phases))
    return shorten_solved(job.model, resolved, solver=job.solver)


def _choose_phases(job: Job, epochs: int | None, phases: Sequence[Phase] | None) -> Sequence[Phase]:
    if phases is not None:
        if epochs is not None:
            raise ConfigError(
                f"`epochs` is {epochs!r} and `phases` are given, which have epochs of their own. "
                f"Leave one of them out."
            )
        return phases
    recipe = job.recipe
    num_epochs = check_integer("epochs", recipe.epochs if epochs is None else epochs, minimum=1)
    if recipe.phases:
        return spread_epochs(recipe.phases, num_epochs)
    freeze = None
    if recipe.freeze == "backbone" and not job.model.is_backbone_frozen:
        freeze = "backbone"
    return [Phase(recipe.name, num_epochs, freeze=freeze)]


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of an optimizer that are plain data; rates, which change, stand apart."""
    plain = (bool, int, float, str, tuple, list, type(None))
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if isinstance(value, plain) and name not in ("lr", "name")
    }


def describe_job(
    job: Job, phases: Sequence[ResolvedPhase], options: dict[str, Any]
) -> dict[str, Any]:
    """Return what a fit was told, as plain data for the history.

    Args:
        job: The job.
        phases: Its phases.
        options: Those of the optimizer's first group: rates are the optimizer's own.
    """
    rates = {name: options.get(name) for name in ("lr", "momentum", "weight_decay")}
    if options and isinstance(job.optimizer, str):
        rates["lr"] = job.recipe.lr  # Not that of the first step of a warm-up.
    if not isinstance(job.optimizer, str):
        rates |= {"backbone_lr_factor": None, "stage_lr_factor": None}
    return (
        job.recipe.to_dict()
        | rates
        | {
            "epochs": sum(each.phase.epochs for each in phases),
            "phases": [each.phase.to_dict() for each in phases],
            "optimizer": name_of(job.optimizer),
            "scheduler": name_of(job.scheduler),
            "augmentation": name_of(job.augmentation),
            "batch_augmentation": name_of(job.batch_augmentation),
            "balance": job.balance,
            "criterion": name_of(job.criterion),
            "label_smoothing": job.label_smoothing,
            "l2_sp": job.l2_sp,
            "average": None if job.average is None else job.average.average.to_dict(),
            "wise_ft": job.wise_ft,
            "solver": job.solver,
            "cache": describe_cache(job.cache),
            "optimizer_options": _plain(options),
            "precision": job.precision.name,
            "channels_last": job.channels_last,
            "accumulate": job.accumulate,
            "clip_norm": job.clip_norm,
            "activation_checkpointing": job.recomputes,
            "nan_policy": job.nan_policy,
            "seed": job.seed,
            "device": str(job.device),
            "backbone": job.model.backbone_name,
            "head": job.model.head_spec.to_dict(),
            "freeze_plan": phases[0].freeze_plan.to_dict(),
            "num_train": len(job.data.train),
            "num_val": len(job.data.val),
        }
    )
