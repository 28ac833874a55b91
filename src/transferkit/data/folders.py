"""Reading class folders: `root/train/<class>/*` and `root/val/<class>/*`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

from transferkit._checks import check_path
from transferkit.data.dataset import ImageDataset, ImageSplits, SkippedFile
from transferkit.errors import ConfigError, DataError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
"""File name endings that make a file a candidate, in lower case; upper case counts too."""

DEFAULT_EXCLUDE = ("imageNotFound.gif",)
"""Left out unless the caller says otherwise: a photo host's "not found" placeholder, which
the published ants-and-bees archive has among its ants."""

_LAYOUT = "`ROOT/train/CLASS/*.jpg` and `ROOT/val/CLASS/*.jpg`"


def load_folders(
    root: str | os.PathLike[str],
    *,
    train: str = "train",
    val: str = "val",
    test: str = "test",
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    allow_missing_classes: bool = False,
) -> ImageSplits:
    """Load a folder of class folders for each split.

    Class indices follow the naturally sorted names of the training split's folders
    ("2" before "10") and hold by name in the other splits. Files are found by extension
    and read only when they are used; hidden files are passed over, other files that are
    left out are listed in `skipped`.

    Args:
        root: The folder that holds the splits.
        train: Name of the folder with the training pictures.
        val: Name of the folder with the validation pictures.
        test: Name of the folder with the test pictures; it may be absent.
        exclude: Glob patterns over file names that are left out.
        allow_missing_classes: Accept a validation or test split that lacks a class.

    Returns:
        The splits. Nothing random happens, and nothing is written.

    Raises:
        DataError: A folder is missing or cannot be read, there are fewer than two classes,
            a class has no pictures, or a split has a class that training lacks.

    Example:
        >>> from transferkit.testing import make_image_folder
        >>> import tempfile
        >>> root = make_image_folder(tempfile.mkdtemp(), num_train=3, num_val=2)
        >>> load_folders(root).describe()
        'train 6 (3 blue, 3 red); val 4 (2 blue, 2 red)'
    """
    folder = check_path("root", root)
    if isinstance(exclude, str):
        raise ConfigError(f"`exclude` should be a list of glob patterns, found {exclude!r}.")
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"The data folder `{folder}` {what}. Expected a folder with {_LAYOUT}.")
    _check_split_folders(folder, (train, val))
    class_names = _class_names(folder / train)
    if len(class_names) < 2:
        found = f"only `{class_names[0]}`" if class_names else "none"
        raise DataError(
            f"Classification needs at least two classes, found {found} in `{folder / train}`. "
            f"Expected a subfolder with pictures for each class: {_LAYOUT}."
        )
    names = [train, val] + ([test] if (folder / test).is_dir() else [])
    splits = [
        _load_split(folder / name, class_names, exclude, allow_missing_classes and name != train)
        for name in names
    ]
    return ImageSplits(*splits)


def find_images(root: str | os.PathLike[str]) -> list[Path]:
    """Find the pictures in a folder at any depth, by extension, sorted by path.

    Args:
        root: The folder. Hidden files and folders in it are passed over.

    Returns:
        The paths, which start with `root`.

    Raises:
        DataError: The folder is missing, cannot be read or holds no pictures.
    """
    folder = check_path("root", root)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"The folder `{folder}` {what}. Expected a folder with pictures.")
    found: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=_stop):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        found += [
            Path(parent, name)
            for name in files
            if _reason_to_skip(Path(parent, name), DEFAULT_EXCLUDE) is None
        ]
    if not found:
        raise DataError(
            f"The folder `{folder}` holds no pictures. Expected files that end in "
            f"{', '.join(sorted(EXTENSIONS))}."
        )
    return sorted(found)


def _check_split_folders(root: Path, names: Sequence[str]) -> None:
    for name in names:
        if not (root / name).is_dir():
            found = sorted(child.name for child in _entries(root) if child.is_dir())
            raise DataError(
                f"The data folder `{root}` has no subfolder `{name}`; it has "
                f"{found or 'no subfolders'}. Expected {_LAYOUT}."
            )


def _load_split(
    folder: Path, class_names: Sequence[str], exclude: Sequence[str], allow_missing: bool
) -> ImageDataset:
    present = _class_names(folder)
    extra = [name for name in present if name not in class_names]
    if extra:
        raise DataError(
            f"`{folder}` has the classes {extra}, which the training split lacks: it has "
            f"{list(class_names)}. Add them there, or remove them here."
        )
    missing = [name for name in class_names if name not in present]
    if missing and not allow_missing:
        raise DataError(
            f"`{folder}` lacks the classes {missing} of the training split. Add them, or pass "
            f"`allow_missing_classes=True`; the indices of the others stay the same."
        )
    paths: list[Path] = []
    targets: list[int] = []
    skipped: list[SkippedFile] = []
    for target, name in enumerate(class_names):
        if name in missing:
            continue
        files = _list_pictures(folder / name, exclude, skipped)
        if not files:
            raise DataError(
                f"The class folder `{folder / name}` has no pictures. Expected files that end "
                f"in {', '.join(sorted(EXTENSIONS))}."
            )
        paths += files
        targets += [target] * len(files)
    return ImageDataset(paths, targets, class_names=class_names, skipped=skipped)


def _class_names(folder: Path) -> list[str]:
    names = [child.name for child in _entries(folder) if child.is_dir()]
    return sorted((name for name in names if not _is_hidden(name)), key=natural_key)


def _list_pictures(folder: Path, exclude: Sequence[str], skipped: list[SkippedFile]) -> list[Path]:
    pictures = []
    for path in sorted(_entries(folder), key=lambda path: path.name):
        reason = _reason_to_skip(path, exclude)
        if reason is None:
            pictures.append(path)
        elif not _is_hidden(path.name):
            skipped.append(SkippedFile(path, reason))
    return pictures


def _reason_to_skip(path: Path, exclude: Sequence[str]) -> str | None:
    if _is_hidden(path.name):
        return "hidden"
    for pattern in exclude:
        if fnmatchcase(path.name, pattern):
            return f"excluded by `{pattern}`"
    if path.suffix.lower() not in EXTENSIONS:
        return f"no picture by its extension `{path.suffix}`"
    return None if path.is_file() else "no regular file"


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise _unreadable(folder, error) from error


def _stop(error: OSError) -> NoReturn:
    """Raise what `os.walk` would pass over."""
    raise _unreadable(error.filename, error) from error


def _unreadable(folder: object, error: OSError) -> DataError:
    reason = (error.strerror or str(error)).lower()
    return DataError(f"Cannot read the folder `{folder}`: {reason}.")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "__pycache__")


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return a sort key that orders runs of digits by their value.

    Example:
        >>> sorted(["10", "9", "a2", "a10"], key=natural_key)
        ['9', '10', 'a2', 'a10']
    """
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    key = [
        (0, int(part), "") if part.isascii() and part.isdigit() else (1, 0, part) for part in parts
    ]
    return key, name
