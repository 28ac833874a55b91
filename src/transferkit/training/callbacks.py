"""Callbacks: what may watch a fit, end it, or export from it; those that write are in `logs`."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transferkit._checks import check_callable, check_integer, check_number
from transferkit._files import check_writable
from transferkit.errors import ConfigError
from transferkit.training.history import EpochRecord, History, Mode, check_monitor, check_record_key
from transferkit.training.phases import Phase

if TYPE_CHECKING:
    from transferkit.training.trainer import Trainer

EVENTS = (
    "on_fit_start",
    "on_phase_start",
    "on_epoch_start",
    "on_step_end",
    "on_best",
    "on_epoch_end",
    "on_fit_end",
)
"""The events of a fit, in the order in which they come first."""


class Callback:
    """Base of all callbacks: methods that do nothing. Override those that you need.

    Order of the calls: `on_fit_start`; for each phase `on_phase_start`; for each epoch of it
    `on_epoch_start`, `on_step_end` after each optimizer update, `on_best` where it is the best
    epoch so far, `on_epoch_end`; `on_fit_end`, also after Ctrl-C and after an error.
    At each event the callbacks are called in the order in which they were given.

    A callback may set `trainer.should_stop = True` to end the fit after the epoch, or
    `trainer.should_stop_phase = True` to end its phase. One that raises an error ends the fit:
    the callbacks after it are not called for that event, and then `on_fit_end` of all of them
    is, of those too whose `on_fit_start` was never reached. The first error comes out of `fit`.

    A fit that is resumed calls `on_fit_start`, with the records of the epochs before in
    `trainer.history`, then `on_phase_start` of the running phase, then `load_state_dict`.
    """

    def on_fit_start(self, trainer: Trainer, num_epochs: int) -> None:
        """Before the first phase; the model is on its device, frozen as in that phase."""

    def on_phase_start(self, trainer: Trainer, phase: Phase) -> None:
        """Before the first epoch of a phase; the model is frozen as it says."""

    def on_epoch_start(self, trainer: Trainer, epoch: int) -> None:
        """Before an epoch, numbered from 1; `trainer.lrs` has its learning rates."""

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        """After an optimizer update, numbered from 1 within its epoch."""

    def on_best(self, trainer: Trainer, record: EpochRecord) -> None:
        """After both passes of an epoch that is the best so far.

        The weights that were evaluated are in the model, which are the averaged ones where
        there is an average; the record is in the trainer's history already.
        """

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        """After both passes of an epoch; the record is in the trainer's history already.

        The model has the weights that training goes on from.
        """

    def on_fit_end(self, trainer: Trainer, history: History) -> None:
        """After the last epoch; the best weights are back in the model."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit has to know, as plain JSON data; nothing by default."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Args:
            state: The state, which may have been through JSON.
        """


def notify(callbacks: Sequence[Callback], event: str, trainer: Trainer, *arguments: Any) -> None:
    """Call a method of all callbacks; at the end of the fit all, whatever others raise.

    Args:
        callbacks: The callbacks, in order.
        event: The name of the method.
        trainer: Its first argument.
        arguments: The others.

    Raises:
        BaseException: The first error that a callback raised. Where the fit itself failed
            already, its error is the first, and those of `on_fit_end` are warned about.
    """
    if event != "on_fit_end":
        for callback in callbacks:
            getattr(callback, event)(trainer, *arguments)
        return
    errors: list[BaseException] = []
    for callback in callbacks:
        try:
            callback.on_fit_end(trainer, *arguments)
        except BaseException as error:
            has_first = bool(errors) or trainer.history.status == "failed"
            if has_first:
                name = type(callback).__name__
                warnings.warn(
                    f"After another error `{name}.on_fit_end` failed, too: {error!r}.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            else:
                errors.append(error)
    if errors:
        raise errors[0]


class EarlyStopping(Callback):
    """End the phase when a value has not improved for some of its epochs.

    A fit of one phase ends with it; in a fit of several the next one begins.

    Args:
        monitor: The name of a record's value, or of one of the trainer's own metrics. A value
            that is not finite is no improvement.
        mode: Whether it should be small ("min") or large ("max"). "auto" takes "max" where
            "accuracy" is in the name and "min" for the records' other values; for a metric of
            another name it has to be said.
        patience: Epochs without improvement after which the phase ends, at least 1.
        min_delta: What counts as an improvement, at least 0.

    Raises:
        ConfigError: A value cannot work; at the start of a fit: it has no such metric.

    Example:
        >>> stopping = EarlyStopping(monitor="val_accuracy", patience=3)
        >>> stopping.state_dict()
        {'best': None, 'waited': 0}
    """

    def __init__(
        self,
        *,
        monitor: str = "val_loss",
        mode: Mode = "auto",
        patience: int = 5,
        min_delta: float = 0.0,
    ) -> None:
        self.mode: Literal["min", "max"] = check_monitor(monitor, mode)
        self.monitor: str = monitor
        self.patience: int = check_integer("patience", patience, minimum=1)
        self.min_delta: float = check_number(
            "min_delta", min_delta, lambda value: value >= 0, "of at least 0"
        )
        self._best: float | None = None
        self._waited = 0

    def on_fit_start(self, trainer: Trainer, num_epochs: int) -> None:
        """Check that the fit gives the value."""
        check_record_key(self.monitor, trainer.metrics)

    def on_phase_start(self, trainer: Trainer, phase: Phase) -> None:
        """Forget an earlier phase."""
        self._best, self._waited = None, 0

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        """Compare with the best so far."""
        value = record.get(self.monitor) * (1 if self.mode == "max" else -1)
        if math.isfinite(value) and (self._best is None or value > self._best + self.min_delta):
            self._best, self._waited = value, 0
            return
        self._waited += 1
        if self._waited >= self.patience:
            trainer.should_stop_phase = True

    def state_dict(self) -> dict[str, Any]:
        """Return the best value of the phase, of which larger is better, and the waiting."""
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the best value and the waiting."""
        self._best, self._waited = state["best"], state["waited"]


