"""One fit: its phases and epochs, from the first step to the best weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeAlias

import torch

from transferkit._allocator import buffers_kept
from transferkit._seeding import seeded_torch
from transferkit.errors import ConfigError
from transferkit.evaluation import Evaluation, evaluate_model
from transferkit.evaluation.evaluate import RunningMean
from transferkit.models.modes import modes_kept
from transferkit.training.admission import trains_head_only
from transferkit.training.averaging import refresh_batch_norm
from transferkit.training.best import BestWeights
from transferkit.training.cached_feed import CachedFeed
from transferkit.training.feed_choice import find_split, settings_of
from transferkit.training.feeds import Feed, LiveFeed
from transferkit.training.forward import forward
from transferkit.training.head_start import start_head
from transferkit.training.history import EpochRecord, History
from transferkit.training.interpolation import wise_ft
from transferkit.training.job import Job
from transferkit.training.loading import list_skipped, mix
from transferkit.training.phases import ResolvedPhase
from transferkit.training.regularizers import L2SP
from transferkit.training.solving import Fitted, solve_head
from transferkit.training.updates import Updates

Notify: TypeAlias = "Callable[..., None]"
"""Calls a method of all callbacks: its name, then its arguments."""


class Flags(Protocol):
    """What callbacks end a fit, or a phase of it, by."""

    should_stop: bool
    should_stop_phase: bool


class Fit:
    """Run the phases of a fit.

    Args:
        job: What is trained, and how.
        phases: The phases for this model.
        history: Takes the records as they come.
        notify: Calls the callbacks.
        flags: Has `should_stop`, whether the fit should end after this epoch, and
            `should_stop_phase`, whether its phase should.
    """

    def __init__(
        self,
        job: Job,
        phases: Sequence[ResolvedPhase],
        history: History,
        *,
        notify: Notify,
        flags: Flags,
    ) -> None:
        self.job: Job = job
        self.phases: tuple[ResolvedPhase, ...] = tuple(phases)
        self.history: History = history
        self.updates: Updates = job.updates()
        self._cached: CachedFeed | None = None
        self._trainable = frozenset[str]().union(*(each.trainable for each in phases))
        self._notify = notify
        self._flags = flags
        self._penalty: L2SP | None = None
        self._before_finetuning: dict[str, torch.Tensor] | None = None
        self._skipped: list[dict[str, str]] = []
        self._parameters = list(job.model.named_parameters())
        self._best = BestWeights(job.model, self._trainable)

    def run(self, *, start: bool = True) -> None:
        """Run all phases; whatever ends them, the best weights are in the model afterwards.

        Args:
            start: Set the head to its start first.
        """
        job = self.job
        with (
            buffers_kept(),
            modes_kept(job.model),
            self._session(),
            seeded_torch(job.seed, job.device),
        ):
            job.train_loader.forget_skipped()
            job.val_loader.forget_skipped()
            job.model.freeze(self.phases[0].freeze_plan)
            self._notify("on_fit_start", self.phases[-1].epochs[-1])
            self.history.settings["head_start"] = (
                start_head(job.head_start, job.model, job.data, job.loading) if start else None
            )
            if job.l2_sp:
                self._penalty = L2SP(job.model, self._trainable, strength=job.l2_sp)
            for phase in self.phases:
                if not self._run_phase(phase):
                    self.history.status = "stopped"
                    break
            if job.wise_ft:
                self._best.restore()
                self._interpolate()

    def _run_phase(self, phase: ResolvedPhase) -> bool:
        """Run the epochs of a phase; tell whether the fit goes on."""
        job = self.job
        self._flags.should_stop_phase = False
        # In training mode: what the network is cut into runs in the mode that it is cut in.
        job.model.freeze(phase.freeze_plan).train()
        if not trains_head_only(phase):
            self._note_start()
        with self._open_feed(phase) as feed:
            self._notify("on_phase_start", phase.phase)
            if isinstance(feed, CachedFeed) and job.solves(phase):
                return self._solve(phase, feed)
            self.updates.start_phase(phase.phase, steps_per_epoch=feed.steps_per_epoch)
            if job.average is not None:
                job.average.start(job.model)
            for epoch in phase.epochs:
                record = self._run_epoch(epoch, phase, feed)
                if not self._end_epoch(record, phase):
                    return False
                if self._flags.should_stop_phase:
                    return phase is not self.phases[-1] or epoch == phase.epochs[-1]
        return True

    def _run_epoch(self, epoch: int, phase: ResolvedPhase, feed: Feed) -> EpochRecord:
        start = time.perf_counter()
        self._check_freezing(phase)
        self._notify("on_epoch_start", epoch)
        lr = self.updates.lr
        mean = self._train(epoch, feed)
        with self._averaged(epoch, phase, feed):
            evaluation = self._evaluate(feed)
            record = self._record(epoch, phase, mean, evaluation, lr=lr, start=start)
            self._best.offer(record)
        self.updates.end_epoch(record)
        return record

    def _train(self, epoch: int, feed: Feed) -> RunningMean:
        job, updates = self.job, self.updates
        feed.module.train()
        mean = RunningMean(job.device)
        for step, batch in enumerate(feed.train(epoch), start=1):
            layout = job.memory_format if batch.images.dim() == 4 else torch.preserve_format
            batch = batch.to(job.device, memory_format=layout)
            inputs, targets, _ = batch
            wanted = targets
            if job.mixing is not None:
                inputs, wanted = mix(job.mixing, batch, seed=job.seed, epoch=epoch)
            loss, logits = forward(
                feed, job.criterion, inputs, wanted, backbone_name=job.model.backbone_name
            )
            updates.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if self._penalty is not None:
                self._penalty.add_to_gradients()
            updates.step()
            if job.average is not None and job.average.interval == "step":
                job.average.update(job.model)
            mean.add(loss, logits, targets)
            self._notify("on_step_end", step)
        return mean

    def _evaluate(self, feed: Feed) -> Evaluation:
        return evaluate_model(
            feed.module,
            feed.val(),
            class_names=self.job.data.class_names,
            criterion=self.job.criterion,
            memory_format=self.job.memory_format,
            logits_of=feed.logits,
        )

    def _record(
        self,
        epoch: int,
        phase: ResolvedPhase,
        mean: RunningMean | Fitted,
        evaluation: Evaluation,
        *,
        lr: float,
        start: float,
    ) -> EpochRecord:
        return EpochRecord(
            epoch=epoch,
            train_loss=mean.loss,
            train_accuracy=mean.accuracy,
            val_loss=evaluation.loss,
            val_accuracy=evaluation.accuracy,
            lr=lr,
            seconds=time.perf_counter() - start,
            phase=phase.phase.name,
        )

    def _end_epoch(self, record: EpochRecord, phase: ResolvedPhase) -> bool:
        """Hand the record on; tell whether the fit goes on."""
        self.history.records.append(record)
        self._notify("on_epoch_end", record)
        is_last = record.epoch == self.phases[-1].epochs[-1]
        return is_last or not self._flags.should_stop

    def _solve(self, phase: ResolvedPhase, feed: CachedFeed) -> bool:
        """Fit the head in closed form instead of epochs of steps."""
        start = time.perf_counter()
        epoch = phase.first_epoch
        self._notify("on_epoch_start", epoch)
        mean, report = solve_head(self.job.model, feed, seed=self.job.seed)
        self.history.settings.setdefault("solver_reports", []).append(report)
        record = self._record(epoch, phase, mean, self._evaluate(feed), lr=0.0, start=start)
        self._best.offer(record)
        return self._end_epoch(record, phase)

    @contextmanager
    def _averaged(self, epoch: int, phase: ResolvedPhase, feed: Feed) -> Iterator[None]:
        """Run a block with the averaged weights in the model, where there is an average."""
        average, model = self.job.average, self.job.model
        if average is None:
            yield
            return
        if average.interval == "epoch" and average.takes(
            epoch - phase.first_epoch, phase.phase.epochs
        ):
            average.update(model)
        with average.applied(model):
            if average.is_active and average.interval == "epoch":
                refresh_batch_norm(
                    model,
                    feed.train(epoch),
                    memory_format=self.job.memory_format,
                    logits_of=feed.logits,
                )
            yield

    @contextmanager
    def _open_feed(self, phase: ResolvedPhase) -> Iterator[Feed]:
        """Give the phase its batches, and say in the history where they come from."""
        feed = self._choose_feed(phase)
        described = self.history.settings.setdefault("features", {})
        described[phase.phase.name] = feed.describe()
        try:
            yield feed
        finally:
            described[phase.phase.name] = feed.describe()

    def _choose_feed(self, phase: ResolvedPhase) -> Feed:
        """Return cached features where that is possible: those of the phase before, if they fit."""
        job = self.job
        split = find_split(job, epochs=phase.phase.epochs)
        if isinstance(split, str):
            self._close_cached()
            return LiveFeed(job.model, job.train_loader, job.val_loader, reason=split)
        if self._cached is not None and self._cached.num_stages != split.num_stages:
            self._close_cached()
        if self._cached is None:
            # Their workers and the pictures that they keep would only take up memory.
            job.train_loader.close()
            job.val_loader.close()
            self._cached = CachedFeed(
                job.model,
                split,
                settings_of(job.cache),
                job.loading,
                data=job.data,
                order=job.train_loader,
                augmentation=job.augmentation,
            )
            self._cached.prepare()
        return self._cached

    def _close_cached(self) -> None:
        """Give back what cached features take up, and note what could not be read."""
        if self._cached is not None:
            self._cached.close()
            self._skipped += list_skipped(**self._cached.loaders)
        self._cached = None

    def _check_freezing(self, phase: ResolvedPhase) -> None:
        found = {name for name, each in self._parameters if each.requires_grad}
        if self.job.model.freeze_plan != phase.freeze_plan or found != phase.trainable:
            raise ConfigError(
                f"What is frozen changed within the phase `{phase.phase.name}`: the optimizer and "
                f"cached features would not follow. Unfreeze by phases: "
                f'trainer.fit(phases=[Phase(..., unfreeze="all")]).'
            )

    def _note_start(self) -> None:
        """Keep the weights from which fine-tuning starts, for the interpolation."""
        if self.job.wise_ft and self._before_finetuning is None:
            state = self.job.model.state_dict()
            names = self._trainable | {name for name, _ in self.job.model.named_buffers()}
            self._before_finetuning = {name: state[name].clone() for name in names & state.keys()}

    def _interpolate(self) -> None:
        job = self.job
        if self._before_finetuning is None:
            return
        live = LiveFeed(job.model, job.train_loader, job.val_loader, reason="")
        result = wise_ft(job.model, self._before_finetuning, lambda: self._evaluate(live))
        self.history.settings["wise_ft_result"] = result.to_dict()
        self._best.keep()

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Run the phases between start and end; whatever ends them, the best weights return."""
        job, history = self.job, self.history
        start = time.perf_counter()
        try:
            yield
        except KeyboardInterrupt:
            history.status = "interrupted"
        except BaseException:
            history.status = "failed"
            raise
        finally:
            self._best.restore()
            self.updates.finish()
            self._close_cached()
            if job.average is not None:
                job.average.forget()
            job.model.zero_grad(set_to_none=True)
            job.train_loader.close()
            job.val_loader.close()
            live = list_skipped(train=job.train_loader, val=job.val_loader)
            history.skipped = _without_repeats([*live, *self._skipped])
            history.seconds = time.perf_counter() - start
            self._notify("on_fit_end", history)


def _without_repeats(skipped: list[dict[str, str]]) -> list[dict[str, str]]:
    return list({(each["split"], each["path"]): each for each in skipped}.values())
