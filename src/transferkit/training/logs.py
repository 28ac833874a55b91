"""Callbacks that tell of a fit: printed lines, a progress bar, and files."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from transferkit._device import describe_device
from transferkit._files import atomic_path, check_writable, make_folder
from transferkit.errors import OutputError, missing_dependency
from transferkit.training.callbacks import Callback
from transferkit.training.head_start import describe_start
from transferkit.training.history import RECORD_FIELDS, EpochRecord, History
from transferkit.training.phases import Phase

if TYPE_CHECKING:
    from transferkit.training.trainer import Trainer


class ProgressBar(Callback):
    """Show a bar with the steps of the running epoch, their rate and the time left.

    It is drawn on a terminal and in a notebook, there as a widget if ipywidgets is installed.
    Where standard error is anything else, such as a file, nothing is written. Its length is
    `trainer.steps_per_epoch`, also in a phase on cached features, which come in as many
    batches; they are computed before its steps. A solver takes no steps, and the bar waits.
    """

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._num_epochs = 0

    def on_fit_start(self, trainer: Trainer, num_epochs: int) -> None:
        """Note how many epochs there will be."""
        self._num_epochs = num_epochs

    def on_epoch_start(self, trainer: Trainer, epoch: int) -> None:
        """Begin a bar."""
        if _shows_bars():
            self._bar = _bar_class()(
                total=trainer.steps_per_epoch,
                desc=f"epoch {epoch}/{self._num_epochs}",
                unit="step",
                leave=False,
                miniters=1,  # Without a monitor nobody else redraws after a slow step.
            )

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            if step > self._bar.n + 1:  # A fit that was resumed in the middle of the epoch.
                self._bar.n = self._bar.last_print_n = self._bar.initial = step - 1
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


def _shows_bars() -> bool:
    """Tell whether standard error ends on a terminal or in a notebook."""
    stream = sys.stderr
    if not hasattr(stream, "isatty"):  # Programs with windows only have no standard error.
        return False
    kernel = sys.modules.get("ipykernel.iostream")
    return stream.isatty() or (kernel is not None and isinstance(stream, kernel.OutStream))


def _bar_class() -> Any:
    """Return tqdm's class for this place, without the thread that it keeps until Python ends."""
    with warnings.catch_warnings():
        # Without ipywidgets a notebook shows the bar as text, which is all that it warns about.
        warnings.simplefilter("ignore")
        auto = importlib.import_module("tqdm.auto")
    return type("Bar", (auto.tqdm,), {"monitor_interval": 0})


class EpochLog(Callback):
    """Print a line for each phase and each epoch, and at the end the time and the best accuracy.

    The lines go to standard output and are the same on a terminal, in a notebook and in a file.
    """

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
        if trainer.history.records:
            self._print(f"Going on after epoch {trainer.history.records[-1].epoch}")

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
            + "".join(f"{name} {value:.4f}  " for name, value in record.metrics.items())
            + f"{record.seconds:.1f} s"
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


class _RecordFile(Callback):
    """Write a line of a file for each record, as soon as its epoch ends."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path = check_writable(path)
        self._metrics: tuple[str, ...] = ()

    def on_fit_start(self, trainer: Trainer, num_epochs: int) -> None:
        """Write the file anew, with the epochs of before where the fit is resumed."""
        self._metrics = tuple(trainer.metrics)
        lines = [self._line(record) for record in trainer.history.records]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join([self._header(), *lines]), encoding="utf-8", newline="")

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        """Append the epoch's line."""
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                file.write(self._line(record))
        except OSError as error:
            raise OutputError(f"Cannot write `{self.path}`: {error.strerror}.") from error

    def _header(self) -> str:
        return ""

    def _line(self, record: EpochRecord) -> str:
        raise NotImplementedError


class CSVLog(_RecordFile):
    """Write the records to a CSV file, a row as soon as its epoch ends.

    Args:
        path: The file; one from an earlier fit is replaced when the fit starts. A fit that is
            resumed begins it with the rows of the epochs before.

    Raises:
        OutputError: The file cannot be written.
    """

    def _header(self) -> str:
        return _csv_row([*RECORD_FIELDS, *self._metrics])

    def _line(self, record: EpochRecord) -> str:
        return _csv_row(
            [*(getattr(record, name) for name in RECORD_FIELDS), *(record.metrics.values())]
        )


def _csv_row(values: list[Any]) -> str:
    file = io.StringIO(newline="")
    csv.writer(file).writerow(values)
    return file.getvalue()


class JSONLog(_RecordFile):
    """Write the records to a file of JSON lines, an object as soon as its epoch ends.

    Its keys are those of `EpochRecord`; values that are not finite stand as null.

    Args:
        path: The file, usually `*.jsonl`; one from an earlier fit is replaced when the fit
            starts. A fit that is resumed begins it with the lines of the epochs before.

    Raises:
        OutputError: The file cannot be written.
    """

    def _line(self, record: EpochRecord) -> str:
        return json.dumps(record.to_dict(), allow_nan=False) + "\n"


class TensorBoardLog(Callback):
    """Write loss, accuracy and learning rates by the epoch for TensorBoard.

    The tags are `loss/train`, `loss/val`, `accuracy/train`, `accuracy/val` and `lr/` with the
    name of each parameter group, at the epoch's start, and `metrics/` with the name of each metric
    of the trainer. What is on disk after an epoch is
    complete. A later fit, or one that is resumed, takes the place of the epochs from its first
    one on.

    Args:
        folder: Where to write; created if it is not there. Each fit has a file of its own in
            it: give fits that are to be compared folders of their own.

    Raises:
        MissingDependencyError: `tensorboard` is not installed.
        OutputError: The folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._writer_class = _import_writer()
        self.folder: Path = make_folder(folder)
        self._writer: Any = None

    def on_fit_start(self, trainer: Trainer, num_epochs: int) -> None:
        """Begin a file."""
        first = len(trainer.history.records) + 1
        self._writer = self._writer_class(os.fspath(self.folder), purge_step=first)

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        """Write the epoch's points."""
        values = {
            "loss/train": record.train_loss,
            "loss/val": record.val_loss,
            "accuracy/train": record.train_accuracy,
            "accuracy/val": record.val_accuracy,
            **{f"lr/{name}": lr for name, lr in trainer.lrs.items()},
            **{f"metrics/{name}": value for name, value in record.metrics.items()},
        }
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, record.epoch)
        self._writer.flush()

    def on_fit_end(self, trainer: Trainer, history: History) -> None:
        """Close the file, and with it the thread that writes it."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None


def _import_writer() -> Any:
    """Return PyTorch's class that writes for TensorBoard.

    Raises:
        MissingDependencyError: `tensorboard` is not installed.
    """
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        raise missing_dependency(
            "tensorboard", purpose="`TensorBoardLog`", extra="tensorboard"
        ) from error
