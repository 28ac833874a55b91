"""Callbacks: what may watch a fit, write about it, or end it."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from transferkit._checks import check_callable, check_integer, check_number
from transferkit._device import describe_device
from transferkit._files import check_writable
from transferkit.errors import ConfigError, OutputError
from transferkit.training.head_start import describe_start
from transferkit.training.history import EpochRecord, History, check_record_key
from transferkit.training.phases import Phase

if TYPE_CHECKING:
    from transferkit.training.trainer import Trainer


class Callback:
    """Base of all callbacks: methods that do nothing. Override those that you need.

    Order of the calls: `on_fit_start`; for each phase `on_phase_start`; for each epoch of it
    `on_epoch_start`, `on_step_end` after each optimizer update, `on_epoch_end`; `on_fit_end`,
    also after Ctrl-C and after an error.
    A callback may set `trainer.should_stop = True` to end the fit after the epoch, or
    `trainer.should_stop_phase = True` to end its phase.
    """

    def on_fit_start(self, trainer: Trainer, num_epochs: int) -> None:
        """Before the first phase; the model is on its device, frozen as in that phase."""

    def on_phase_start(self, trainer: Trainer, phase: Phase) -> None:
        """Before the first epoch of a phase; the model is frozen as it says."""

    def on_epoch_start(self, trainer: Trainer, epoch: int) -> None:
        """Before an epoch, numbered from 1."""

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        """After an optimizer update, numbered from 1 within its epoch."""

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        """After both passes of an epoch; the record is in the trainer's history already."""

    def on_fit_end(self, trainer: Trainer, history: History) -> None:
        """After the last epoch; the best weights are back in the model."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs to go on as if it had not stopped, as JSON data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; called after the start of fit and phase."""


