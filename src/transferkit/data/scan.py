"""Finding the pictures in a folder: at any depth, by extension, in one fixed order.

Files of a folder come first, by name, then its subfolders, by name. Hidden files and what
desktops leave behind are passed over without a word.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fnmatch import translate
from pathlib import Path

from transferkit.data.dataset import SkippedFile
from transferkit.errors import ConfigError, DataError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
"""File name endings that make a file a candidate, in lower case; upper case counts too."""

DEFAULT_EXCLUDE = ("imageNotFound.gif",)
"""Left out unless the caller says otherwise: a photo host's "not found" placeholder, which
the published ants-and-bees archive has among its ants."""

_LEFT_BEHIND = frozenset(
    {"__MACOSX", "__pycache__", "Thumbs.db", "ehthumbs.db", "desktop.ini", "Icon\r"}
)


class Walk:
    """A walk through folders that enters each real folder once, whatever the links.

    Args:
        exclude: Glob patterns over file names that are left out.
    """

    def __init__(self, exclude: Sequence[str]) -> None:
        self._patterns = [(each, re.compile(translate(each)).match) for each in exclude]
        self.skipped: list[SkippedFile] = []
        self._entered: dict[tuple[int, int], str] = {}

    def enter(self, folder: str) -> bool:
        """Note a folder; False where it was entered before, by this name or another."""
        return self.first_name(folder) is None

    def first_name(self, folder: str) -> str | None:
        """Note a folder; where it was entered before, return the name that it had then."""
        try:
            status = os.stat(folder)  # noqa: PTH116  no object for each folder
        except OSError as error:
            raise unreadable(folder, error) from error
        key = (status.st_dev, status.st_ino)
        first = self._entered.get(key)
        if first is None:
            self._entered[key] = folder
        return first

    def enter_above(self, folder: str) -> None:
        """Note a folder and all that it lies in, so that no link leads back out of it."""
        self.enter(folder)
        for above in Path(os.path.realpath(folder)).parents:
            with suppress(DataError):  # One that cannot be looked at cannot be entered either.
                self.enter(str(above))

    def pictures(self, folder: str) -> Iterator[tuple[str, list[str]]]:
        """Yield each folder that has pictures with their sorted names; `folder` is entered."""
        waiting: list[tuple[str, str]] = []
        while True:
            names, subfolders = self._list(folder)
            if names:
                yield folder, names
            waiting += [(folder, name) for name in reversed(subfolders)]
            while waiting:
                parent, name = waiting.pop()
                folder = os.path.join(parent, name)  # noqa: PTH118  a third of a path's memory
                if self.enter(folder):
                    break
                self.skip(parent, name, "a link to a folder that is read already")
            else:
                return

    def _list(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the names of a folder's pictures and subfolders, sorted; note the rest."""
        pictures, subfolders, others = [], [], []
        for entry in entries(folder):
            name = entry.name
            if is_hidden(name):
                continue
            reason = self._reason_to_skip(entry)
            if reason is None:
                pictures.append(name)
            elif is_folder(entry):
                subfolders.append(name)
            else:
                others.append((name, reason))
        for name, reason in sorted(others):
            self.skip(folder, name, reason)
        return sorted(pictures), sorted(subfolders)

    def _reason_to_skip(self, entry: os.DirEntry[str]) -> str | None:
        """Return why an entry is no candidate; None where it is one."""
        name = entry.name
        for pattern, matches in self._patterns:
            if matches(name):
                return f"excluded by `{pattern}`"
        # As `os.path.splitext` has it, whose calls would take a third of the scan.
        place = name.rfind(".")
        extension = name[place:] if place > 0 else ""
        if extension.lower() not in EXTENSIONS:
            return f"no picture by its extension `{extension}`"
        try:
            return None if entry.is_file() else "no regular file"
        except OSError:  # Links that lead round in a circle.
            return "no regular file"

    def skip(self, folder: str, name: str, reason: str) -> None:
        """Note a file that is left out."""
        self.skipped.append(SkippedFile(Path(folder, name), reason))


def entries(folder: str) -> Iterator[os.DirEntry[str]]:
    """Yield what is in a folder.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            yield from found
    except OSError as error:
        raise unreadable(folder, error) from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_folder_there(path: str | os.PathLike[str]) -> bool:
    """Tell whether there is a folder at a path.

    Raises:
        DataError: That cannot be told.
    """
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)  # noqa: PTH116  its errors are told apart
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: with a NUL in it.
        return False
    except OSError as error:
        raise unreadable(path, error) from error


def subfolder_names(folder: Path) -> list[str]:
    """Return the names of a folder's own folders, in natural order, without hidden ones."""
    names = [entry.name for entry in entries(str(folder)) if is_folder(entry)]
    return sorted((name for name in names if not is_hidden(name)), key=natural_key)


def is_hidden(name: str) -> bool:
    """Tell whether a name is passed over without a word."""
    return name.startswith(".") or name in _LEFT_BEHIND


def unreadable(folder: object, error: OSError) -> DataError:
    """Build the error for a folder that cannot be read."""
    reason = (error.strerror or str(error)).lower()
    return DataError(f"Cannot read the folder `{folder}`: {reason}.")


def check_exclude(exclude: Sequence[str]) -> tuple[str, ...]:
    """Return glob patterns.

    Raises:
        ConfigError: They are something else.
    """
    is_list = isinstance(exclude, Sequence) and not isinstance(exclude, (str, bytes))
    if not is_list or not all(isinstance(each, str) for each in exclude):
        raise ConfigError(f"`exclude` should be a list of glob patterns, found {exclude!r}.")
    return tuple(exclude)


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return a sort key that orders runs of digits by their value.

    Example:
        >>> sorted(["10", "9", "a2", "a10"], key=natural_key)
        ['9', '10', 'a2', 'a10']
    """
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [_part_key(part) for part in parts], name


def _part_key(part: str) -> tuple[int, int, str]:
    if not (part.isascii() and part.isdigit()):
        return 1, 0, part
    # Of numbers without zeros in front the longer is the larger; `int` refuses very long ones.
    digits = part.lstrip("0")
    return 0, len(digits), digits