class TimeBudget(Callback):
    """End the fit while there is time left, but likely not enough for another epoch.

    The next epoch is taken to last as long as the longest so far, with all that happens
    between two epochs. A fit ends after an epoch only, and the first one always runs: an epoch
    that takes longer than all before it, such as the first one of a phase in which more trains,
    may end past the budget. A fit that is resumed has the whole budget again: it is that of one
    run of the program, as a queue grants it, and the next run goes on where this one ended.

    Args:
        seconds: The budget is the sum of the three, each at least 0, above 0 in all.
        minutes: See `seconds`.
        hours: See `seconds`.

    Raises:
        ConfigError: A number is out of range, or there is no time at all.

    Example:
        >>> TimeBudget(hours=1, minutes=30).seconds
        5400.0
    """

    def __init__(self, *, seconds: float = 0.0, minutes: float = 0.0, hours: float = 0.0) -> None:
        parts = {"seconds": seconds, "minutes": minutes, "hours": hours}
        checked = [
            check_number(name, value, lambda number: number >= 0, "of at least 0")
            for name, value in parts.items()
        ]
        self.seconds: float = checked[0] + 60 * checked[1] + 3600 * checked[2]
        if not self.seconds:
            raise ConfigError(
                "A time budget should be above 0. Give it `seconds`, `minutes` or `hours`."
            )
        self._start = self._last_end = self._longest = 0.0

    def on_fit_start(self, trainer: Trainer, num_epochs: int) -> None:
        """Start the clock."""
        self._start = time.perf_counter()
        self._longest = 0.0

    def on_phase_start(self, trainer: Trainer, phase: Phase) -> None:
        """Leave what was computed once for the phase out of its first epoch."""
        self._last_end = time.perf_counter()

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        """End the fit where another epoch would not fit."""
        now = time.perf_counter()
        self._longest = max(self._longest, now - self._last_end)
        self._last_end = now
        if now - self._start + self._longest > self.seconds:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds of the longest epoch."""
        return {"longest": self._longest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what an epoch takes, and a budget of its own."""
        self._longest = state["longest"]


class SaveBest(Callback):
    """Save the best epoch so far as an artifact, as soon as there is a better one.

    So there is an artifact even where the machine ends the fit. The weights are those that were
    evaluated, with an average of weights the averaged ones. When the fit ends the file is
    written once more, as `trainer.save` then does it: with the whole history, and with
    `wise_ft` the interpolated weights. An epoch whose validation loss is not finite is not
    saved.

    Args:
        path: The file, usually `*.safetensors`; an older one is replaced in one step.

    Raises:
        OutputError: The file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path = check_writable(path)

    def on_best(self, trainer: Trainer, record: EpochRecord) -> None:
        """Save the epoch."""
        self._save(trainer)

    def on_fit_end(self, trainer: Trainer, history: History) -> None:
        """Save what the fit ends with, if an epoch was completed."""
        if history.records:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if math.isfinite(trainer.history.best.val_loss):
            trainer.save(self.path)


def check_callables(criterion: object, augmentation: object, callbacks: Any) -> None:
    """Check what the trainer will call later.

    Raises:
        ConfigError: The criterion or the augmentation cannot be called, or `callbacks` is no
            list of callbacks.
    """
    if criterion is not None:
        check_callable("criterion", criterion, "a callable from (logits, targets) to the loss")
    if augmentation is not None and not isinstance(augmentation, str):
        check_callable("augmentation", augmentation, "a preset's name or a callable")
    is_list = isinstance(callbacks, Sequence)
    if not is_list or not all(isinstance(each, Callback) for each in callbacks):
        raise ConfigError(f"`callbacks` should be a list of Callbacks, found {callbacks!r}.")
