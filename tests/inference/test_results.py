"""Predictions as CSV, JSON lines, Parquet and data frames."""

from __future__ import annotations

import csv
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet
import pytest

from transferkit.errors import MissingDependencyError
from transferkit.inference import (
    ClassProbability,
    Failure,
    Prediction,
    predict_to_file,
    predictions_to_dataframe,
    results,
)

FOUND: list[Prediction | Failure] = [
    Prediction(
        (ClassProbability("ants", 0, 0.1 + 0.2), ClassProbability("=bees", 1, 1e-30)), Path("a.jpg")
    ),
    Failure("Cannot read it,\nat all.", Path("b\udcff.jpg")),
    Prediction(
        (ClassProbability("=bees", 1, 0.75), ClassProbability("ants", 0, 0.25)),
        Path("c.jpg"),
        abstains=True,
    ),
]
RECORDS = [results.to_record(each) for each in FOUND]


def test_csv(tmp_path: Path) -> None:
    results.write_csv(tmp_path / "a.csv", RECORDS, 2)
    assert (tmp_path / "a.csv").read_bytes() == (
        b"path,label,index,probability,label_2,index_2,probability_2,abstains,error\r\n"
        b"a.jpg,ants,0,0.30000000000000004,'=bees,1,1e-30,false,\r\n"
        b'b\\udcff.jpg,,,,,,,,"Cannot read it,\nat all."\r\n'
        b"c.jpg,'=bees,1,0.75,ants,0,0.25,true,\r\n"
    )


@pytest.mark.parametrize("start", list("=+-@\t\r\n＝＋－＠"))  # noqa: RUF001
def test_texts_that_begin_a_formula_are_escaped(start: str, tmp_path: Path) -> None:
    name = f'{start}HYPERLINK("x")'
    top_k = ({"label": name, "index": 1, "probability": 0.5},)
    records: list[dict[str, Any]] = [
        {"path": name, "top_k": top_k, "abstains": False},
        {"path": "a" + name, "error": name},
    ]
    results.write_csv(tmp_path / "a.csv", records, 1)
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    assert rows == [
        [f"'{name}", f"'{name}", "1", "0.5", "false", ""],
        [f"a{name}", "", "", "", "", f"'{name}"],
    ]


def test_numbers_are_not_escaped(tmp_path: Path) -> None:
    top_k = ({"label": "a", "index": -1, "probability": -0.5},)
    results.write_csv(tmp_path / "a.csv", [{"path": "a", "top_k": top_k, "abstains": False}], 1)
    assert (tmp_path / "a.csv").read_bytes().splitlines()[1] == b"a,a,-1,-0.5,false,"


def test_jsonl(tmp_path: Path) -> None:
    results.write_jsonl(tmp_path / "a.jsonl", RECORDS, 2)
    lines = (tmp_path / "a.jsonl").read_bytes().decode("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        json.loads(json.dumps(record)) for record in RECORDS
    ]
    assert RECORDS[1] == {"path": "b\udcff.jpg", "error": "Cannot read it,\nat all."}
    assert RECORDS[0]["abstains"] is False
    assert RECORDS[0]["label"] == "ants"


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_ROWS_IN_GROUP", 2)
    results.write_parquet(tmp_path / "a.parquet", RECORDS, 2)
    file = pyarrow.parquet.ParquetFile(tmp_path / "a.parquet")
    assert file.num_row_groups == 2
    table = file.read()
    assert [str(field.type) for field in table.schema] == [
        "string", "string", "int64", "double", "string", "int64", "double", "bool", "string",
    ]  # fmt: skip
    assert table.to_pylist()[0] == {
        "path": "a.jpg", "label": "ants", "index": 0, "probability": 0.1 + 0.2, "label_2": "=bees",
        "index_2": 1, "probability_2": 1e-30, "abstains": False, "error": None,
    }  # fmt: skip
    assert table.column("path").to_pylist() == ["a.jpg", r"b\udcff.jpg", "c.jpg"]
    assert table.column("abstains").to_pylist() == [False, None, True]
    assert table.column("error").to_pylist() == [None, "Cannot read it,\nat all.", None]


def test_the_formats_hold_the_same(watched: Any, pictures: list[Path], tmp_path: Path) -> None:
    inputs = [*pictures, tmp_path / "none.png"]
    for suffix in ("csv", "jsonl", "parquet"):
        predict_to_file(watched, inputs, tmp_path / f"a.{suffix}", top_k=2)
    predict_to_file(watched, inputs, tmp_path / "b.txt", top_k=2, format="csv")
    assert (tmp_path / "b.txt").read_bytes() == (tmp_path / "a.csv").read_bytes()
    with (tmp_path / "a.csv").open(newline="") as file:
        from_csv = list(csv.DictReader(file))
    from_parquet = pd.read_parquet(tmp_path / "a.parquet")
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    from_jsonl = [json.loads(line) for line in lines]
    for name in ("path", "label", "index", "probability", "error"):
        expected = [each.get(name) for each in from_jsonl]
        assert [None if pd.isna(each) else each for each in from_parquet[name]] == expected
        texts = ["" if each is None else str(each) for each in expected]
        assert [each[name] for each in from_csv] == texts
    second = [each["top_k"][1]["probability"] for each in from_jsonl[:-1]]
    assert from_parquet["probability_2"][:-1].tolist() == second


def test_a_data_frame() -> None:
    frame = predictions_to_dataframe(iter(FOUND))
    assert list(frame.columns) == results.column_names(2)
    assert [str(dtype) for dtype in frame.dtypes] == [
        "string", "string", "Int64", "Float64", "string", "Int64", "Float64", "boolean", "string",
    ]  # fmt: skip
    assert frame["label"].tolist()[::2] == ["ants", "=bees"]
    assert frame["probability"].tolist()[::2] == [0.1 + 0.2, 0.75]
    assert frame["error"].isna().tolist() == [True, False, True]
    assert frame["abstains"].tolist()[::2] == [False, True]
    assert frame["path"].tolist() == ["a.jpg", "b\udcff.jpg", "c.jpg"]
    assert frame.iloc[1, 1:8].isna().all()


def test_a_data_frame_of_nothing() -> None:
    frame = predictions_to_dataframe([])
    assert list(frame.columns) == results.column_names(1)
    assert len(frame) == 0


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    before: Callable[..., Any] = importlib.import_module

    def fail(name: str) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return before(name)

    monkeypatch.setattr(importlib, "import_module", fail)


def test_pandas_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "pandas")
    message = (
        "`predictions_to_dataframe` needs `pandas`, which is not installed: "
        'pip install "transferkit[pandas]"'
    )
    with pytest.raises(MissingDependencyError, match=f"^{re.escape(message)}$"):
        predictions_to_dataframe([])


def test_pyarrow_is_not_there(
    watched: Any, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "pyarrow")
    message = (
        "Writing Parquet needs `pyarrow`, which is not installed: "
        'pip install "transferkit[parquet]"'
    )
    with pytest.raises(MissingDependencyError, match=f"^{re.escape(message)}$"):
        predict_to_file(watched, pictures, tmp_path / "a.parquet")
    assert watched.seen == []
