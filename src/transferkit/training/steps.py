"""Optimizer updates: from the batches of an epoch to changed weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transferkit._checks import check_number
from transferkit._seeding import seed_torch
from transferkit.data import Batch
from transferkit.evaluation.evaluate import RunningMean
from transferkit.training.feeds import Feed
from transferkit.training.forward import forward
from transferkit.training.job import Job
from transferkit.training.loading import mix
from transferkit.training.losses import LossWatch
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
        size = self._job.accumulate
        self._feed.module.train()
        numbered = self._feed.train(epoch, start=start)
        for group, batches in itertools.groupby(numbered, lambda pair: pair[0] // size):
            num_trained = self._update(epoch, batches, mean)
            yield Updated((group + 1) * size, num_trained)
        self._losses.finish()

    def _update(self, epoch: int, batches: Iterable[tuple[int, Batch]], mean: RunningMean) -> int:
        """Sum up the gradients of some batches and update the weights; tell of how many."""
        job, updates = self._job, self._updates
        scaler = job.precision.scaler
        num_trained, num_images = 0, 0
        updates.zero_grad()
        for number, batch in batches:
            loss = self._loss(epoch, number, batch, mean)
            if loss is None:
                continue
            num_trained += 1
            num_images += len(batch.indices)
            # A sum over pictures, so that the batches together are as one large one.
            scaled = loss if job.accumulate == 1 else loss * len(batch.indices)
            (scaled if scaler is None else scaler.scale(scaled)).backward()  # type: ignore[no-untyped-call]
        if not num_trained:
            return 0
        if scaler is not None:
            scaler.unscale_(updates.built)
        if job.accumulate > 1:
            divide_gradients(updates.parameters, num_images)
        if self._penalty is not None:
            self._penalty.add_to_gradients()
        if job.clip_norm is not None:
            nn.utils.clip_grad_norm_(updates.parameters, job.clip_norm)
        updates.step(scaler)
        if job.average is not None and job.average.interval == "step":
            job.average.update(job.model)
        return num_trained

    def _loss(self, epoch: int, number: int, batch: Batch, mean: RunningMean) -> Tensor | None:
        """Return the loss of a batch; None where it is left out."""
        job = self._job
        seed_torch(job.device, job.seed, epoch, number)
        layout = job.memory_format if batch.images.dim() == 4 else torch.preserve_format
        batch = batch.to(job.device, memory_format=layout)
        inputs, targets, indices = batch
        wanted = targets
        if job.mixing is not None:
            inputs, wanted = mix(job.mixing, batch, seed=job.seed, epoch=epoch)
        with job.precision.autocast():
            loss, logits = forward(
                self._feed, job.criterion, inputs, wanted, backbone_name=job.model.backbone_name
            )
        lr = self._updates.lr
        if not self._losses.admits(loss, epoch=epoch, batch=number, lr=lr, indices=indices):
            return None
        mean.add(loss, logits, targets)
        return loss


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
