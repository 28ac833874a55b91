"""One fit: its phases and epochs, from the first step to the best weights."""

from __future__ import annotations

import copy
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol, TypeAlias, TypeVar

import torch

from transferkit._allocator import buffers_kept
from transferkit._seeding import seeded_torch
from transferkit.errors import ConfigError, ProcessError
from transferkit.evaluation import Evaluation, evaluate_model
from transferkit.evaluation.evaluate import RunningMean
from transferkit.models.modes import modes_kept
from transferkit.training.admission import trains_head_only
from transferkit.training.averaging import refresh_batch_norm
from transferkit.training.best import BestWeights
from transferkit.training.cached_feed import CachedFeed
from transferkit.training.callbacks import Callback
from transferkit.training.checkpoints import Checkpoint, CheckpointStore, Place
from transferkit.training.feed_opening import Feeds
from transferkit.training.feeds import Feed
from transferkit.training.fit_state import (
    Progress,
    capture,
    identify,
    restore,
    restore_callbacks,
    restore_phase,
)
from transferkit.training.head_start import start_head
from transferkit.training.history import EpochRecord, History
from transferkit.training.interpolation import wise_ft
from transferkit.training.interruption import Interrupted, Interruption, exit_code
from transferkit.training.job import Job
from transferkit.training.losses import LossWatch
from transferkit.training.phases import ResolvedPhase
from transferkit.training.regularizers import L2SP
from transferkit.training.solving import Fitted, solve_head
from transferkit.training.steps import Stepper
from transferkit.training.updates import Updates

_T = TypeVar("_T")

Notify: TypeAlias = "Callable[..., None]"
"""Calls a method of all callbacks: its name, then its arguments."""


class Flags(Protocol):
    """What callbacks end a fit, or a phase of it, by, and find the learning rates in."""

    should_stop: bool
    should_stop_phase: bool
    lrs: dict[str, float]


