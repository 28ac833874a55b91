"""The journal of a bulk prediction: a line for each picture that is done.

A line goes to the system as soon as its picture is done, so that a process that is killed loses
none of them. What a kill or a full disk leaves of a line is cut off when the journal is opened
again; the lines from there on, if a power cut damaged more than the last, are computed anew.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from typing_extensions import Self

from transferkit.errors import ConfigError, OutputError

JOURNAL_VERSION = 1
_MAGIC = b'{"transferkit_journal": '
_MAX_HEADER = 65536
_SYNC_SECONDS = 5.0
"""How long what was written may stay in the system's memory, which a power cut empties."""


@dataclass(frozen=True)
class Entry:
    """A line of the journal: a picture that is done.

    Args:
        path: Its path, as it was given.
        size: The bytes of the file; None where it could not be looked at.
        modified: When it was last changed, in nanoseconds; None likewise.
        digest: The SHA-256 of its bytes, in hex; None where it was not computed.
        record: What was found, as plain JSON data without the path; None where it is that of
            the picture with the same digest.
    """

    path: str
    size: int | None = None
    modified: int | None = None
    digest: str | None = None
    record: Mapping[str, Any] | None = None

    @property
    def is_failure(self) -> bool:
        """Whether the picture could not be read."""
        return self.record is not None and "error" in self.record

    def to_line(self) -> bytes:
        """Return the entry as JSON with a line's end."""
        return json.dumps(vars(self), separators=(",", ":"), allow_nan=False).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """Read a line.

        Raises:
            ValueError: It is not whole.
        """
        values = json.loads(line) if line.endswith(b"\n") else None
        if not isinstance(values, dict):
            raise ValueError("The line is cut off.")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError("The line is none of a journal.") from error


class Journal:
    """An append-only file that one process at a time writes.

    Args:
        path: The file.
        settings: What a run has to have in common with the one that it goes on from.
        resume: Go on with what is there, if anything is.
        overwrite: Begin anew, whatever is there.
        index: Called with each entry that is there, and its offset.

    Raises:
        OutputError: The file cannot be written, is no journal or another process writes it, or
            there is one and neither `resume` nor `overwrite` says what to do with it.
        ConfigError: It is of a run with other settings.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        *,
        resume: bool,
        overwrite: bool,
        index: Callable[[int, Entry], None],
    ) -> None:
        self.path: Path = path
        self._synced: float = time.monotonic()
        try:
            self._file: FileIO = _open_locked(path)
        except OSError as error:
            raise self._error(error) from error
        try:
            if self._is_to_begin(settings, resume, overwrite):
                self._begin(settings)
            self._end: int = self._recover(index)
            self._reader: BinaryIO = path.open("rb")
        except BaseException:
            self._file.close()
            raise
        self.start: int = self._end
        """Where the entries of this run begin."""

    @property
    def is_empty(self) -> bool:
        """Whether it has no entries."""
        return self._end == self._header_end

    def append(self, entry: Entry) -> int:
        """Write an entry and return its offset.

        Raises:
            OutputError: It cannot be written; the journal is as it was before.
        """
        offset = self._end
        self._write(entry.to_line())
        return offset

    def read(self, offset: int) -> Entry:
        """Return the entry at an offset."""
        self._reader.seek(offset)
        return Entry.from_line(self._reader.readline())

    def close(self, *, remove: bool = False) -> None:
        """Let others write the file; one without any entry is removed.

        Args:
            remove: Remove it in any case.
        """
        self._reader.close()
        unwanted = remove or self.is_empty
        if unwanted:
            # While it is locked, lest it be one that another process has begun to write.
            with suppress(PermissionError):  # Windows, which removes no file that is open.
                self.path.unlink(missing_ok=True)
                unwanted = False
        self._file.close()
        if unwanted:
            self.path.unlink(missing_ok=True)

    def _is_to_begin(self, settings: Mapping[str, Any], resume: bool, overwrite: bool) -> bool:
        """Look at the first line, and tell whether the file is to be begun anew."""
        self._file.seek(0)
        line = self._file.readline(_MAX_HEADER)
        if not (line.startswith(_MAGIC) or _MAGIC.startswith(line)):
            raise OutputError(
                f"`{self.path}` would be the journal, but is another file. Move it away, or give "
                f"the output another name."
            )
        if line and not (resume or overwrite):
            raise OutputError(
                f"`{self.path}` is the journal of a run that did not end. Go on with it by "
                f"`resume=True` (`--resume`), or begin anew by `overwrite=True` (`--overwrite`)."
            )
        if overwrite or not line.endswith(b"\n"):
            return True
        _check_settings(self.path, json.loads(line), settings)
        return False

    def _begin(self, settings: Mapping[str, Any]) -> None:
        self._file.truncate(0)
        self._end = 0
        header = {"transferkit_journal": JOURNAL_VERSION, **settings}
        self._write(json.dumps(header).encode() + b"\n")

    def _recover(self, index: Callable[[int, Entry], None]) -> int:
        """Hand over all entries, cut off what is not whole, and return where the file ends."""
        with self.path.open("rb") as lines:
            self._header_end: int = len(lines.readline())
            end = self._header_end
            for line in lines:
                try:
                    entry = Entry.from_line(line)
                except ValueError:
                    break
                index(end, entry)
                end += len(line)
        self._file.truncate(end)
        return end

    def _write(self, line: bytes) -> None:
        # Without a buffer: what Python holds back dies with the process.
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._file.fileno(), rest) :]
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise self._error(error) from error
        self._end += len(line)

    def _error(self, error: OSError) -> OutputError:
        if isinstance(error, BlockingIOError):
            return OutputError(
                f"Another process writes `{self.path}`. Wait for its end, or give the output "
                f"another name."
            )
        reason = (error.strerror or str(error)).lower()
        return OutputError(
            f"Cannot write the journal `{self.path}`: {reason}. What it holds is kept: mend that, "
            f"and go on by `resume=True` (`--resume`)."
        )


def read_engine(path: Path) -> Any:
    """Return the name of the engine that a journal was begun with; None where there is none."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline(_MAX_HEADER))
    except (OSError, ValueError):  # Opening it for the run says what is wrong with it.
        return None
    name = header.get("engine") if isinstance(header, dict) else None
    return name if name in ("pytorch", "openvino", "onnxruntime") else None


def _open_locked(path: Path) -> FileIO:
    """Open the file for this process alone, where the system has such locks.

    Raises:
        BlockingIOError: Another process has it.
    """
    while True:
        file = path.open("ab+", buffering=0)
        try:
            _lock(file)
            if _is_at(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # Its last owner removed it meanwhile: what is locked is no longer there.


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: FileIO) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return  # A file system without locks.


def _check_settings(path: Path, header: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Compare the first line with the settings of this run.

    Raises:
        ConfigError: They differ.
    """
    version = header["transferkit_journal"]
    if version != JOURNAL_VERSION:
        raise ConfigError(
            f"The journal `{path}` has version {version}, this transferkit writes "
            f"{JOURNAL_VERSION}. End the run with the transferkit that began it, or begin anew by "
            f"`overwrite=True` (`--overwrite`)."
        )
    for name, value in settings.items():
        if header.get(name) != value:
            raise ConfigError(
                f"The journal `{path}` belongs to another run: its {name} is "
                f"{header.get(name)!r}, here it is {value!r}. Take the same, or begin anew by "
                f"`overwrite=True` (`--overwrite`)."
            )
