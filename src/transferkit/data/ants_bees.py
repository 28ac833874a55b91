"""The ants and bees: finding the photographs, fetching them, or drawing stand-ins.

The photographs are the "hymenoptera" set of the PyTorch lesson on transfer learning by
Sasank Chilamkurthy, https://pytorch.org/tutorials/beginner/transfer_learning_tutorial.html:
a small part of ImageNet, 245 training and 153 validation files.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias

import pooch
import requests

from transferkit._downloads import fetch
from transferkit.data.dataset import ImageSplits
from transferkit.data.drawn import write_drawn_pictures
from transferkit.data.folders import load_folders
from transferkit.errors import DataError, OutputError

ARCHIVE_URL = "https://download.pytorch.org/tutorial/hymenoptera_data.zip"
FOLDER_NAME = "hymenoptera_data"
DRAWN_NAME = "ants_bees_drawn_v1"
DATA_VARIABLE = "TRANSFERKIT_DATA"
"""Environment variable: the folder of the photographs, or the one that holds it."""

NUM_FILES = 398
FILE_COUNTS = {"train/ants": 124, "train/bees": 121, "val/ants": 70, "val/bees": 83}
CONTENT_DIGEST = "09b2329aa6956906521686a682b4c4793592134e6d718c3e9769e005ec240417"
"""SHA-256 over the sorted lines `path NUL sha256 LF` of all files; see `content_digest`."""

MAX_MEMBER_BYTES = 20_000_000
MAX_ARCHIVE_BYTES = 200_000_000

# What zipfile raises on archives that are damaged, locked or packed in an unknown way.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError)

Source: TypeAlias = Literal["path", "environment", "cache", "download", "drawn"]


@dataclass(frozen=True)
class AntsBees:
    """The ants and bees that were found.

    Args:
        root: The folder with `train/` and `val/`.
        source: Where they came from: "path", "environment", "cache", "download" or "drawn".
        reason: Why from there, in words.
    """

    root: Path
    source: Source
    reason: str

    def splits(self) -> ImageSplits:
        """Load the splits: 244 training and 153 validation pictures.

        Raises:
            DataError: The folder is not what training needs.
        """
        return load_folders(self.root)

    def describe(self) -> str:
        """Say in one line which pictures these are, and why."""
        kind = {"drawn": "drawn pictures", "path": "pictures"}.get(self.source, "photographs")
        return f"Ants and bees: {kind} in {self.root} ({self.reason})"


def find_ants_bees(
    path: str | os.PathLike[str] | None = None,
    *,
    cache: str | os.PathLike[str] | None = None,
    download: bool = True,
    draw: bool = True,
    photographs: bool = True,
    url: str = ARCHIVE_URL,
    verbose: bool = True,
) -> AntsBees:
    """Find the ants and bees, and say in one line which were taken and why.

    The order is: `path`; the folder that the environment variable `TRANSFERKIT_DATA` names;
    the cache; a download of the published archive into the cache; pictures drawn from a
    seed, kept in the cache under a name of their own.

    Args:
        path: The folder with `train/` and `val/`, or the one that holds it as
            `hymenoptera_data`. Nothing else is tried when it is given.
        cache: The folder to keep downloads in; None takes the user's cache folder.
        download: Whether to try the network.
        draw: Whether to draw pictures when no photographs are to be had.
        photographs: Whether to look for photographs; False goes straight to drawn pictures.
        url: Where the archive is.
        verbose: Print the line.

    Returns:
        The folder and where it came from.

    Raises:
        DataError: `path` or the environment variable leads nowhere, or no source is left.
        OutputError: The cache cannot be written.

    Warns:
        UserWarning: Photographs were found whose content differs from the published set.

    Example:
        >>> import tempfile
        >>> from transferkit.testing import make_image_folder
        >>> root = make_image_folder(tempfile.mkdtemp(), class_names=["ants", "bees"])
        >>> find_ants_bees(root, verbose=False).source
        'path'
    """
    kept = Path(cache) if cache is not None else Path(pooch.os_cache("transferkit"))
    if path is None and not photographs:
        found = AntsBees(_draw(kept), "drawn", "photographs are not asked for")
    else:
        found = _find(path, kept, download, draw, url)
    if verbose:
        print(found.describe(), flush=True)
    return found


def _find(
    path: str | os.PathLike[str] | None, cache: Path, download: bool, draw: bool, url: str
) -> AntsBees:
    if path is not None:
        return AntsBees(_resolve_root(Path(path), "the path given"), "path", "the path given")
    variable = os.environ.get(DATA_VARIABLE)
    if variable:
        reason = f"named by {DATA_VARIABLE}"
        return AntsBees(_checked(_resolve_root(Path(variable), reason)), "environment", reason)
    photographs = cache / FOLDER_NAME
    if photographs.is_dir():
        return AntsBees(_checked(photographs), "cache", "downloaded before")
    problem = "downloads are switched off"
    if download:
        try:
            root = _checked(_download(url, photographs))
            return AntsBees(root, "download", f"downloaded from {url}")
        except OutputError:
            raise
        except (OSError, ValueError) as error:
            problem = f"the download failed: {type(error).__name__}"
    if not draw:
        raise DataError(
            f"No photographs of ants and bees: no path was given, {DATA_VARIABLE} is not set, "
            f"`{photographs}` does not exist and {problem}. Give a path, or allow drawn "
            f"pictures with `draw=True`."
        )
    return AntsBees(_draw(cache), "drawn", f"no photographs; {problem}")


def _resolve_root(path: Path, reason: str) -> Path:
    for candidate in (path, path / FOLDER_NAME):
        if (candidate / "train").is_dir() and (candidate / "val").is_dir():
            return candidate
    raise DataError(
        f"No ants and bees in `{path}` ({reason}): neither it nor `{path / FOLDER_NAME}` has "
        f"the subfolders `train` and `val`."
    )


def content_digest(root: str | os.PathLike[str]) -> str:
    """Return a digest over the names and contents of all files in a folder.

    Args:
        root: The folder.

    Returns:
        SHA-256, in hex, over a line `relative/path NUL sha256-of-content LF` for each
        file, sorted by path.
    """
    folder = Path(root)
    digest = hashlib.sha256()
    for name in sorted(_file_names(folder)):
        content = pooch.file_hash(str(folder / name), alg="sha256")
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()


def _checked(root: Path) -> Path:
    """Warn where photographs are not the published ones: no checksum of them is published."""
    names = _file_names(root)
    counts = dict.fromkeys(FILE_COUNTS, 0)
    for name in names:
        parent = str(PurePosixPath(name).parent)
        counts[parent] = counts.get(parent, 0) + 1
    if len(names) != NUM_FILES or counts != FILE_COUNTS:
        difference = f"it has {len(names)} files ({_words(counts)}), expected {NUM_FILES}"
        difference += f" ({_words(FILE_COUNTS)})"
    elif content_digest(root) != CONTENT_DIGEST:
        difference = "the counts agree, the contents do not"
    else:
        return root
    warnings.warn(
        f"`{root}` is not the published set of ants and bees: {difference}. Results will "
        f"differ from published ones.",
        stacklevel=4,
    )
    return root


def _words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} in {name}" for name, count in sorted(counts.items()))


def _file_names(root: Path) -> list[str]:
    return [each.relative_to(root).as_posix() for each in root.rglob("*") if each.is_file()]


def _download(url: str, target: Path) -> Path:
    """Fetch the archive and unpack it to `target`, all or nothing."""

    def fill(folder: Path) -> None:
        archive = fetch(url, folder / "download", "archive.zip")
        extract_archive(archive, folder / "unpacked")
        if not (folder / "unpacked" / FOLDER_NAME).is_dir():
            raise DataError(f"The archive at {url} does not hold the folder `{FOLDER_NAME}`.")
        shutil.move(folder / "unpacked" / FOLDER_NAME, folder / "result")

    return _fill_folder(target, fill)


def _draw(cache: Path) -> Path:
    """Draw the stand-ins into the cache, once."""
    target = cache / DRAWN_NAME
    if target.is_dir():
        return target
    return _fill_folder(target, lambda folder: write_drawn_pictures(folder / "result"))


def _fill_folder(target: Path, fill: Callable[[Path], object]) -> Path:
    """Let `fill` make `result` in a temporary folder, and move that to `target`."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=target.parent, prefix=".ants-bees-")
    except OSError as error:
        raise _cannot_write(target.parent, error) from error
    with temporary as name:
        try:
            fill(Path(name))
        except (requests.RequestException, ConnectionError, TimeoutError):
            raise  # The network's; what follows is the disk's.
        except OutputError:
            raise
        except OSError as error:
            raise _cannot_write(target.parent, error) from error
        try:
            Path(name, "result").rename(target)
        except OSError:
            # Another process was faster; what it put there was filled in the same way.
            if not target.is_dir():
                raise
    return target


