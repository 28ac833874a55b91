"""Reading class folders: `root/train/<class>/*` and `root/val/<class>/*`, or one to split."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from transferkit._checks import check_path
from transferkit._seeding import check_seed
from transferkit.data.dataset import ImageDataset, ImageSplits, check_class_names
from transferkit.data.paths import PathBuilder
from transferkit.data.scan import (
    DEFAULT_EXCLUDE,
    EXTENSIONS,
    Walk,
    check_exclude,
    entries,
    is_folder,
    is_hidden,
    natural_key,
)
from transferkit.data.splits import check_shares, split_dataset
from transferkit.errors import ConfigError, DataError

_LAYOUT = "`ROOT/train/CLASS/*.jpg` and `ROOT/val/CLASS/*.jpg`"


def load_folders(
    root: str | os.PathLike[str],
    *,
    train: str = "train",
    val: str | float = "val",
    test: str | float = "test",
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    allow_missing_classes: bool = False,
    seed: int = 0,
) -> ImageSplits:
    """Load a folder of class folders for each split, or split one folder of class folders.

    Class indices follow the naturally sorted names of the training split's folders
    ("2" before "10") and hold by name in the other splits. Files are found at any depth, by
    extension, and read only when they are used; hidden files are passed over, other files
    that are left out are listed in `skipped`.

    Args:
        root: The folder that holds the splits, or the class folders where `val` is a share.
        train: Name of the folder with the training pictures.
        val: Name of the folder with the validation pictures, or a share in (0, 1): the class
            folders lie in `root` itself then, and that share of each class is split off.
        test: Name of the folder with the test pictures, which may be absent; or a share
            where `val` is one.
        exclude: Glob patterns over file names that are left out.
        allow_missing_classes: Accept a validation or test split that lacks a class.
        seed: Rules which pictures are split off.

    Returns:
        The splits. Nothing is written.

    Raises:
        DataError: A folder is missing or cannot be read, there are fewer than two classes,
            a class has no pictures, or a split has a class that training lacks.
        ConfigError: An argument cannot work.

    Example:
        >>> from transferkit.testing import make_image_folder
        >>> import tempfile
        >>> root = make_image_folder(tempfile.mkdtemp(), num_train=3, num_val=2)
        >>> load_folders(root).describe()
        'train 6 (3 blue, 3 red); val 4 (2 blue, 2 red)'
        >>> load_folders(root / "train", val=0.34).describe()
        'train 4 (2 blue, 2 red); val 2 (1 blue, 1 red)'
    """
    folder = check_path("root", root)
    exclude = check_exclude(exclude)
    if not isinstance(val, str):
        shares = check_shares(val, 0.0 if test == "test" else test)
        check_seed(seed)
        dataset = load_folder(folder, exclude=exclude)
        return split_dataset(dataset, val=shares[0], test=shares[1], seed=seed)
    for name, value in (("train", train), ("val", val), ("test", test)):
        if not isinstance(value, str) or not value:
            raise ConfigError(f"`{name}` should be the name of a folder, found {value!r}.")
    _check_root(folder, f"a folder with {_LAYOUT}")
    _check_split_folders(folder, (train, val))
    class_names = _class_names(folder / train)
    _check_classes(class_names, folder / train, _LAYOUT)
    names = [train, val] + ([test] if (folder / str(test)).is_dir() else [])
    splits = [
        _load_split(folder / name, class_names, exclude, allow_missing_classes and name != train)
        for name in map(str, names)
    ]
    return ImageSplits(*splits)


def load_folder(
    root: str | os.PathLike[str], *, exclude: Sequence[str] = DEFAULT_EXCLUDE
) -> ImageDataset:
    """Load one folder of class folders, `root/<class>/*`, without splits.

    Args:
        root: The folder that holds the class folders.
        exclude: Glob patterns over file names that are left out.

    Returns:
        The pictures, classes in natural order, for `split_dataset` or `k_folds`.

    Raises:
        DataError: The folder is missing or cannot be read, there are fewer than two
            classes, or a class has no pictures.

    Example:
        >>> from transferkit.testing import make_image_folder
        >>> import tempfile
        >>> root = make_image_folder(tempfile.mkdtemp(), num_train=3)
        >>> load_folder(root / "train")
        ImageDataset(6 images, 2 classes)
    """
    folder = check_path("root", root)
    exclude = check_exclude(exclude)
    _check_root(folder, "a folder with `ROOT/CLASS/*.jpg`")
    class_names = _class_names(folder)
    if {"train", "val"} <= set(class_names):
        raise DataError(
            f"The data folder `{folder}` has the subfolders `train` and `val`, which look like "
            f"splits rather than classes. Load it with `load_folders(ROOT)`, without a share."
        )
    _check_classes(class_names, folder, "`ROOT/CLASS/*.jpg`")
    return _load_split(folder, class_names, exclude, allow_missing=False)


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
    _check_root(folder, "a folder with pictures", what="folder")
    walk = Walk(DEFAULT_EXCLUDE)
    walk.enter(str(folder))
    found = [Path(parent, name) for parent, names in walk.pictures(str(folder)) for name in names]
    if not found:
        raise DataError(
            f"The folder `{folder}` holds no pictures. Expected files that end in "
            f"{', '.join(sorted(EXTENSIONS))}."
        )
    return sorted(found)


def _check_root(folder: Path, expected: str, *, what: str = "data folder") -> None:
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"The {what} `{folder}` {problem}. Expected {expected}.")


def _check_split_folders(root: Path, names: Sequence[str]) -> None:
    for name in names:
        if not (root / name).is_dir():
            found = _class_names(root)
            is_unsplit = name == names[0] and len(found) > 1
            hint = " To split class folders, pass `val=0.2`." if is_unsplit else ""
            raise DataError(
                f"The data folder `{root}` has no subfolder `{name}`; it has "
                f"{found or 'no subfolders'}. Expected {_LAYOUT}.{hint}"
            )


def _check_classes(class_names: Sequence[str], folder: Path, layout: str) -> None:
    if len(class_names) < 2:
        found = f"only `{class_names[0]}`" if class_names else "none"
        raise DataError(
            f"Classification needs at least two classes, found {found} in `{folder}`. "
            f"Expected a subfolder with pictures for each class: {layout}."
        )
    check_class_names(class_names)


def _load_split(
    folder: Path, class_names: Sequence[str], exclude: Sequence[str], allow_missing: bool
) -> ImageDataset:
    present = _class_names(folder)
    _check_extra(folder, present, class_names)
    missing = [name for name in class_names if name not in present]
    if missing and not allow_missing:
        raise DataError(
            f"`{folder}` lacks the classes {missing} of the training split. Add them, or pass "
            f"`allow_missing_classes=True`; the indices of the others stay the same."
        )
    walk = Walk(exclude)
    walk.enter(str(folder))  # A link back to it would mix the classes.
    builder, counts = PathBuilder(), []
    for name in class_names:
        counts.append(0 if name in missing else _add_class(folder / name, walk, builder))
    targets = np.repeat(np.arange(len(class_names)), counts)
    return ImageDataset(builder.build(), targets, class_names=class_names, skipped=walk.skipped)


def _add_class(folder: Path, walk: Walk, builder: PathBuilder) -> int:
    """Add the pictures of a class and return their number."""
    if not walk.enter(str(folder)):
        raise DataError(
            f"The class folder `{folder}` is a link to a folder that is read as another class "
            f"or split already. Remove it."
        )
    count = 0
    for parent, names in walk.pictures(str(folder)):
        builder.add(parent, names)
        count += len(names)
    if not count:
        raise DataError(
            f"The class folder `{folder}` has no pictures. Expected files that end "
            f"in {', '.join(sorted(EXTENSIONS))}."
        )
    return count


def _check_extra(folder: Path, present: Sequence[str], class_names: Sequence[str]) -> None:
    extra = [name for name in present if name not in class_names]
    if not extra:
        return
    alike = {_fold(name): name for name in class_names}
    hints = [
        f" {name!r} differs from {alike[_fold(name)]!r} in nothing but case or Unicode form."
        for name in extra
        if _fold(name) in alike
    ]
    raise DataError(
        f"`{folder}` has the classes {extra}, which the training split lacks: it has "
        f"{list(class_names)}. Add them there, or remove them here.{''.join(hints)}"
    )


def _fold(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _class_names(folder: Path) -> list[str]:
    names = [entry.name for entry in entries(str(folder)) if is_folder(entry)]
    return sorted((name for name in names if not is_hidden(name)), key=natural_key)
