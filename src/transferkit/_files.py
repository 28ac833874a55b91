"""Writing files so that a stop at any moment leaves the old file or the new one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transferkit._checks import check_path
from transferkit.errors import OutputError, TransferkitError

TEMPORARY_PREFIX = ".transferkit-"

WRITE_POINTS = ("reserved", "written", "flushed", "replaced", "durable")
"""The points in the writing of a file that `atomic_path` passes, in their order."""


def _pass(point: str) -> None:
    """Do nothing: tests put a fault here, one for each point at which a process may end."""


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path` that takes its place when the block ends well.

    The temporary file lies in the same folder, so that the last step is a rename within
    one file system. It is flushed to disk first; when the block raises, it is removed
    and the old file stays.

    Args:
        path: Where the file shall stand. Its folder must exist.

    Yields:
        The temporary path to write to.

    Raises:
        OutputError: The folder is missing or cannot be written, or writing failed.
    """
    target = check_path("path", path)
    temporary = _reserve(target)
    try:
        _pass("reserved")
        yield temporary
        _pass("written")
        _share(temporary)
        _flush(temporary)
        _pass("flushed")
        temporary.replace(target)
        _pass("replaced")
        _flush_folder(target.parent)
        _pass("durable")
    except TransferkitError:
        raise
    except OSError as error:
        raise _output_error(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` as UTF-8 to `path`, all or nothing, and return the path.

    Raises:
        OutputError: The file cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create the folder `path` with its parents, check that it takes files, and return it.

    Raises:
        OutputError: It cannot be created, is a file, or cannot be written.
    """
    folder = check_path("path", path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"Cannot write into the folder `{folder}`: {_reason(error)}. "
            f"Choose a folder that exists or can be created and that you may write to."
        ) from error
    return folder


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Check now that a file can be written at `path` later, and return the path.

    A fit of hours must not end with an output folder that was never writable.

    Raises:
        OutputError: The folder is missing or cannot be written, or `path` is a folder.
    """
    target = check_path("path", path)
    _reserve(target).unlink()
    return target


def _reserve(target: Path) -> Path:
    """Create an empty temporary file beside `target` and return its path."""
    if target.is_dir():
        raise OutputError(f"Cannot write `{target}`: it is a folder. Give a file name.")
    if target.exists() and not target.is_file():
        # Renaming over a device such as /dev/null would put a file in its place.
        raise OutputError(f"Cannot write `{target}`: it is no regular file. Give a file name.")
    if not target.parent.is_dir():
        raise OutputError(
            f"Cannot write `{target}`: the folder `{target.parent}` does not exist. "
            f"Create it first."
        )
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=TEMPORARY_PREFIX)
        os.close(handle)
    except OSError as error:
        raise _output_error(target, error) from error
    return Path(name)


def _share(path: Path) -> None:
    """Give a file the usual rights; temporary ones are private to the user."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make the rename itself durable; Windows cannot open folders, and needs no such call."""
    with suppress(PermissionError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _output_error(target: Path, error: OSError) -> OutputError:
    return OutputError(
        f"Cannot write `{target}`: {_reason(error)}. "
        f"Choose a place that you may write to and that has room."
    )


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
