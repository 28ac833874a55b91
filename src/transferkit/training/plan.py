"""`trainer.plan()`: what a fit will do, worked out before anything runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from transferkit._device import describe_device
from transferkit.models import FreezePlan
from transferkit.training.estimates import Estimate, measure_phase
from transferkit.training.execution import choose_execution, lay_out
from transferkit.training.feed_choice import find_split, settings_of
from transferkit.training.history import EpochRecord
from transferkit.training.interpolation import FACTORS
from transferkit.training.phases import ResolvedPhase, count
from transferkit.training.schedulers import Schedule
from transferkit.training.updates import Updates

if TYPE_CHECKING:
    from transferkit.models.splitting import Split
    from transferkit.training.job import Job

MAX_POINTS = 500

_UNMEASURED = "execution: the memory format is chosen as the fit starts"


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """What a phase will do.

    Args:
        name: Its name.
        first_epoch: The number of its first epoch, from 1.
        num_epochs: The number of its epochs.
        steps_per_epoch: Optimizer updates in an epoch; 0 where a solver takes their place.
        freeze_plan: What is frozen in it.
        num_trainable: The number of values in the parameters that train.
        num_frozen: The number of those that do not.
        steps: Numbers of steps within the phase, from 0, evenly spread.
        lrs: For each parameter group its learning rates at these steps; a scheduler that
            waits for a value to improve is taken to see it improve in every epoch.
        features: What is computed once, how often, and by what; or why nothing is.
        num_feature_images: How many pictures the frozen part sees in all; None where it sees
            each in every epoch, together with the rest.
        estimate: Time and memory on this machine, or None where they were not measured.
    """

    name: str
    first_epoch: int
    num_epochs: int
    steps_per_epoch: int
    freeze_plan: FreezePlan
    num_trainable: int
    num_frozen: int
    steps: tuple[int, ...]
    lrs: dict[str, tuple[float, ...]]
    features: str
    num_feature_images: int | None
    estimate: Estimate | None

    @property
    def num_steps(self) -> int:
        """The number of optimizer updates in the phase."""
        return self.num_epochs * self.steps_per_epoch

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON data."""
        return {
            "name": self.name,
            "first_epoch": self.first_epoch,
            "num_epochs": self.num_epochs,
            "steps_per_epoch": self.steps_per_epoch,
            "freeze_plan": self.freeze_plan.to_dict(),
            "num_trainable": self.num_trainable,
            "num_frozen": self.num_frozen,
            "steps": list(self.steps),
            "lrs": {name: list(rates) for name, rates in self.lrs.items()},
            "features": self.features,
            "num_feature_images": self.num_feature_images,
            "estimate": None if self.estimate is None else self.estimate.to_dict(),
        }

    def lines(self) -> Iterator[str]:
        """Give the lines that describe the phase."""
        last = self.first_epoch + self.num_epochs - 1
        epochs = f"epoch {last}" if self.num_epochs == 1 else f"epochs {self.first_epoch} to {last}"
        yield f"{self.name}: {epochs}"
        yield (
            f"  trains    {self.num_trainable:,} parameters, {self.num_frozen:,} are frozen "
            f"({_describe_freezing(self.freeze_plan)})"
        )
        if self.steps_per_epoch:
            yield f"  steps     {self.num_steps:,}, {self.steps_per_epoch:,} in an epoch"
        else:
            yield "  solver    lbfgs"
        for place, (name, rates) in enumerate(self.lrs.items()):
            label = "  lr        " if place == 0 else "            "
            yield f"{label}{name}: {_describe_rates(rates)}"
        yield f"  features  {self.features}"
        if self.num_feature_images is not None:
            yield f"            computed of {self.num_feature_images:,} pictures"
        if self.estimate is not None:
            yield f"  estimate  {self.estimate}"


