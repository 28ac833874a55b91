"""Labelled pictures from a table: a CSV file, a data frame, or rows in memory."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from transferkit._checks import check_path
from transferkit.data.dataset import ImageDataset, ImageSplits
from transferkit.data.paths import PathArray
from transferkit.data.scan import natural_key
from transferkit.data.splits import split_dataset
from transferkit.errors import DataError

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_MAX_LISTED = 3


class _Row(NamedTuple):
    number: int
    path: str
    label: str
    split: str | None


def load_table(
    table: str | os.PathLike[str] | Iterable[Any],
    *,
    root: str | os.PathLike[str] | None = None,
    path: str = "path",
    label: str = "label",
    split: str = "split",
    val: float | None = None,
    test: float = 0.0,
    allow_missing_classes: bool = False,
    seed: int = 0,
) -> ImageSplits:
    """Load labelled pictures from a table.

    Classes are the labels of the training split, naturally sorted ("2" before "10"), and
    hold by name in the other splits.

    Args:
        table: A CSV file with a header (tabs between the values where it ends in `.tsv`), a
            data frame or another mapping of columns, a list of dicts, or a list of tuples
            `(path, label)` or `(path, label, split)`.
        root: The folder that relative paths start from; None takes that of the CSV file,
            else the current one.
        path: The column with the paths.
        label: The column with the labels, texts or integers.
        split: The column with "train", "val" ("valid", "validation") or "test".
        val: The share to split off, in (0, 1), where there is no column `split`.
        test: Likewise, in [0, 1).
        allow_missing_classes: Accept a validation or test split that lacks a class.
        seed: Rules which pictures are split off.

    Returns:
        The splits.

    Raises:
        DataError: The table cannot be read, lacks a column or a split, a label or path is
            missing, a file is not there or there twice, or a split has a class that
            training lacks.
        ConfigError: A share is out of range.

    Example:
        >>> from transferkit.testing import make_image_folder
        >>> import tempfile
        >>> root = make_image_folder(tempfile.mkdtemp(), num_train=2)
        >>> files = sorted((root / "train").rglob("*.png"))
        >>> rows = [(file, file.parent.name) for file in files]
        >>> load_table(rows, val=0.5).describe()
        'train 2 (1 blue, 1 red); val 2 (1 blue, 1 red)'
    """
    columns = (path, label, split)
    base = Path() if root is None else check_path("root", root)
    if isinstance(table, (str, os.PathLike)):
        file = check_path("table", table)
        base = file.parent if root is None else base
        rows = _read_rows(_read_csv(file), columns)
    else:
        rows = _read_rows(enumerate(_to_records(table, columns), start=1), columns)
    if not rows:
        raise DataError("The table has no rows.")
    rows = [row._replace(path=str(base / row.path)) for row in rows]
    _check_files(rows)
    has_split = [row.split is not None for row in rows]
    if not any(has_split):
        return _split_rows(rows, val, test, seed, split)
    if val is not None or test:
        raise DataError(
            f"The table has splits of its own, in the column `{split}`, so that `val` and `test` "
            f"would be ignored. Leave them out."
        )
    return _load_splits(rows, allow_missing_classes)


def _read_csv(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the rows with their numbers, the header and empty rows counted."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            rows = [(number, row) for number, row in enumerate(reader, start=1) if row]
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise DataError(f"Cannot read the table `{file}`: {reason}.") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the table `{file}`: it is no CSV file ({error}).") from error
    return _to_numbered_records(file, rows)


def _to_numbered_records(
    file: Path, rows: Sequence[tuple[int, list[str]]]
) -> list[tuple[int, dict[str, Any]]]:
    """Refuse what would shift values without a word: a column twice, a row that is too long."""
    if not rows:
        return []
    names = rows[0][1]
    _check_columns(f"The table `{file}`", names)
    for number, row in rows:
        if len(row) > len(names):
            raise DataError(
                f"Row {number} of the table `{file}` has more values than the header has columns "
                f"({len(names)}). Put a value with a comma into quotes."
            )
    return [(number, dict(zip_longest(names, row))) for number, row in rows[1:]]


def _check_columns(table: str, names: Sequence[str]) -> None:
    # Columns without a name, as spreadsheets leave behind, cannot be asked for.
    twice = sorted(name for name, number in Counter(names).items() if number > 1 and name)
    if twice:
        raise DataError(f"{table} has the columns {twice} more than once. Rename them.")


def _to_records(table: Any, columns: tuple[str, str, str]) -> list[dict[str, Any]]:
    """Return rows as dicts; what has columns is turned on its side."""
    if isinstance(table, Mapping) or hasattr(table, "columns"):
        return _from_columns(table, list(table if isinstance(table, Mapping) else table.columns))
    try:
        rows = list(table)
    except TypeError as error:
        raise DataError(
            f"A table should be a CSV file, a data frame or a list of rows, found "
            f"{type(table).__name__}."
        ) from error
    records = []
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Mapping):
            records.append(dict(row))
        elif isinstance(row, (tuple, list)) and len(row) in (2, 3):
            records.append(dict(zip(columns, row, strict=False)))
        else:
            raise DataError(
                f"Row {number} of the table should be (path, label), (path, label, split) or a "
                f"dict, found {row!r:.80}."
            )
    return records


def _from_columns(table: Any, keys: Sequence[Any]) -> list[dict[str, Any]]:
    names = [str(key) for key in keys]  # A data frame's may be numbers.
    _check_columns("The table", names)
    columns = []
    for key in keys:
        column = table[key]
        if isinstance(column, (str, bytes)) or not hasattr(column, "__iter__"):
            raise DataError(
                f"The column `{key}` of the table should be a list of values, found {column!r:.80}."
            )
        columns.append(list(column))
    if len({len(column) for column in columns}) > 1:
        raise DataError("The columns of the table should have the same length.")
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _read_rows(
    records: Iterable[tuple[int, Mapping[str, Any]]], columns: tuple[str, str, str]
) -> list[_Row]:
    path, label, split = columns
    rows = []
    for number, record in records:
        for column in (path, label):
            if column not in record:
                raise DataError(
                    f"Row {number} of the table has no column `{column}`; it has {list(record)}."
                )
        rows.append(
            _Row(
                number,
                _check_path_value(record[path], number, path),
                _check_label(record[label], number, label),
                _check_split(record.get(split), number, split),
            )
        )
    return rows


def _check_path_value(value: Any, number: int, column: str) -> str:
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(path, str) or not path:
        raise DataError(f"Row {number} of the table should have a `{column}`, found {value!r}.")
    try:
        usable = "\0" not in path and bool(os.fsencode(path))
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise DataError(
            f"Row {number} of the table should have a usable path as `{column}`, found {path!r}."
        )
    return path


def _check_label(value: Any, number: int, column: str) -> str:
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))
    if is_integer or (isinstance(value, str) and value):
        return str(value)
    raise DataError(
        f"Row {number} of the table should have a text or an integer as `{column}`, found "
        f"{value!r}."
    )


def _check_split(value: Any, number: int, column: str) -> str | None:
    if _is_missing(value):
        return None
    if isinstance(value, str) and value.strip().lower() in SPLIT_NAMES:
        return SPLIT_NAMES[value.strip().lower()]
    raise DataError(
        f"Row {number} of the table should have train, val or test as `{column}`, found {value!r}."
    )


def _is_missing(value: Any) -> bool:
    if value is None or isinstance(value, str):
        return not value
    try:
        return bool(value != value)  # Not-a-number, of Python, NumPy or pandas.
    except TypeError:  # pandas' NA, which is neither the same as itself nor another.
        return True
    except ValueError:  # An array.
        return False


def _check_files(rows: Sequence[_Row]) -> None:
    """Refuse files that are not there, and files that are there twice."""
    seen: dict[str, _Row] = {}
    for row in rows:
        key = os.path.realpath(row.path)
        other = seen.setdefault(key, row)
        if other is not row:
            raise DataError(_describe_twice(other, row))
    missing = [row for row in rows if not os.path.isfile(row.path)]  # noqa: PTH113  Path raises
    if missing:
        listed = ", ".join(f"`{row.path}` (row {row.number})" for row in missing[:_MAX_LISTED])
        more = f" and {len(missing) - _MAX_LISTED} more" if len(missing) > _MAX_LISTED else ""
        raise DataError(
            f"{len(missing)} of {len(rows)} files of the table are not there: {listed}{more}. "
            f"Relative paths start from `root`."
        )


def _describe_twice(one: _Row, other: _Row) -> str:
    where = f"`{other.path}` is in rows {one.number} and {other.number} of the table"
    if one.label != other.label:
        return f"{where}, with the labels {one.label!r} and {other.label!r}. Keep the right one."
    if one.split != other.split:
        return (
            f"{where}, in the splits {one.split} and {other.split}: a picture that was trained "
            f"on tells nothing in validation. Keep one."
        )
    return f"{where}. Keep one."


def _split_rows(
    rows: Sequence[_Row], val: float | None, test: float, seed: int, column: str
) -> ImageSplits:
    if val is None:
        raise DataError(
            f"The table has no column `{column}` that says train or val. Add one, or pass "
            f"`val=0.2` to split at random."
        )
    class_names = sorted({row.label for row in rows}, key=natural_key)
    _check_num_classes(class_names)
    return split_dataset(_to_dataset(rows, class_names), val=val, test=test, seed=seed)


def _load_splits(rows: Sequence[_Row], allow_missing_classes: bool) -> ImageSplits:
    bare = next((row for row in rows if row.split is None), None)
    if bare is not None:
        raise DataError(f"Row {bare.number} of the table is in no split, while others are in one.")
    by_split = {
        name: [row for row in rows if row.split == name] for name in ("train", "val", "test")
    }
    for name in ("train", "val"):
        if not by_split[name]:
            raise DataError(f"The table has no row in the split {name}.")
    class_names = sorted({row.label for row in by_split["train"]}, key=natural_key)
    _check_num_classes(class_names)
    for name in ("val", "test"):
        labels = {row.label for row in by_split[name]}
        extra = sorted(labels - set(class_names), key=natural_key)
        if extra:
            raise DataError(
                f"The split {name} of the table has the classes {extra}, which the training "
                f"split lacks: it has {class_names}."
            )
        missing = [each for each in class_names if each not in labels]
        if missing and by_split[name] and not allow_missing_classes:
            raise DataError(
                f"The split {name} of the table lacks the classes {missing} of the training "
                f"split. Add them, or pass `allow_missing_classes=True`."
            )
    train, held_out, last = (_to_dataset(part, class_names) for part in by_split.values())
    return ImageSplits(train, held_out, last if len(last) else None)


def _check_num_classes(class_names: Sequence[str]) -> None:
    if len(class_names) < 2:
        raise DataError(
            f"Classification needs at least two classes, found only {class_names[0]!r} in the "
            f"table."
        )


def _to_dataset(rows: Sequence[_Row], class_names: Sequence[str]) -> ImageDataset:
    index_of = {name: index for index, name in enumerate(class_names)}
    targets = np.array([index_of[row.label] for row in rows], dtype=np.int64)
    paths = PathArray.from_paths(row.path for row in rows)
    return ImageDataset(paths, targets, class_names=class_names)
