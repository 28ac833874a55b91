"""The sweep of `trainer.lr_find()`: some steps at rising learning rates, on copies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from transferkit._allocator import buffers_kept
from transferkit._checks import check_integer, check_number
from transferkit._seeding import seeded, seeded_torch
from transferkit.data import Batch, ImageLoader
from transferkit.errors import ConfigError, DataError
from transferkit.models import Classifier
from transferkit.training.admission import frozen_as
from transferkit.training.cached_feed import CachedFeed
from transferkit.training.distributed import World
from transferkit.training.feed_choice import find_split, settings_of
from transferkit.training.feeds import Feed, LiveFeed
from transferkit.training.forward import forward
from transferkit.training.groups import Rates, set_option
from transferkit.training.head_start import start_head
from transferkit.training.loading import mix
from transferkit.training.lr_find import DIVERGED, LRFind, Smoothing, SweepEnd, make_lr_find
from transferkit.training.optimizers import make_optimizer
from transferkit.training.phases import ResolvedPhase
from transferkit.training.plan import copy_job
from transferkit.training.regularizers import L2SP

if TYPE_CHECKING:
    from transferkit.training.job import Job

MIN_STEPS = 10
MIN_IMAGES = 8
"""Fewer pictures are known by heart after some steps, whatever the rate."""


def spread_lrs(min_lr: float, max_lr: float, num_steps: int) -> tuple[float, ...]:
    """Return learning rates that rise by the same factor from step to step.

    Args:
        min_lr: The first, above 0.
        max_lr: The last, above it.
        num_steps: How many there are, at least 10.

    Raises:
        ConfigError: A value cannot work.

    Example:
        >>> [round(lr, 6) for lr in spread_lrs(1e-5, 1e4, 10)[:4]]
        [1e-05, 0.0001, 0.001, 0.01]
    """
    low = check_number("min_lr", min_lr, lambda rate: rate > 0, "above 0")
    high = check_number("max_lr", max_lr, lambda rate: rate > 0, "above 0")
    if low >= high:
        raise ConfigError(f"`min_lr` should be below `max_lr`, found {low!r} and {high!r}.")
    last = check_integer("num_steps", num_steps, minimum=MIN_STEPS) - 1
    return tuple(low * (high / low) ** (step / last) for step in range(last + 1))


def sweep_lrs(
    job: Job, phases: Sequence[ResolvedPhase], lrs: Sequence[float], *, start: bool
) -> LRFind:
    """Train a copy of the model, each step at the next learning rate.

    Model, optimizer and criterion are copied rather than put back afterwards, so that nothing
    that ends the sweep can leave them changed. The loader is one of its own as well.

    Args:
        job: The job; it is left as it is.
        phases: The phases of a fit, which were found to fit; the first of them is swept.
        lrs: The rates of the head.
        start: Set the head of the copy to its start first, as the first fit does.

    Returns:
        The losses, and what they suggest.

    Raises:
        ConfigError: There is no rate to find.
        DataError: There are too few pictures.
        ImageError: A picture cannot be read.
    """
    phase = phases[0]
    _check_swept(job, phase)
    # Python's and NumPy's generators too: a criterion of the user's may draw from them.
    with buffers_kept(), seeded(job.seed), seeded_torch(job.seed, job.device):
        rates = job.updates().rates(phase.phase)
        twin, optimizer = _copy(job, phase, rates)
        head_lr = _head_lr(optimizer, twin.model) if rates is None else rates.lr
        twin.model.freeze(phase.freeze_plan)
        if start:
            start_head(twin.head_start, twin.model, twin.data, twin.loading)
        penalty = None
        if twin.l2_sp:
            trainable = frozenset[str]().union(*(each.trainable for each in phases))
            penalty = L2SP(twin.model, trainable, strength=twin.l2_sp)
        twin.model.train()
        with _open_feed(twin, phase, len(lrs)) as feed:
            losses, end = _Sweep(twin, optimizer, feed, penalty, head_lr=head_lr).run(lrs)
    return make_lr_find(phase.phase.name, lrs[: len(losses)], losses, end=end)


def _check_swept(job: Job, phase: ResolvedPhase) -> None:
    if job.solves(phase):
        raise ConfigError(
            f"The phase `{phase.phase.name}` has no learning rate to find: "
            f'solver="lbfgs" fits the head without one. Take solver="sgd", or just fit.'
        )
    if len(job.data.train) < MIN_IMAGES:
        raise DataError(
            f"Finding a learning rate takes at least {MIN_IMAGES} training pictures, found "
            f"{len(job.data.train)}. Take the rate of the recipe."
        )


def _copy(job: Job, phase: ResolvedPhase, rates: Rates | None) -> tuple[Job, Optimizer]:
    """Return the job with copies of all that a step changes, and its optimizer."""
    with frozen_as(job.model, phase.freeze_plan):
        # Built before it is copied: a factory may know the parameters of this very model.
        optimizer = make_optimizer(
            job.optimizer,
            job.model,
            rates=rates,
            momentum=job.recipe.momentum,
            weight_decay=job.recipe.weight_decay,
        )
        twin = copy_job(replace(job, optimizer=optimizer))
    # Each of several processes sweeps all batches by itself.
    twin = replace(twin, world=World(), loading=replace(twin.loading, world=World()))
    copied: Any = twin.optimizer
    return twin, copied


def _head_lr(optimizer: Optimizer, model: Classifier) -> float:
    """Return the rate of the group with the head's parameters, or else of the first group.

    Raises:
        ConfigError: It is 0, so that no other is so many times it.
    """
    held = set(model.head.parameters())
    groups = [each for each in optimizer.param_groups if not held.isdisjoint(each["params"])]
    rate = _start_lr((groups or optimizer.param_groups)[0])
    if not rate > 0:
        raise ConfigError(
            f"The optimizer should have a learning rate above 0 for the head, which those of its "
            f"other groups are scaled with, found {rate:g}. Any will do."
        )
    return rate


def _start_lr(group: dict[str, Any]) -> float:
    """Return the rate that a group's schedule starts from: its own may be 0 in a warm-up."""
    return float(group.get("initial_lr", group["lr"]))