def _cannot_write(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"Cannot write into the cache folder `{folder}`: "
        f"{(error.strerror or str(error)).lower()}. Give another one as `cache=`, or set "
        f"XDG_CACHE_HOME."
    )


def extract_archive(archive: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Unpack the archive of the photographs after a look at each member.

    Args:
        archive: The zip file.
        target: The folder to unpack to.

    Raises:
        DataError: It is no zip file, or a member would land outside `target`, is no
            regular file, is too large, or does not belong to the set. Nothing is written.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            members = [each for each in file.infolist() if not each.is_dir()]
            for member in members:
                _check_member(member)
            if sum(member.file_size for member in members) > MAX_ARCHIVE_BYTES:
                raise DataError(
                    f"The archive unpacks to more than {MAX_ARCHIVE_BYTES:,} bytes; the "
                    f"photographs are 47 million. It is not unpacked."
                )
            # Every member is read once before anything is written, so that damage shows.
            damaged = file.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"its member `{damaged}` is damaged")
            for member in members:
                if _belongs(member.filename):
                    file.extract(member, target)
    except _ZIP_ERRORS as error:
        raise DataError(f"The archive `{archive}` is no zip file, or damaged: {error}.") from error


def _check_member(member: zipfile.ZipInfo) -> None:
    path = PurePosixPath(member.filename.replace("\\", "/"))
    problem = None
    if path.is_absolute() or ".." in path.parts or ":" in member.filename:
        problem = "its path leads outside"
    elif stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
        problem = "it is no regular file"
    elif member.file_size > MAX_MEMBER_BYTES:
        problem = f"it unpacks to {member.file_size:,} bytes"
    if problem is not None:
        raise DataError(
            f"The archive is not unpacked: of its member `{member.filename}`, {problem}."
        )


def _belongs(name: str) -> bool:
    """Tell whether a member is one of the pictures, not a leftover such as `.DS_Store`."""
    parts = PurePosixPath(name).parts
    return len(parts) == 4 and parts[0] == FOLDER_NAME and not parts[3].startswith(".")
