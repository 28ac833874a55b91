"""Checkpoints: where the states of a fit are kept, which of them stay, and how they are read."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from transferkit._checks import check_flag, check_integer, check_path, check_type
from transferkit._files import TEMPORARY_PREFIX, make_folder
from transferkit.artifacts.format import FileKind, read_file, write_file
from transferkit.errors import CheckpointError, ConfigError, OutputError
from transferkit.training.distributed import World

CHECKPOINT = FileKind("a checkpoint", "transferkit_checkpoint", 1, CheckpointError, "Trainer.fit")

_NAME = re.compile(r"epoch-(\d{6})-batch-(\d{8})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where a fit keeps its state, how often, and how much of it.

    Args:
        folder: The folder; it is created. Each fit has one of its own.
        every_epochs: Save after so many epochs, at least 1. The last epoch, the end of a phase,
            a fit that is stopped by a signal and, with `keep_best`, the best epoch so far are
            saved always.
        every_steps: Save after so many optimizer updates within an epoch, too, at least 1; None
            does not.
        keep_last: How many of the newest stay, at least 1. With 2 there is one to go back to
            where the newest is damaged.
        keep_best: Whether that of the best epoch so far stays, too.

    Raises:
        ConfigError: A value cannot work.

    Example:
        >>> Checkpoints(folder="runs/ants", every_steps=500).keep_last
        2
    """

    folder: str | os.PathLike[str]
    every_epochs: int = 1
    every_steps: int | None = None
    keep_last: int = 2
    keep_best: bool = True

    def __post_init__(self) -> None:
        check_path("folder", self.folder)
        check_integer("every_epochs", self.every_epochs, minimum=1)
        if self.every_steps is not None:
            check_integer("every_steps", self.every_steps, minimum=1)
        check_integer("keep_last", self.keep_last, minimum=1)
        check_flag("keep_best", self.keep_best)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON data."""
        return asdict(self) | {"folder": os.fspath(self.folder)}


def make_checkpoints(
    checkpoints: Checkpoints | str | os.PathLike[str] | None,
) -> Checkpoints | None:
    """Return the settings, from a folder alone, too.

    Raises:
        ConfigError: It is neither.
    """
    if checkpoints is None or isinstance(checkpoints, Checkpoints):
        return checkpoints
    check_type("checkpoints", checkpoints, (str, os.PathLike), "a folder or Checkpoints(...)")
    return Checkpoints(folder=checkpoints)


class Place(NamedTuple):
    """What a fit does next.

    Args:
        epoch: The epoch, from 1; one more than there are where the fit is over.
        batch: The number of the batch in it, from 0.
    """

    epoch: int
    batch: int

    @property
    def file_name(self) -> str:
        """The name of the checkpoint's file. Names sort as places do."""
        return f"epoch-{self.epoch:06}-batch-{self.batch:08}.safetensors"


START = Place(1, 0)
"""The first batch of the first epoch."""


class Checkpoint(NamedTuple):
    """A state that was read.

    Args:
        path: Its file.
        data: The JSON data.
        tensors: The tensors, on the CPU.
    """

    path: Path
    data: dict[str, Any]
    tensors: dict[str, Tensor]


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the files of all checkpoints in a folder, the newest last.

    Args:
        folder: The folder, which need not exist.

    Example:
        >>> import tempfile
        >>> list_checkpoints(tempfile.mkdtemp())
        []
    """
    path = check_path("folder", folder)
    if not path.is_dir():
        return []
    return sorted(each for each in path.iterdir() if _NAME.fullmatch(each.name))


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint. Nothing in it is executed.

    Args:
        path: Its file.

    Raises:
        CheckpointError: There is no such file, or it is damaged or of another kind.
    """
    tensors, data = read_file(path, CHECKPOINT)
    return Checkpoint(Path(path), data, tensors)


def read_newest(folder: str | os.PathLike[str]) -> Checkpoint | None:
    """Read the newest checkpoint of a folder that is whole.

    A damaged one is passed over with a warning that names it.

    Args:
        folder: The folder.

    Returns:
        The checkpoint; None where there is none at all.

    Raises:
        CheckpointError: There are some, and none of them can be read.
    """
    paths = list_checkpoints(folder)
    errors: list[CheckpointError] = []
    for path in reversed(paths):
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError as error:
            errors.append(error)
            continue
        for each in errors:
            warnings.warn(
                f"{each} The fit goes on from the one before, `{path.name}`.", stacklevel=2
            )
        return checkpoint
    if not paths:
        return None
    raise CheckpointError(
        f"None of the {len(paths)} checkpoints in `{os.fspath(folder)}` can be read. The newest: "
        f"{errors[0]} To train from the start, remove them or name another folder."
    )