@contextmanager
def _open_feed(twin: Job, phase: ResolvedPhase, num_steps: int) -> Iterator[Feed]:
    """Give the sweep the batches of a fit, by a loader of its own."""
    num_epochs = math.ceil(num_steps / len(twin.train_loader))
    loader = twin.loading.loader(
        twin.data.train,
        twin.train_loader.transform,
        shuffle=True,
        balanced=twin.train_loader.balanced,
        cache_share=1.0 if num_epochs > 1 else 0.0,
    )
    feed = _choose_feed(twin, phase, loader, num_steps=num_steps, num_epochs=num_epochs)
    try:
        yield feed
    finally:
        loader.close()
        if isinstance(feed, CachedFeed):
            feed.close()


def _choose_feed(
    twin: Job, phase: ResolvedPhase, loader: ImageLoader, *, num_steps: int, num_epochs: int
) -> Feed:
    """Return cached features where the fit would take them and they are no more work."""
    split = find_split(twin, epochs=phase.phase.epochs)
    if not isinstance(split, str):
        settings = settings_of(twin.cache)
        num_views = len(settings.views_of(range(1, num_epochs + 1)))
        # A view is made of all pictures, of which a short sweep sees a part only.
        if num_views * len(twin.data.train) <= num_steps * twin.loading.batch_size:
            return CachedFeed(
                twin.model,
                split,
                settings,
                twin.loading,
                data=twin.data,
                order=loader,
                augmentation=twin.augmentation,
            )
        split = "the sweep is too short"
    val = twin.loading.keep(twin.val_loader, twin.data)
    return LiveFeed(twin.model, loader, val, device=twin.device, reason=split)


class _Sweep:
    """The steps of a sweep.

    Args:
        job: The job, of copies.
        optimizer: Its optimizer.
        feed: Gives the batches.
        penalty: Adds to the gradients, where there is one.
        head_lr: What the rates of the optimizer's groups are relative to.
    """

    def __init__(
        self,
        job: Job,
        optimizer: Optimizer,
        feed: Feed,
        penalty: L2SP | None,
        *,
        head_lr: float,
    ) -> None:
        self._job = job
        self._optimizer = optimizer
        self._feed = feed
        self._penalty = penalty
        self._factors = [_start_lr(group) / head_lr for group in optimizer.param_groups]

    def run(self, lrs: Sequence[float]) -> tuple[list[float], SweepEnd]:
        """Take the steps; return the losses before them, and why there are no more."""
        losses: list[float] = []
        smoothing, lowest = Smoothing(), math.inf
        bar = tqdm(
            total=len(lrs),
            desc="learning rates",
            unit="step",
            leave=False,
            disable=None if self._job.loading.verbose else True,
        )
        with bar, closing(self._batches()) as batches:
            for lr, (epoch, batch) in zip(lrs, batches, strict=False):
                loss = self._forward(batch, epoch)
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    return losses[:-1], "not_finite"
                smoothed = smoothing.add(losses[-1])
                lowest = min(lowest, smoothed)
                # The same as 4 times the lowest, but for losses below 0.
                if smoothed - lowest > (DIVERGED - 1) * abs(lowest):
                    return losses, "diverged"
                self._update(loss, lr)
                bar.update()
        return losses, "max_lr"

    def _batches(self) -> Generator[tuple[int, Batch], None, None]:
        """Give the batches of epoch after epoch, with its number."""
        self._feed.module.train()
        for epoch in itertools.count(1):
            is_empty = True
            for _, batch in self._feed.train(epoch):
                is_empty = False
                yield epoch, batch
            if is_empty:
                raise DataError("No picture of the train split can be read.")

    def _forward(self, batch: Batch, epoch: int) -> Tensor:
        job = self._job
        layout = job.memory_format if batch.images.dim() == 4 else torch.preserve_format
        batch = batch.to(job.device, memory_format=layout)
        inputs, targets, _ = batch
        if job.mixing is not None:
            inputs, targets = mix(job.mixing, batch, seed=job.seed, epoch=epoch)
        name = job.model.backbone_name
        # float16 without its scaling of the gradients would lose the small ones.
        with nullcontext() if job.precision.scaler is not None else job.precision.autocast():
            loss, _ = forward(self._feed, job.criterion, inputs, targets, backbone_name=name)
        return loss

    def _update(self, loss: Tensor, lr: float) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._penalty is not None:
            self._penalty.add_to_gradients()
        if self._job.clip_norm is not None:
            parameters = [
                each for group in self._optimizer.param_groups for each in group["params"]
            ]
            nn.utils.clip_grad_norm_(parameters, self._job.clip_norm)
        for group, factor in zip(self._optimizer.param_groups, self._factors, strict=True):
            set_option(group, "lr", lr * factor)
        self._optimizer.step()
