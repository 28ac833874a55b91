from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transferkit.data import load_table
from transferkit.errors import ConfigError, DataError

Row = tuple[Any, ...]


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight pictures in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in "abcdefgh":
        Image.new("RGB", (4, 3)).save(f"{name}.png")


ROWS: list[Row] = [
    ("a.png", "10", "train"),
    ("b.png", "9", "train"),
    ("c.png", "10", "train"),
    ("d.png", "9", "val"),
    ("e.png", "10", "val"),
]


def write(
    path: str, rows: list[Row], header: Row = ("path", "label", "split"), **options: Any
) -> Path:
    with Path(path).open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        csv.writer(file, **options).writerows([header, *rows])
    return Path(path)


def fails(table: Any, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        load_table(table, **options)
    return str(error.value)


# What is read


class Frame:
    """What of a data frame is used."""

    def __init__(self, rows: list[Row]) -> None:
        self.columns = ["path", "label", "split"]
        self._rows = rows

    def __getitem__(self, name: str) -> list[Any]:
        return [row[self.columns.index(name)] for row in self._rows]


def to_mapping(rows: list[Row]) -> dict[str, list[Any]]:
    frame = Frame(rows)
    return {name: frame[name] for name in frame.columns}


SOURCES: dict[str, Any] = {
    "CSV": lambda rows: write("t.csv", rows),
    "text of a path": lambda rows: str(write("t.csv", rows)),
    "mark at the beginning": lambda rows: write("t.csv", rows, encoding="utf-8-sig"),
    "line ends of Windows": lambda rows: write("t.csv", rows, lineterminator="\r\n"),
    "everything quoted": lambda rows: write("t.csv", rows, quoting=csv.QUOTE_ALL),
    "TSV": lambda rows: write("t.tsv", rows, delimiter="\t"),
    "frame": Frame,
    "mapping": to_mapping,
    "tuples": lambda rows: rows,
    "lists": lambda rows: [list(row) for row in rows],
    "dicts": lambda rows: [dict(zip(("path", "label", "split"), row, strict=True)) for row in rows],
    "generator": lambda rows: (row for row in rows),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same(source: str, tmp_path: Path) -> None:
    data = load_table(SOURCES[source](ROWS))
    assert data.class_names == ("9", "10")
    assert [path.resolve() for path in data.train.paths] == [
        tmp_path / f"{name}.png" for name in "abc"
    ]
    assert data.train.targets.tolist() == [1, 0, 1]
    assert data.val.targets.tolist() == [0, 1]
    assert data.test is None
    assert data.val[0][0].shape == (3, 3, 4)


def test_integers_are_labels_in_their_order() -> None:
    labels = [10, np.int64(9), -1]
    rows = [(f"{name}.png", labels[place % 3]) for place, name in enumerate("abcdef")]
    data = load_table(rows, val=0.5)
    assert set(data.class_names) == {"-1", "9", "10"}
    assert data.class_names.index("9") < data.class_names.index("10")


def test_names_of_splits_and_columns() -> None:
    splits = ("Train", "train", "valid", "validation", "test", " test ")
    rows: list[Row] = [
        (f"{name}.png", label, split)
        for name, label, split in zip("abcdef", "xyxyxy", splits, strict=True)
    ]
    table = write("t.csv", rows, header=("file", "kind", "part"))
    data = load_table(table, path="file", label="kind", split="part")
    assert [len(split) for split in data.named().values()] == [2, 2, 2]


def test_relative_paths_start_from_the_table_or_the_root(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    table = write("tables/t.csv", [(f"../{row[0]}", *row[1:]) for row in ROWS])
    os.chdir(tmp_path / "tables")
    assert load_table(tmp_path / "tables" / "t.csv").train[0][1] == 1
    assert load_table(ROWS, root=tmp_path).train[0][1] == 1
    assert load_table(ROWS, root=tmp_path).train.paths[0] == tmp_path / "a.png"
    absolute = [(str(tmp_path / row[0]), *row[1:]) for row in ROWS]
    assert load_table(absolute, root="/nowhere").train.paths[0] == tmp_path / "a.png"
    assert "of 5 files of the table are not there" in fails(tmp_path / table, root="/nowhere")


class Missing:
    """As pandas' NA, which compares to nothing."""

    def __ne__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")


@pytest.mark.parametrize("split", [None, "", float("nan"), np.float32("nan"), Missing()])
def test_without_splits_a_share_is_split_off(split: Any) -> None:
    rows = [(f"{name}.png", "xy"[place % 2], split) for place, name in enumerate("abcdefgh")]
    data = load_table(rows, val=0.25, test=0.25, seed=3)
    assert data.describe() == "train 4 (2 x, 2 y); val 2 (1 x, 1 y); test 2 (1 x, 1 y)"
    again = load_table(rows, val=0.25, test=0.25, seed=3)
    assert again.val.paths == data.val.paths


def test_missing_class_may_be_allowed() -> None:
    rows = [row for row in ROWS if row[0] != "e.png"]
    data = load_table(rows, allow_missing_classes=True)
    assert data.val.class_counts == {"9": 1, "10": 0}


def test_names_of_any_kind() -> None:
    labels = ["two words", "line\nbreak", "🐜", '"quoted"', "a,b"]
    rows = [(f"{name}.png", label, "train") for name, label in zip("abcde", labels, strict=True)]
    rows += [("f.png", "🐜", "val")]
    data = load_table(write("t.csv", rows), allow_missing_classes=True)
    assert set(data.class_names) == set(labels)


# What is refused


class BytesPath:
    """As `os.scandir` gives them for a folder in bytes."""

    def __fspath__(self) -> bytes:
        return b"a.png"


def test_table_that_is_not_there() -> None:
    assert fails("no.csv") == "Cannot read the table `no.csv`: no such file or directory."


def test_table_that_is_no_text() -> None:
    Path("t.csv").write_bytes(b"path,label\n\xff\xfe,x\n")
    cause = "'utf-8' codec can't decode byte 0xff in position 11: invalid start byte"
    assert fails("t.csv") == f"Cannot read the table `t.csv`: it is no CSV file ({cause})."


def test_table_that_is_no_csv() -> None:
    Path("t.csv").write_text('path,label\n"a.png"b,x\n')
    assert fails("t.csv") == (
        "Cannot read the table `t.csv`: it is no CSV file (',' expected after '\"')."
    )


@pytest.mark.parametrize("table", [[], {}, Frame([])])
def test_empty_table(table: Any) -> None:
    assert fails(table) == "The table has no rows."
    write("t.csv", [])
    assert fails("t.csv") == "The table has no rows."


def test_no_table_at_all() -> None:
    assert fails(3) == ("A table should be a CSV file, a data frame or a list of rows, found int.")


def test_columns_of_other_lengths() -> None:
    assert fails({"path": ["a.png"], "label": ["x", "y"]}) == (
        "The columns of the table should have the same length."
    )


@pytest.mark.parametrize("value", [3, "a.png", b"a.png", None])
def test_column_that_is_no_list(value: Any) -> None:
    assert fails({"path": value, "label": ["x"]}) == (
        f"The column `path` of the table should be a list of values, found {value!r}."
    )


def test_names_of_columns_that_are_no_texts() -> None:
    table = {0: ["a.png", "b.png", "c.png", "d.png"], 1: ["x", "y", "x", "y"], None: [1, 2, 3, 4]}
    assert load_table(table, path="0", label="1", val=0.5).class_names == ("x", "y")
    assert fails({0: ["a.png"], "0": ["b.png"]}) == (
        "The table has the columns ['0'] more than once. Rename them."
    )


def test_empty_rows_and_columns_of_a_spreadsheet() -> None:
    Path("t.csv").write_text("path,label,,\n\na.png,x,,\nb.png,y\n\nc.png,x,,\nd.png,y,,\n")
    assert load_table("t.csv", val=0.5).class_names == ("x", "y")
    Path("t.csv").write_text('path,label\n\na.png,"x\ny"\n\nb.png,\n')
    assert fails("t.csv") == (
        "Row 5 of the table should have a text or an integer as `label`, found ''."
    )
    Path("t.csv").write_text("path,label\na.png,x\nb.png\n")
    assert fails("t.csv") == (
        "Row 3 of the table should have a text or an integer as `label`, found None."
    )


@pytest.mark.parametrize("row", [("a.png",), "a.png", 3, ("a", "b", "c", "d")])
def test_row_of_another_kind(row: Any) -> None:
    assert fails([ROWS[0], row]) == (
        f"Row 2 of the table should be (path, label), (path, label, split) or a dict, "
        f"found {row!r}."
    )


def test_missing_column_names_those_there_are() -> None:
    table = write("t.csv", ROWS, header=("file", "label", "split"))
    assert fails(table) == (
        "Row 2 of the table has no column `path`; it has ['file', 'label', 'split']."
    )
    assert fails(table, path="file", label="kind") == (
        "Row 2 of the table has no column `kind`; it has ['file', 'label', 'split']."
    )


@pytest.mark.parametrize("value", [None, "", 3, float("nan"), b"a.png", BytesPath()])
def test_row_without_a_path(value: Any) -> None:
    assert fails([ROWS[0], (value, "9", "train")]) == (
        f"Row 2 of the table should have a `path`, found {value!r}."
    )


@pytest.mark.parametrize("value", [None, "", True, 1.5, float("nan"), np.bool_(True)])
def test_label_of_another_kind(value: Any) -> None:
    assert fails([ROWS[0], ("b.png", value, "train")]) == (
        f"Row 2 of the table should have a text or an integer as `label`, found {value!r}."
    )


@pytest.mark.parametrize("value", ["training", 3])
def test_unknown_split(value: Any) -> None:
    assert fails([ROWS[0], ("b.png", "9", value)]) == (
        f"Row 2 of the table should have train, val or test as `split`, found {value!r}."
    )


def test_files_that_are_not_there() -> None:
    rows = [*ROWS, *((f"no{number}.png", "9", "val") for number in range(5))]
    places = ", ".join(f"`no{number}.png` (row {6 + number})" for number in range(3))
    assert fails(rows) == (
        f"5 of 10 files of the table are not there: {places} and 2 more. Relative paths start "
        f"from `root`."
    )


def test_file_that_cannot_be_there() -> None:
    path = "x" * 300
    assert fails([*ROWS, (path, "9", "val")]) == (
        f"1 of 6 files of the table are not there: `{path}` (row 6). Relative paths start from "
        f"`root`."
    )


def test_file_that_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.stat

    def refuse(path: Any, **options: Any) -> Any:
        if path == "a.png":
            raise PermissionError(13, "Permission denied", path)
        return plain(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    assert fails(ROWS) == (
        "1 of 5 files of the table are not there: `a.png` (row 1). Relative paths start from "
        "`root`."
    )


@pytest.mark.parametrize(
    ("row", "rest"),
    [
        (("a.png", "10", "train"), ". Keep one."),
        (("./a.png", "9", "train"), ", with the labels '10' and '9'. Keep the right one."),
        (("a.png", "10", "val"), ", in the splits train and val: a picture that was trained on "
                                 "tells nothing in validation. Keep one."),
    ],
)  # fmt: skip
def test_file_that_is_there_twice(row: Row, rest: str) -> None:
    assert fails([*ROWS, row]) == f"`a.png` is in rows 1 and 6 of the table{rest}"


def test_share_is_needed_without_splits() -> None:
    assert fails([row[:2] for row in ROWS]) == (
        "The table has no column `split` that says train or val. Add one, or pass `val=0.2` to "
        "split at random."
    )


@pytest.mark.parametrize("options", [{"val": 0.2}, {"test": 0.2}])
def test_share_is_refused_with_splits(options: dict[str, float]) -> None:
    assert fails(ROWS, **options) == (
        "The table has splits of its own, in the column `split`, so that `val` and `test` would "
        "be ignored. Leave them out."
    )


def test_row_in_no_split() -> None:
    assert fails([*ROWS, ("f.png", "9", "")]) == (
        "Row 6 of the table is in no split, while others are in one."
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_split_without_rows(split: str) -> None:
    rows = [row for row in ROWS if row[2] != split]
    assert fails(rows) == f"The table has no row in the split {split}."


def test_class_only_in_val() -> None:
    assert fails([*ROWS, ("f.png", "ant", "val")]) == (
        "The split val of the table has the classes ['ant'], which the training split lacks: it "
        "has ['9', '10']."
    )


def test_class_missing_in_val() -> None:
    assert fails([row for row in ROWS if row[0] != "e.png"]) == (
        "The split val of the table lacks the classes ['10'] of the training split. Add them, or "
        "pass `allow_missing_classes=True`."
    )


def test_a_single_class() -> None:
    message = "Classification needs at least two classes, found only '9' in the table."
    assert fails([("a.png", "9", "train"), ("b.png", "9", "val")]) == message
    assert fails([("a.png", "9"), ("b.png", "9")], val=0.5) == message


def test_share_out_of_range() -> None:
    with pytest.raises(ConfigError) as error:
        load_table([row[:2] for row in ROWS], val=2)
    assert str(error.value) == (
        "`val` should be a finite number in (0, 1), the share to split off, found 2."
    )


def test_column_that_is_there_twice() -> None:
    table = write("t.csv", [("a.png", "x", "y")], header=("path", "label", "label"))
    assert (
        fails(table) == "The table `t.csv` has the columns ['label'] more than once. Rename them."
    )


def test_row_with_too_many_values() -> None:
    Path("t.csv").write_text("path,label\na.png,x\nb.png,y,z\n")
    assert fails("t.csv", val=0.5) == (
        "Row 3 of the table `t.csv` has more values than the header has columns (2). Put a value "
        "with a comma into quotes."
    )


@pytest.mark.parametrize("path", ["a\0.png", "a\ud800.png"])
def test_path_that_no_file_can_have(path: str) -> None:
    assert fails([ROWS[0], (path, "9", "train")]) == (
        f"Row 2 of the table should have a usable path as `path`, found {path!r}."
    )


def test_labels_of_many_digits_keep_their_order() -> None:
    labels = ["9" * 5000, "1" + "0" * 5000]
    rows = [(f"{name}.png", label, split) for name, label, split in
            zip("abcd", labels * 2, ("train", "train", "val", "val"), strict=True)]  # fmt: skip
    assert load_table(rows[::-1]).class_names == tuple(labels)