class ProgressBar(Callback):
    """Show a bar with the steps of the running epoch, on standard error.

    Nothing is drawn where standard error is no terminal.
    """

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._num_epochs = 0

    def on_fit_start(self, trainer: Trainer, num_epochs: int) -> None:
        """Note how many epochs there will be."""
        self._num_epochs = num_epochs

    def on_epoch_start(self, trainer: Trainer, epoch: int) -> None:
        """Begin a bar."""
        self._bar = tqdm(
            total=trainer.steps_per_epoch,
            desc=f"epoch {epoch}/{self._num_epochs}",
            unit="step",
            leave=False,
            disable=None,  # tqdm's word for: only on a terminal
        )

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update()

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        """Remove the bar."""
        self._close()

    def on_fit_end(self, trainer: Trainer, history: History) -> None:
        """Remove the bar of an epoch that was cut off."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


class EpochLog(Callback):
    """Print a line for each phase and each epoch, and at the end the time and the best accuracy."""

    def __init__(self) -> None:
        self._num_epochs = 0

    def on_fit_start(self, trainer: Trainer, num_epochs: int) -> None:
        """Print what will be trained, and where."""
        self._num_epochs = num_epochs
        model = trainer.model
        self._print(
            f"Training {model.num_trainable_parameters:,} of {model.num_parameters:,} parameters "
            f"of {model.backbone_name} on {describe_device(trainer.device)}, "
            f"recipe {trainer.recipe.name}, {_describe_rates(trainer)}, seed {trainer.seed}"
        )

    def on_phase_start(self, trainer: Trainer, phase: Phase) -> None:
        """Print which phase begins, where there are several, and what is computed once."""
        settings = trainer.history.settings
        if phase.name == settings["phases"][0]["name"] and settings["head_start"] is not None:
            self._print(describe_start(settings["head_start"]))
        if len(settings["phases"]) > 1:
            model = trainer.model
            self._print(
                f"Phase {phase.name}: {model.num_trainable_parameters:,} of "
                f"{model.num_parameters:,} parameters train"
            )
        features = settings["features"][phase.name]
        if features["cached"]:
            self._print(f"Features of the frozen part are computed once: {features['in_words']}")

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        """Print loss and accuracy of both passes."""
        width = len(str(self._num_epochs))
        self._print(
            f"epoch {record.epoch:{width}}/{self._num_epochs}  "
            f"train loss {record.train_loss:.4f} accuracy {record.train_accuracy:.4f}  "
            f"val loss {record.val_loss:.4f} accuracy {record.val_accuracy:.4f}  "
            f"{record.seconds:.1f} s"
        )

    def on_fit_end(self, trainer: Trainer, history: History) -> None:
        """Print what was skipped, the elapsed time and the best epoch."""
        if history.skipped:
            first = history.skipped[0]
            self._print(
                f"Skipped {len(history.skipped)} pictures, listed in the history. "
                f"The first: {first['reason']}"
            )
        if not history.records:
            return
        minutes, seconds = divmod(history.seconds, 60)
        start = f"{history.status.capitalize()} after {minutes:.0f} min {seconds:.0f} s."
        best = f"Best val accuracy {history.best.val_accuracy:.4f} in epoch {history.best.epoch}"
        result = history.settings.get("wise_ft_result")
        if result is None:
            self._print(f"{start} {best}; its weights are kept.")
            return
        factor = result["factor"]
        (score,) = (each for each in result["scores"] if each["factor"] == factor)
        self._print(
            f"{start} {best}. Interpolated with the weights before fine-tuning by the factor "
            f"{factor:g}: val accuracy {score['val_accuracy']:.4f}; these weights are kept."
        )

    def _print(self, text: str) -> None:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def _describe_rates(trainer: Trainer) -> str:
    settings = trainer.history.settings
    if settings["lr"] is None:
        return f"solver {settings['solver']}"
    lr, factor = settings["lr"], settings["backbone_lr_factor"]
    apart = factor not in (None, 1.0) and not trainer.model.is_backbone_frozen
    return f"lr {lr:g}" + (f" (backbone {lr * factor:g})" if apart else "")


class EarlyStopping(Callback):
    """End the phase when a value has not improved for some of its epochs.

    A fit of one phase ends with it; in a fit of several the next one begins.

    Args:
        monitor: A record key; with "accuracy" in its name larger is better, else smaller.
        patience: Epochs without improvement after which the fit ends, at least 1.
        min_delta: What counts as an improvement, at least 0.

    Raises:
        ConfigError: A value cannot work.
    """

    def __init__(
        self, *, monitor: str = "val_loss", patience: int = 5, min_delta: float = 0.0
    ) -> None:
        self.monitor: str = check_record_key(monitor)
        self.patience: int = check_integer("patience", patience, minimum=1)
        self.min_delta: float = check_number(
            "min_delta", min_delta, lambda value: value >= 0, "of at least 0"
        )
        self._best = float("-inf")
        self._waited = 0

    def on_phase_start(self, trainer: Trainer, phase: Phase) -> None:
        """Forget an earlier phase."""
        self._best, self._waited = float("-inf"), 0

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        """Compare with the best so far."""
        sign = 1.0 if "accuracy" in self.monitor else -1.0
        value = sign * record.get(self.monitor)
        if value > self._best + self.min_delta or (value > self._best == float("-inf")):
            self._best, self._waited = value, 0
            return
        self._waited += 1
        if self._waited >= self.patience:
            trainer.should_stop_phase = True

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far, and for how many epochs there was none better."""
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on waiting."""
        self._best, self._waited = state["best"], state["waited"]


class CSVLog(Callback):
    """Write the records to a CSV file, a row as soon as its epoch ends.

    Args:
        path: The file; one from an earlier fit is replaced when the fit starts.

    Raises:
        OutputError: The file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path = check_writable(path)

    def on_fit_start(self, trainer: Trainer, num_epochs: int) -> None:
        """Begin the file with its header."""
        self._write("w", [field.name for field in fields(EpochRecord)])

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        """Append the epoch's row."""
        self._write("a", list(asdict(record).values()))

    def _write(self, mode: str, row: list[Any]) -> None:
        try:
            with self.path.open(mode, newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(row)
        except OSError as error:
            raise OutputError(f"Cannot write `{self.path}`: {error.strerror}.") from error


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