Resume: TypeAlias = "bool | str | os.PathLike[str]"
"""What a fit goes on from: "auto", True, False, or the path of a checkpoint."""


class CheckpointStore:
    """Write the checkpoints of one fit, and remove those that need not stay.

    Args:
        settings: Where, how often and how many.

    Raises:
        OutputError: The folder cannot be written.
    """

    def __init__(self, settings: Checkpoints) -> None:
        self.settings: Checkpoints = settings
        self.folder: Path = make_folder(settings.folder)
        self._best: Path | None = None

    def begin(self, best: str | None = None) -> None:
        """Remove what a process that was killed while it wrote has left.

        Args:
            best: The file name of the best epoch's checkpoint, of a fit that goes on.
        """
        for each in self.folder.glob(f"{TEMPORARY_PREFIX}*"):
            each.unlink(missing_ok=True)
        path = None if best is None else self.folder / best
        self._best = path if path is not None and path.exists() else None

    def check_unused(self) -> None:
        """Check that no checkpoints of another fit are here.

        Raises:
            ConfigError: There are some.
        """
        found = list_checkpoints(self.folder)
        if found:
            raise ConfigError(
                f"The folder `{self.folder}` holds {len(found)} checkpoints of a fit already, and "
                f'a new fit would replace them. Go on from them with resume="auto", remove them, '
                f"or name another folder."
            )

    def save(
        self, place: Place, data: dict[str, Any], tensors: dict[str, Tensor], *, is_best: bool
    ) -> Path:
        """Write a checkpoint, all or nothing, and remove older ones.

        Args:
            place: What the fit does next.
            data: JSON data.
            tensors: Tensors, which are not changed.
            is_best: Whether the epoch that ended last is the best.

        Returns:
            Its file.

        Raises:
            OutputError: It cannot be written; the older ones are as they were.
        """
        path = self.folder / place.file_name
        best = path if is_best else self._best
        data = {
            "format_version": CHECKPOINT.version,
            "best_checkpoint": None if best is None else best.name,
            **data,
        }
        write_file(path, tensors, data, CHECKPOINT)
        self._best = best
        self._prune(path)
        return path

    def _prune(self, newest: Path) -> None:
        paths = list_checkpoints(self.folder)
        kept = {newest, *paths[-self.settings.keep_last :]}
        if self.settings.keep_best and self._best is not None:
            kept.add(self._best)
        for path in paths:
            if path in kept:
                continue
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise OutputError(
                    f"Cannot remove the older checkpoint `{path}`: {error.strerror}."
                ) from error


def find_checkpoint(
    checkpoints: Checkpoints | None, resume: Resume, world: World
) -> tuple[CheckpointStore | None, Checkpoint | None]:
    """Return where a fit keeps its checkpoints, and the one that it goes on from.

    Args:
        checkpoints: The settings; None keeps none.
        resume: As for `Trainer.fit`.
        world: The processes that train together: all go on from what the first one finds.

    Raises:
        ConfigError: `resume` needs a folder that there is not, or a new fit would replace an
            older one's checkpoints.
        CheckpointError: There is no checkpoint to go on from, or it cannot be read.
        OutputError: The folder cannot be written.
    """
    if not isinstance(resume, (bool, str, os.PathLike)):
        raise ConfigError(
            f'`resume` should be "auto", True, False or the path of a checkpoint, found {resume!r}.'
        )
    if checkpoints is None and (resume is True or resume == "auto"):
        raise ConfigError(
            f"resume={resume!r} needs a folder with checkpoints. Name one: "
            f'Trainer(..., checkpoints="runs/ants").'
        )
    store = world.together(lambda: None if checkpoints is None else CheckpointStore(checkpoints))
    found = world.together(lambda: _find(store, resume) if world.is_first else None)
    path = world.share(None if found is None else found.path)
    if path is None:
        return store, None
    return store, world.together(lambda: found or read_checkpoint(path))


def _find(store: CheckpointStore | None, resume: Resume) -> Checkpoint | None:
    if not isinstance(resume, bool) and resume != "auto":
        if store is not None and Path(resume).resolve().parent != store.folder.resolve():
            store.check_unused()
        return read_checkpoint(resume)
    if store is None:
        return None
    if not resume:
        store.check_unused()
        return None
    checkpoint = read_newest(store.folder)
    if checkpoint is None and resume is True:
        raise CheckpointError(
            f"resume=True, and there is no checkpoint in `{store.folder}`. Pass "
            f'resume="auto" to start where there is none.'
        )
    return checkpoint