class Fit:
    """Run the phases of a fit, from its start or from a checkpoint.

    Args:
        job: What is trained, and how.
        phases: The phases for this model.
        history: Takes the records as they come.
        callbacks: What watches the fit.
        notify: Calls the callbacks.
        flags: Has `should_stop`, whether the fit should end after this epoch, and
            `should_stop_phase`, whether its phase should. Takes the learning rates as `lrs`.
        store: Keeps the checkpoints; None keeps none.
    """

    def __init__(
        self,
        job: Job,
        phases: Sequence[ResolvedPhase],
        history: History,
        *,
        callbacks: Sequence[Callback],
        notify: Notify,
        flags: Flags,
        store: CheckpointStore | None = None,
    ) -> None:
        self.job: Job = job
        self.phases: tuple[ResolvedPhase, ...] = tuple(phases)
        self.history: History = history
        self.callbacks: tuple[Callback, ...] = tuple(callbacks)
        self.updates: Updates = job.updates()
        self.trainable: frozenset[str] = frozenset().union(*(each.trainable for each in phases))
        self.progress: Progress = Progress()
        self.best: BestWeights = BestWeights(job.model, self.trainable)
        self.is_best_present: bool = True
        self.losses: LossWatch = LossWatch(job.nan_policy, job.device, job.data.train.name_of)
        self.penalty: L2SP | None = None
        self.before_finetuning: dict[str, torch.Tensor] | None = None
        self.mean: RunningMean | None = None
        self._feeds = Feeds(job, history, check=self._check_alone)
        self._call = notify
        self._flags = flags
        self._store = store
        self._interruption = Interruption()
        self._listens = True
        self._skipped: list[dict[str, str]] = []
        self._parameters = list(job.model.named_parameters())
        self._resumed: dict[str, Any] | None = None
        self._start = time.perf_counter()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What has to be the same for the fit to be gone on with."""
        return identify(self.job, self._told, self.trainable)

    def run(self, *, start: bool = True, checkpoint: Checkpoint | None = None) -> None:
        """Run all phases; whatever ends them, the best weights are in the model afterwards.

        Args:
            start: Set the head to its start first.
            checkpoint: What to go on from.
        """
        job = self.job
        # As it was told: the history's settings grow.
        self._told = dict(self.history.settings)
        with (
            buffers_kept(),
            modes_kept(job.model),
            self._session(),
            seeded_torch(job.seed, job.device),
        ):
            job.train_loader.forget_skipped()
            job.val_loader.forget_skipped()
            job.model.freeze(self.phases[0].freeze_plan)
            if self._store is not None:
                _ = self.identity  # Before a step changes what the criterion keeps.
            if checkpoint is None:
                self._begin(start=start)
            else:
                self._go_on(checkpoint)
            with self._interruption.listening():
                try:
                    self._run_phases()
                except Interrupted:
                    self._save()
                    raise

    def _notify(self, event: str, *arguments: Any) -> None:
        """Call the callbacks, in the first process; an error of theirs ends all."""
        world = self.job.world
        world.together(lambda: self._call(event, *arguments) if world.is_first else None)

    def _begin(self, *, start: bool) -> None:
        job = self.job
        self._notify("on_fit_start", self.phases[-1].epochs[-1])
        self.history.settings["head_start"] = (
            start_head(job.head_start, job.model, job.data, job.loading) if start else None
        )
        job.world.share_weights(job.model)
        if job.l2_sp:
            self.penalty = L2SP(job.model, self.trainable, strength=job.l2_sp)
        if self._store is not None and job.world.is_first:
            self._store.begin()

    def _go_on(self, checkpoint: Checkpoint) -> None:
        """Bring everything to where the checkpoint was made."""
        job = self.job
        if job.l2_sp:
            self.penalty = L2SP(job.model, self.trainable, strength=job.l2_sp)
        self._resumed = job.world.together(lambda: restore(self, checkpoint))
        if self._store is not None and job.world.is_first:
            self._store.begin(checkpoint.data.get("best_checkpoint"))
        if job.world.is_first:
            self._skipped += self.history.skipped
        self._notify("on_fit_start", self.phases[-1].epochs[-1])
        running = self.progress.phase
        if running is None:
            return
        for phase in self.phases[: running + 1]:
            # The groups of an optimizer are what the phases made of them, one after the other.
            job.model.freeze(phase.freeze_plan)
            if not job.solves(phase):
                self.updates.start_phase(phase.phase, steps_per_epoch=job.steps_per_epoch)
                if job.average is not None:
                    job.average.start(job.model)
        if self._resumed["updates"] is not None:
            restore_phase(self, self._resumed)

    def _run_phases(self) -> None:
        progress, last = self.progress, self.phases[-1].epochs[-1]
        for index, phase in enumerate(self.phases):
            if progress.place.epoch > phase.epochs[-1]:
                continue
            if not self._run_phase(index, phase):
                self.history.status = "stopped"
                break
        if progress.place.epoch <= last:
            self._save()  # A callback ended it in the middle: it can be gone on with.
            return
        self.best.restore()
        for each in self.job.world.gather(self.list_skipped()):
            self._skipped += each
        if not progress.is_over:
            if self.job.wise_ft:
                self._interpolate()
            progress.is_over = self.is_best_present = True
            self._save()

    def _run_phase(self, index: int, phase: ResolvedPhase) -> bool:
        """Run the epochs of a phase; tell whether the fit goes on."""
        job, progress = self.job, self.progress
        self._flags.should_stop_phase = False
        # In training mode: what the network is cut into runs in the mode that it is cut in.
        job.model.freeze(phase.freeze_plan).train()
        if not trains_head_only(phase):
            self._note_start()
        with self._feeds.open(phase, self.progress.batch_sizes) as feed:
            is_running = progress.phase == index
            if not is_running:
                self._hand_out_states()
            self._notify("on_phase_start", phase.phase)
            if isinstance(feed, CachedFeed) and job.solves(phase):
                return self._solve(phase, feed)
            if not is_running:
                self.updates.start_phase(phase.phase, steps_per_epoch=job.steps_per_epoch)
                if job.average is not None:
                    job.average.start(job.model)
                progress.phase = index
            else:
                self._hand_out_states()
            for epoch in range(progress.place.epoch, phase.epochs[-1] + 1):
                self._interruption.agree(job.world)
                self._interruption.check()
                record = self._run_epoch(epoch, phase, feed)
                if not self._end_epoch(record, phase):
                    return False
                if self._flags.should_stop_phase:
                    return phase is not self.phases[-1] or epoch == phase.epochs[-1]
        return True

    def _hand_out_states(self) -> None:
        """Give the callbacks of a fit that goes on their states."""
        if self._resumed is not None:
            restore_callbacks(self, self._resumed)

    def _run_epoch(self, epoch: int, phase: ResolvedPhase, feed: Feed) -> EpochRecord:
        progress = self.progress
        start = time.perf_counter() - progress.seconds
        self._check_freezing(phase)
        self._flags.lrs = self.updates.lrs
        self._notify("on_epoch_start", epoch)
        self.mean = RunningMean(self.job.device)
        if self._resumed is not None and self._resumed["mean"] is not None:
            if self.job.world.is_first:  # Which begins with the sums of all.
                self.mean.load_state_dict(self._resumed["mean"])
        else:
            progress.lr, progress.step = self.updates.lr, 0
        self._resumed = None
        self._train(epoch, feed, self.mean, start)
        self._interruption.agree(self.job.world)
        self._interruption.check()
        self.mean.sum_up(self.job.world.sum)
        self.job.world.average_statistics(self.job.model)
        with self._averaged(epoch, phase, feed):
            evaluation = self._evaluate(feed)
            record = self._record(epoch, phase, self.mean, evaluation, lr=progress.lr, start=start)
            self._offer(record)
        self.updates.end_epoch(record)
        return record

    def _train(self, epoch: int, feed: Feed, mean: RunningMean, started: float) -> None:
        """Do the updates of an epoch that are left, with a checkpoint where one is due."""
        progress = self.progress
        every = None if self._store is None else self._store.settings.every_steps
        stepper = Stepper(self.job, feed, self.updates, self.penalty, self.losses)
        updates = stepper.run(epoch, start=progress.place.batch, mean=mean)
        for updated in self._until_workers_end(updates):
            progress.place = Place(epoch, updated.next_batch)
            progress.seconds = time.perf_counter() - started
            if updated.num_trained:
                progress.step += 1
                self.is_best_present = False
                self._notify("on_step_end", progress.step)
            self._interruption.agree(self.job.world)
            self._interruption.check()
            if every is not None and progress.step % every == 0:
                self._save()

    def _until_workers_end(self, items: Iterable[_T]) -> Iterator[_T]:
        """Iterate; where a signal has ended the workers before their next batch, end the fit."""
        try:
            yield from items
        except RuntimeError as error:
            number = self._interruption.number
            # Of several processes the others do not know of it: the error ends them, too.
            is_alone = self.job.world.is_alone
            # PyTorch's own handler tells of a dead worker at any time, also within a step.
            has_lost = isinstance(error, ProcessError) or "DataLoader worker" in str(error)
            if number is not None and is_alone and has_lost:
                raise Interrupted(number) from error
            raise

    def _evaluate(self, feed: Feed) -> Evaluation:
        average, world = self.job.average, self.job.world
        batches = feed.val()
        if world.is_alone and (average is None or average.interval == "step"):
            # Where the average has taken this epoch already, it cannot be evaluated once more.
            batches = self._interruption.checked(self._until_workers_end(batches))
        with self.job.precision.autocast(), world.meeting() as meet:

            def sum_up(mean: RunningMean, confusion: torch.Tensor) -> None:
                meet()
                mean.sum_up(world.sum)
                world.sum(confusion)

            return evaluate_model(
                feed.module,
                batches,
                class_names=self.job.data.class_names,
                criterion=self.job.criterion,
                memory_format=self.job.memory_format,
                logits_of=feed.logits,
                gather=sum_up,
                metrics=self.job.metrics,
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
            metrics=evaluation.metrics,
        )

    def _offer(self, record: EpochRecord) -> None:
        """Note the record; if it is the best, tell so while its weights are in the model."""
        is_best = self.best.offer(record)
        self.is_best_present = is_best and self.job.average is None
        self.history.records.append(record)
        if is_best:
            self._notify("on_best", record)

    def _end_epoch(self, record: EpochRecord, phase: ResolvedPhase) -> bool:
        """Hand the record on and keep the state; tell whether the fit goes on."""
        progress = self.progress
        self.mean = None
        self._notify("on_epoch_end", record)
        flags = (self._flags.should_stop, self._flags.should_stop_phase)
        self._flags.should_stop, self._flags.should_stop_phase = self.job.world.share(flags)
        is_last = record.epoch == self.phases[-1].epochs[-1]
        ends_phase = self._flags.should_stop_phase or record.epoch == phase.epochs[-1]
        following = phase.epochs[-1] + 1 if ends_phase else record.epoch + 1
        progress.place, progress.seconds, progress.step = Place(following, 0), 0.0, 0
        is_over = following > self.phases[-1].epochs[-1]
        is_best = self.history.best is record
        # The end of the fit has a checkpoint of its own, with the best weights.
        if not is_over and (ends_phase or self._is_due(record.epoch, is_best=is_best)):
            self._save(is_best=is_best)
        return is_last or not self._flags.should_stop

    def _is_due(self, epoch: int, *, is_best: bool) -> bool:
        """Tell whether the state is kept at the end of an epoch."""
        if self._store is None:
            return False
        settings = self._store.settings
        return epoch % settings.every_epochs == 0 or (is_best and settings.keep_best)

    def _save(self, *, is_best: bool = False) -> None:
        """Keep the state, if a store does."""
        if self._store is None or self._resumed is not None:
            return  # What is not gone on with yet stands in the last checkpoint.
        store, world = self._store, self.job.world
        world.together(self.losses.finish)
        mean, statistics = self.mean_of_all(), world.mean_statistics(self.job.model)

        def save() -> None:
            if world.is_first:
                data, tensors = capture(self, mean, statistics, elapsed=self._seconds())
                store.save(self.progress.place, data, tensors, is_best=is_best)

        world.together(save)

    def mean_of_all(self) -> RunningMean | None:
        """Return what the running epoch gave so far in all processes."""
        if self.mean is None or self.job.world.is_alone:
            return self.mean
        mean = copy.deepcopy(self.mean)
        mean.sum_up(self.job.world.sum)
        return mean

    def _solve(self, phase: ResolvedPhase, feed: CachedFeed) -> bool:
        """Fit the head in closed form instead of epochs of steps."""
        start = time.perf_counter()
        epoch = phase.first_epoch
        self._resumed = None
        self._flags.lrs = {}
        self._notify("on_epoch_start", epoch)
        self.is_best_present = False
        mean, report = solve_head(self.job.model, feed, seed=self.job.seed)
        self.job.world.share_weights(self.job.model)
        record = self._record(epoch, phase, mean, self._evaluate(feed), lr=0.0, start=start)
        self.history.settings.setdefault("solver_reports", []).append(report)
        self._offer(record)
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
                self._refresh_statistics(epoch, feed)
            yield

    def _refresh_statistics(self, epoch: int, feed: Feed) -> None:
        """Gather BatchNorm's statistics for the averaged weights, in all processes together."""
        model, world = self.job.model, self.job.world
        self._listens = False  # The average has taken this epoch, which cannot be begun again.
        try:
            with world.meeting() as meet:
                refresh_batch_norm(
                    model,
                    (batch for _, batch in feed.train(epoch)),
                    memory_format=self.job.memory_format,
                    logits_of=feed.logits,
                )
                meet()
        finally:
            self._listens = True
        model.train()
        world.average_statistics(model)

    def _check_freezing(self, phase: ResolvedPhase) -> None:
        found = {name for name, each in self._parameters if each.requires_grad}
        if self.job.model.freeze_plan != phase.freeze_plan or found != phase.trainable:
            raise ConfigError(
                f"What is frozen changed within the phase `{phase.phase.name}`: the optimizer and "
                f"cached features would not follow. Unfreeze by phases: "
                f'trainer.fit(phases=[Phase(..., unfreeze="all")]).'
            )

    def _check_alone(self) -> None:
        """End a long pass at a signal, where no other process would wait for this one."""
        if self.job.world.is_alone and self._listens:
            self._interruption.check()

    def _note_start(self) -> None:
        """Keep the weights from which fine-tuning starts, for the interpolation."""
        if self.job.wise_ft and self.before_finetuning is None:
            state = self.job.model.state_dict()
            names = self.trainable | {name for name, _ in self.job.model.named_buffers()}
            self.before_finetuning = {name: state[name].clone() for name in names & state.keys()}

    def _interpolate(self) -> None:
        job = self.job
        if self.before_finetuning is None:
            return
        live = self._feeds.live("")
        result = wise_ft(job.model, self.before_finetuning, lambda: self._evaluate(live))
        self.history.settings["wise_ft_result"] = result.to_dict()
        self.best.keep()

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Run the phases between start and end; whatever ends them, the best weights return."""
        job, history = self.job, self.history
        self._start = time.perf_counter()
        history.status = "running"
        try:
            yield
            history.status = "completed" if history.status == "running" else history.status
        except (Interrupted, KeyboardInterrupt):
            history.status = "interrupted"
        except BaseException:
            history.status = "failed"
            raise
        finally:
            self.best.restore()
            self.updates.finish()
            self._feeds.close()
            if job.average is not None:
                job.average.forget()
            job.model.zero_grad(set_to_none=True)
            job.train_loader.close()
            job.val_loader.close()
            history.skipped = self.list_skipped()
            history.seconds = self._seconds()
            if self.losses.skipped:
                history.settings["nonfinite"] = self.losses.skipped
            if job.world.is_first:  # Not all may have come here.
                self._call("on_fit_end", history)
        if self._interruption.number is signal.SIGTERM:
            raise SystemExit(exit_code(signal.SIGTERM))

    def _seconds(self) -> float:
        """Return the duration of the fit so far, in this process and before."""
        return self.progress.elapsed + time.perf_counter() - self._start

    def list_skipped(self) -> list[dict[str, str]]:
        """Return the pictures that were left out so far since they could not be read."""
        found = [*self._feeds.list_skipped(), *self._skipped]
        return list({(each["split"], each["path"]): each for each in found}.values())