@dataclass(frozen=True, kw_only=True)
class FitPlan:
    """What a fit will do, phase by phase; `print(plan)` shows it, `plot_plan` draws the rates.

    Args:
        backbone_name: The backbone's name.
        device: What it runs on, in words.
        batch_size: Pictures in a batch.
        num_train: The number of training pictures.
        num_val: The number of validation pictures.
        phases: The phases in their order.
        notes: How they run, and what is done before and after them; the estimates leave that out.
    """

    backbone_name: str
    device: str
    batch_size: int
    num_train: int
    num_val: int
    phases: tuple[PhasePlan, ...]
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float | None:
        """The estimated duration of the fit, or None where it was not measured."""
        estimates = [each.estimate for each in self.phases]
        return sum(each.seconds for each in estimates if each) if all(estimates) else None

    @property
    def memory_bytes(self) -> int | None:
        """The estimated peak memory of the fit, beside that of Python and PyTorch itself."""
        estimates = [each.estimate for each in self.phases]
        return max(each.memory_bytes for each in estimates if each) if all(estimates) else None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON data."""
        return {
            "backbone": self.backbone_name,
            "device": self.device,
            "batch_size": self.batch_size,
            "num_train": self.num_train,
            "num_val": self.num_val,
            "seconds": self.seconds,
            "memory_bytes": self.memory_bytes,
            "phases": [each.to_dict() for each in self.phases],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """Return the description of all phases."""
        head = (
            f"{self.backbone_name} on {self.device}: {self.num_train:,} training and "
            f"{self.num_val:,} validation pictures, in batches of {self.batch_size}"
        )
        return "\n".join(
            [head, *(line for phase in self.phases for line in phase.lines()), *self.notes]
        )


def plan_fit(job: Job, phases: Sequence[ResolvedPhase], *, measure: bool) -> FitPlan:
    """Work out what a fit will do, on copies of the model and the optimizer.

    Args:
        job: The job; it is left as it is.
        phases: Its phases, which were found to fit.
        measure: Run a few batches, to estimate time and memory.

    Returns:
        The plan.
    """
    execution = None
    twin = copy_job(job)
    if measure or job.channels_last != "auto":
        execution = choose_execution(job, phases)
        twin = lay_out(twin, execution)
    updates, held = twin.updates(), _Held()
    return FitPlan(
        backbone_name=job.model.backbone_name,
        device=describe_device(job.device),
        batch_size=job.recipe.batch_size,
        num_train=len(job.data.train),
        num_val=len(job.data.val),
        phases=tuple(_plan_phase(twin, each, updates, held, measure=measure) for each in phases),
        notes=(_UNMEASURED if execution is None else str(execution), *_notes(job)),
    )


def _notes(job: Job) -> Iterator[str]:
    if isinstance(job.head_start, str) and job.head_start != "pretrained":
        yield (
            f"before: the head is fitted ({job.head_start}) to features of "
            f"{len(job.data.train):,} pictures, in the first fit"
        )
    if job.average is not None and job.average.interval == "epoch":
        yield "after each averaged epoch: a pass for BatchNorm's statistics, where they move"
    if job.wise_ft:
        count = len(job.data.val)
        yield f"after: {len(FACTORS)} passes over {count:,} validation pictures (WiSE-FT)"


def copy_job(job: Job) -> Job:
    """Return the job with copies of all that a fit changes."""
    optimizer: Any = job.optimizer if isinstance(job.optimizer, Optimizer) else None
    criterion: Any = job.criterion if isinstance(job.criterion, nn.Module) else None
    # In one go: the optimizer holds the model's parameters, and a criterion may.
    model, copied, measure = copy.deepcopy((job.model, optimizer, criterion))
    # A schedule that is an object goes on from where it is, and belongs to the optimizer it has.
    is_object = isinstance(job.scheduler, (Schedule, LRScheduler))
    return replace(
        job,
        model=model,
        loading=replace(job.loading, model=model),
        optimizer=job.optimizer if copied is None else copied,
        criterion=job.criterion if measure is None else measure,
        scheduler="none" if is_object else job.scheduler,
    )


class _Held:
    """What the cache holds already when a phase begins, from the phases before it."""

    def __init__(self) -> None:
        self._num_stages: int | None = None
        self._views: frozenset[int] = frozenset()

    def add(self, job: Job, phase: ResolvedPhase, split: Split | str) -> int | None:
        """Add what a phase needs; return the number of pictures to compute, None if it is live."""
        if isinstance(split, str):
            self._num_stages = None
            return None
        num_images = 0
        if self._num_stages != split.num_stages:
            self._num_stages, self._views = split.num_stages, frozenset()
            num_images = len(job.data.val)
        new = job.views(phase) - self._views
        self._views |= new
        return num_images + len(new) * len(job.data.train)


def _plan_phase(
    job: Job, phase: ResolvedPhase, updates: Updates, held: _Held, *, measure: bool
) -> PhasePlan:
    model = job.model.freeze(phase.freeze_plan).train()
    split = find_split(job, epochs=phase.phase.epochs)
    is_solved = job.solves(phase)
    steps_per_epoch = 0 if is_solved else job.steps_per_epoch
    steps, lrs = ((), {}) if is_solved else _trace_rates(updates, phase, steps_per_epoch)
    num_trainable = count(model, phase.trainable)
    num_images = held.add(job, phase, split)
    estimate = None
    if measure:
        estimate = measure_phase(job, phase, split, updates.optimizer, num_images)
    return PhasePlan(
        name=phase.phase.name,
        first_epoch=phase.first_epoch,
        num_epochs=phase.phase.epochs,
        steps_per_epoch=steps_per_epoch,
        freeze_plan=phase.freeze_plan,
        num_trainable=num_trainable,
        num_frozen=model.num_parameters - num_trainable,
        steps=steps,
        lrs=lrs,
        features=_describe_features(job, phase, split),
        num_feature_images=num_images,
        estimate=estimate,
    )


def _trace_rates(
    updates: Updates, phase: ResolvedPhase, steps_per_epoch: int
) -> tuple[tuple[int, ...], dict[str, tuple[float, ...]]]:
    """Run the schedule of a phase without gradients, so that no weight changes."""
    updates.start_phase(phase.phase, steps_per_epoch=steps_per_epoch)
    total = phase.phase.epochs * steps_per_epoch
    stride = math.ceil(total / MAX_POINTS)
    steps: list[int] = []
    lrs: dict[str, list[float]] = {}
    updates.zero_grad()
    for step in range(total):
        if step % stride == 0 or step == total - 1:
            steps.append(step)
            for name, rate in updates.lrs.items():
                lrs.setdefault(name, []).append(rate)
        updates.step()
        if (step + 1) % steps_per_epoch == 0:
            updates.end_epoch(_improving_record(step // steps_per_epoch))
    return tuple(steps), {name: tuple(rates) for name, rates in lrs.items()}


def _improving_record(epoch: int) -> EpochRecord:
    loss, accuracy = 1 / (epoch + 1), 1 - 1 / (epoch + 2)
    return EpochRecord(
        epoch=epoch,
        train_loss=loss,
        train_accuracy=accuracy,
        val_loss=loss,
        val_accuracy=accuracy,
        lr=0.0,
        seconds=0.0,
    )


def _describe_features(job: Job, phase: ResolvedPhase, split: Split | str) -> str:
    if isinstance(split, str):
        return f"computed live: {split}"
    stages = job.model.stages
    part = "of the backbone" if split.is_whole else f"up to {stages[split.num_stages - 1].name}"
    epochs = None if job.solves(phase) else phase.phase.epochs
    return f"{part}, once: {settings_of(job.cache).describe(epochs)}"


def _describe_freezing(plan: FreezePlan) -> str:
    if not plan.freezes:
        frozen = "nothing is frozen"
    elif plan.until is not None:
        frozen = f"until:{plan.until}"
    elif len(plan.patterns) > 3:
        frozen = f"{len(plan.patterns)} patterns"
    else:
        frozen = ", ".join(plan.patterns)
    return f"{frozen}, bn={plan.bn}"


def _describe_rates(rates: Sequence[float]) -> str:
    parts = [rates[0], max(rates), rates[-1]]
    shown = [f"{each:.3g}" for each in dict.fromkeys(parts)]
    return " to ".join(shown)
