"""Optimizer updates: from the batches of an epoch to changed weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from transferkit._checks import check_number
from transferkit._seeding import seed_torch
from transferkit.data import Batch
from transferkit.evaluation.evaluate import RunningMean
from transferkit.models.recompute import recomputing
from transferkit.training.feeds import Feed
from transferkit.training.forward import forward
from transferkit.training.job import Job
from transferkit.training.loading import mix
from transferkit.training.losses import LossWatch
from transferkit.training.memory import explain_out_of_memory, is_out_of_memory
from transferkit.training.regularizers import L2SP
from transferkit.training.updates import Updates


class Updated(NamedTuple):
    """What has just happened.

    Args:
        next_batch: The number of the batch that comes next in the epoch.
        num_trained: Of how many batches the gradients were; with 0 nothing changed.
    """

    next_batch: int
    num_trained: int


class Stepper:
    """Train on the batches of an epoch, an optimizer update after every few of them.

    What is random in a step, such as dropout, is a function of (seed, epoch, batch), so that an
    epoch can be gone on with at any update.

    Args:
        job: What is trained, and how.
        feed: Where batches come from.
        updates: The optimizer and the schedule of the phase.
        penalty: Pulls weights to where they started, or None.
        losses: Looks at each loss.
    """

    def __init__(
        self, job: Job, feed: Feed, updates: Updates, penalty: L2SP | None, losses: LossWatch
    ) -> None:
        self._job = job
        self._feed = feed
        self._updates = updates
        self._penalty = penalty
        self._losses = losses

    def run(self, epoch: int, *, start: int, mean: RunningMean) -> Iterator[Updated]:
        """Train, and yield after each update.

        Args:
            epoch: The epoch, from 1.
            start: The number of the first batch, from 0; a multiple of `accumulate`.
            mean: Takes losses and hits.
        """
        size, count = self._job.accumulate, self._feed.num_batches
        self._feed.module.train()
        batches = _Batches(self._feed.train(epoch, start=start), start)
        for first in range(start, count, size):
            end = min(first + size, count)
            with self._memory_saved():
                num_trained = self._update(epoch, batches.up_to(end), mean)
            yield Updated(end, num_trained)
        self._job.world.together(self._losses.finish)

    def _memory_saved(self) -> AbstractContextManager[None]:
        """Return what an update runs in: the network keeps its activations, or makes them anew."""
        return recomputing(self._job.model) if self._job.recomputes else nullcontext()

    def _update(self, epoch: int, batches: Iterable[tuple[int, Batch]], mean: RunningMean) -> int:
        """Sum up the gradients of some batches and update the weights; tell of how many."""
        job, updates, world = self._job, self._updates, self._job.world
        updates.zero_grad()
        error: Exception | None = None
        num_trained, num_images = 0, 0
        try:
            for number, batch in batches:
                if self._add_gradients(epoch, number, batch, mean):
                    num_trained += 1
                    num_images += len(batch.indices)
        except Exception as failed:
            if world.is_alone:
                raise
            error = failed
        if not world.is_alone:
            counts = (num_trained, num_images, int(error is not None))
            num_trained, num_images, num_failed = world.agree(counts)
            if num_failed:
                world.fail(error)
        if not num_trained:
            return 0
        world.sum_gradients(updates.parameters)
        scaler = job.precision.scaler
        if scaler is not None:
            scaler.unscale_(updates.built)
        if self._sums:
            divide_gradients(updates.parameters, num_images)
        if self._penalty is not None:
            self._penalty.add_to_gradients()
        if job.clip_norm is not None:
            nn.utils.clip_grad_norm_(updates.parameters, job.clip_norm)
        updates.step(scaler)
        if job.average is not None and job.average.interval == "step":
            job.average.update(job.model)
        return num_trained

    @property
    def _sums(self) -> bool:
        """Whether gradients are sums over pictures, for the mean over several batches or parts."""
        return self._job.accumulate > 1 or not self._job.world.is_alone

    def _add_gradients(self, epoch: int, number: int, batch: Batch, mean: RunningMean) -> bool:
        """Add a batch's gradients to those that there are; tell whether it was not left out."""
        try:
            return self._backward(epoch, number, batch, mean)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # Without its frames, which hold the activations of the batch.
            cause = error.with_traceback(None)
        raise explain_out_of_memory(
            len(batch.indices),
            lambda size: self._try_backward(epoch, batch, size),
            device=self._job.device,
            accumulate=self._job.accumulate,
        ) from cause

    def _try_backward(self, epoch: int, batch: Batch, size: int) -> None:
        """Train on the first pictures of a batch, without an update: the fit is over."""
        self._updates.zero_grad()
        part = Batch(*(each[:size] for each in batch))
        self._backward(epoch, 0, part, RunningMean(self._job.device))

    def _backward(self, epoch: int, number: int, batch: Batch, mean: RunningMean) -> bool:
        loss = self._loss(epoch, number, batch, mean)
        if loss is None:
            return False
        if self._sums:
            loss = loss * len(batch.indices)
        scaler = self._job.precision.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
        return True

    def _loss(self, epoch: int, number: int, batch: Batch, mean: RunningMean) -> Tensor | None:
        """Return the loss of a batch; None where it is left out."""
        job = self._job
        seed_torch(job.device, job.seed, epoch, number, *job.world.entropy)
        layout = job.memory_format if batch.images.dim() == 4 else torch.preserve_format
        batch = batch.to(job.device, memory_format=layout)
        inputs, targets, indices = batch
        wanted = targets
        if job.mixing is not None:
            inputs, wanted = mix(job.mixing, batch, seed=job.seed, epoch=epoch)
        # A batch that is left out must not leave its NaN in BatchNorm's statistics.
        before = [] if job.nan_policy == "raise" else keep_statistics(self._feed.module)
        with job.precision.autocast():
            loss, logits = forward(
                self._feed, job.criterion, inputs, wanted, backbone_name=job.model.backbone_name
            )
        lr = self._updates.lr
        if not self._losses.admits(loss, epoch=epoch, batch=number, lr=lr, indices=indices):
            put_back(before)
            return None
        mean.add(loss, logits, targets)
        return loss


