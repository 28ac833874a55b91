"""Reading class folders: `root/train/<class>/*` and `root/val/<class>/*`, or one to split."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Collection, Sequence
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
    is_folder_there,
    is_hidden,
    natural_key,
    subfolder_names,
)
from transferkit.data.splits import check_shares, split_dataset
from transferkit.errors import ConfigError, DataError

_LAYOUT = "`ROOT/train/CLASS/*.jpg` and `ROOT/val/CLASS/*.jpg`"
_NAMES_OF_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


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
    that are left out are listed in `skipped`. Each folder is read once, whatever the links.

    Args:
        root: The folder that holds the splits, or the class folders where `val` is a share.
        train: Name of the folder with the training pictures; left out where `val` is a share.
        val: Name of the folder with the validation pictures, or a share in (0, 1): the class
            folders lie in `root` itself then, and that share of each class is split off.
        test: Name of the folder with the test pictures; "test", the default, may be absent.
            Or a share where `val` is one.
        exclude: Glob patterns over file names that are left out.
        allow_missing_classes: Accept a validation or test split that lacks a class.
        seed: Rules which pictures are split off.

    Returns:
        The splits. Nothing is written.

    Raises:
        DataError: A folder is missing or cannot be read, there are fewer than two classes,
            a class has no pictures, a split has a class that training lacks, or two class
            folders are one by a link.
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
        if train != "train":
            raise ConfigError(
                f"`train` should be left out where `val` is a share, since the class folders lie "
                f"in `root` itself then, found {train!r}."
            )
        dataset = load_folder(folder, exclude=exclude)
        return split_dataset(dataset, val=shares[0], test=shares[1], seed=seed)
    named: dict[str, object] = {"train": train, "val": val, "test": test}
    if test == "test" and test in (train, val):
        del named["test"]  # The default: nobody asked for a second use of that folder.
    names = _check_names(named)
    _check_root(folder, f"a folder with {_LAYOUT}")
    if test == "test" and "test" in named and not is_folder_there(folder / test):
        names.remove(test)
    _check_split_folders(folder, names)
    class_names = subfolder_names(folder / train)
    _check_classes(class_names, folder / train, _LAYOUT)
    places = [folder / name for name in names]
    return ImageSplits(*_load(folder, places, class_names, exclude, allow_missing_classes))


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
    class_names = subfolder_names(folder)
    _check_no_splits(folder, class_names)
    _check_classes(class_names, folder, "`ROOT/CLASS/*.jpg`")
    return _load(folder, [folder], class_names, exclude, allow_missing=False)[0]


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
    walk.enter_above(str(folder))
    found = [Path(parent, name) for parent, names in walk.pictures(str(folder)) for name in names]
    if not found:
        raise DataError(
            f"The folder `{folder}` holds no pictures. Expected files that end in "
            f"{', '.join(sorted(EXTENSIONS))}."
        )
    return sorted(found)


def _check_root(folder: Path, expected: str, *, what: str = "data folder") -> None:
    if not is_folder_there(folder):
        problem = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"The {what} `{folder}` {problem}. Expected {expected}.")


def _check_names(names: dict[str, object]) -> list[str]:
    """Return the names of the splits' folders."""
    first: dict[str, str] = {}
    for name, value in names.items():
        if not isinstance(value, str) or not value:
            raise ConfigError(f"`{name}` should be the name of a folder, found {value!r}.")
        other = first.setdefault(value, name)
        if other != name:
            raise ConfigError(
                f"`{other}` and `{name}` should be different folders, found {value!r} for both."
            )
    return list(first)


def _check_no_splits(folder: Path, class_names: Sequence[str]) -> None:
    alike = [name for name in class_names if name.lower() in _NAMES_OF_SPLITS]
    if len(alike) < 2 or not any(name.lower().startswith("train") for name in alike):
        return
    listed = ", ".join(f"`{name}`" for name in alike[:-1]) + f" and `{alike[-1]}`"
    call = "ROOT" if {"train", "val"} <= set(alike) else "ROOT, train=..., val=..."
    raise DataError(
        f"The data folder `{folder}` has the subfolders {listed}, which look like "
        f"splits rather than classes. Load it with `load_folders({call})`, without a share."
    )


def _check_split_folders(root: Path, names: Sequence[str]) -> None:
    for name in names:
        if not is_folder_there(root / name):
            found = subfolder_names(root)
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


def _load(
    root: Path,
    places: Sequence[Path],
    class_names: Sequence[str],
    exclude: Sequence[str],
    allow_missing: bool,
) -> list[ImageDataset]:
    """Read the splits, of which the first is the training split, each at its place."""
    present = {place: set(subfolder_names(place)) for place in places}
    for place in places:
        _check_extra(place, present[place], class_names)
        _check_missing(place, present[place], class_names, allow_missing)
    walk = Walk(exclude)
    walk.enter_above(str(root))
    for place in places:
        walk.enter(str(place))
    # All class folders before any other, or a link might give one's pictures to another.
    for place in places:
        for name in class_names:
            if name in present[place]:
                _enter_class(place / name, walk)
    return [_load_split(place, class_names, present[place], walk) for place in places]


def _enter_class(folder: Path, walk: Walk) -> None:
    other = walk.first_name(str(folder))
    if other is not None:
        raise DataError(
            f"The class folder `{folder}` is the same folder as `{other}`, by a link. Each is "
            f"read once, for one class of one split: remove the link."
        )


def _load_split(
    place: Path, class_names: Sequence[str], present: Collection[str], walk: Walk
) -> ImageDataset:
    walk.skipped = []
    for name in sorted(
        each.name
        for each in entries(str(place))
        if not is_hidden(each.name) and not is_folder(each)
    ):
        walk.skip(str(place), name, "in no class folder")
    builder, counts = PathBuilder(), []
    for name in class_names:
        counts.append(_add_class(place / name, walk, builder) if name in present else 0)
    targets = np.repeat(np.arange(len(class_names)), counts)
    return ImageDataset(builder.build(), targets, class_names=class_names, skipped=walk.skipped)


def _add_class(folder: Path, walk: Walk, builder: PathBuilder) -> int:
    """Add the pictures of a class, whose folder is entered, and return their number."""
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


def _check_missing(
    place: Path, present: Collection[str], class_names: Sequence[str], allow_missing: bool
) -> None:
    missing = [name for name in class_names if name not in present]
    if missing and not allow_missing:
        raise DataError(
            f"`{place}` lacks the classes {missing} of the training split. Add them, or pass "
            f"`allow_missing_classes=True`; the indices of the others stay the same."
        )


def _check_extra(folder: Path, present: Collection[str], class_names: Sequence[str]) -> None:
    extra = sorted(set(present).difference(class_names), key=natural_key)
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