class _Batches:
    """Numbered batches, of which some numbers may lack, given out up to one number at a time."""

    def __init__(self, numbered: Iterator[tuple[int, Batch]], start: int) -> None:
        self._numbered = numbered
        self._next = start
        self._waiting: tuple[int, Batch] | None = None

    def up_to(self, end: int) -> Iterator[tuple[int, Batch]]:
        """Yield the batches below a number. No more are loaded than needed to know them."""
        while self._next < end:
            if self._waiting is None:
                self._waiting = next(self._numbered, None)
            if self._waiting is None or self._waiting[0] >= end:
                return
            pair, self._waiting = self._waiting, None
            self._next = pair[0] + 1
            yield pair


def keep_statistics(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return the buffers of BatchNorm that a forward pass in training changes, and copies."""
    return [
        (value, value.clone())
        for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.training
        for value in layer.buffers()
    ]


@torch.no_grad()
def put_back(kept: list[tuple[Tensor, Tensor]]) -> None:
    """Write the copies that `keep_statistics` made back."""
    for value, before in kept:
        value.copy_(before)


@torch.no_grad()
def divide_gradients(parameters: Iterable[nn.Parameter], number: int) -> None:
    """Divide all gradients that there are by a number, in place."""
    grads = [each.grad for each in parameters if each.grad is not None]
    torch._foreach_div_(grads, float(number))


def check_clip_norm(clip_norm: float | None) -> float | None:
    """Return the largest norm of the gradients.

    Raises:
        ConfigError: It is no number above 0.
    """
    if clip_norm is None:
        return None
    return check_number("clip_norm", clip_norm, lambda value: value > 0, "above 0")
