"""Predictions as rows: CSV, JSON lines, Parquet and data frames."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transferkit.errors import ConfigError, missing_dependency
from transferkit.inference.prediction import Failure, Prediction

if TYPE_CHECKING:
    import pandas as pd

Record = Mapping[str, Any]
"""A prediction or a failure as plain JSON data."""

FORMATS = ("csv", "jsonl", "parquet")

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001
_ROWS_IN_GROUP = 8192


def to_record(found: Prediction | Failure) -> dict[str, Any]:
    """Return a prediction, or why there is none, as plain JSON data."""
    if isinstance(found, Failure):
        return found.to_dict()
    return {**found.to_dict(), "abstains": found.abstains}


def column_names(top_k: int) -> list[str]:
    """Return the columns of a table of predictions.

    Example:
        >>> column_names(2)[:7]
        ['path', 'label', 'index', 'probability', 'label_2', 'index_2', 'probability_2']
        >>> column_names(2)[7:]
        ['abstains', 'error']
    """
    fields = ("label", "index", "probability")
    ranked = [
        field if rank == 1 else f"{field}_{rank}"
        for rank in range(1, top_k + 1)
        for field in fields
    ]
    return ["path", *ranked, "abstains", "error"]


def to_row(record: Record, top_k: int) -> list[Any]:
    """Return the values of a record for the columns; None where it has none."""
    ranked = [
        value
        for each in record.get("top_k", ())[:top_k]
        for value in (each["label"], each["index"], each["probability"])
    ]
    missing = [None] * (3 * top_k - len(ranked))
    return [record["path"], *ranked, *missing, record.get("abstains"), record.get("error")]


def predictions_to_dataframe(predictions: Iterable[Prediction | Failure]) -> pd.DataFrame:
    """Collect predictions in a data frame, a row for each.

    The columns are `path`, `label`, `index` and `probability`, then `label_2` and so on for
    the further classes of `top_k`, `abstains`, and `error` with the reason where a picture
    could not be read. What a row lacks is missing (NA) in it.

    Args:
        predictions: What `Predictor.predict_many` gives. All of them are held in memory.

    Returns:
        The data frame, in the order of the predictions.

    Raises:
        MissingDependencyError: pandas is not installed.

    Example:
        >>> from transferkit.inference import ClassProbability
        >>> found = [Prediction((ClassProbability("ants", 0, 0.75),), Path("a.jpg"))]
        >>> predictions_to_dataframe(found).to_dict("records")[0]["label"]
        'ants'
    """
    try:
        pandas = importlib.import_module("pandas")
    except ImportError as error:
        raise missing_dependency(
            "pandas", purpose="`predictions_to_dataframe`", extra="pandas"
        ) from error
    records = [to_record(each) for each in predictions]
    top_k = max((len(each.get("top_k", ())) for each in records), default=1) or 1
    names = column_names(top_k)
    rows = [to_row(each, top_k) for each in records]
    kinds = {
        "text": pandas.StringDtype("python"),  # Arrow's holds no file names that are no text.
        "index": "Int64",
        "probability": "Float64",
        "flag": "boolean",
    }
    frame: pd.DataFrame = pandas.DataFrame(rows, columns=names, dtype=object).astype(
        {name: kinds[_kind(name)] for name in names}
    )
    return frame


def _kind(column: str) -> str:
    name = column.split("_")[0]
    return {"index": "index", "probability": "probability", "abstains": "flag"}.get(name, "text")


def resolve_format(out: Path, given: str | None) -> str:
    """Return the format of a file: the one that is named, else the one of its ending.

    Raises:
        ConfigError: It is none of ours.
        MissingDependencyError: What writes it is not installed.
    """
    found = out.suffix.lower().removeprefix(".") if given is None else given
    if found not in FORMATS:
        what = f"`out` as `{out.name}`" if given is None else f"`format` as {given!r}"
        raise ConfigError(
            f"Results are written as {', '.join(FORMATS)}, found {what}. Give the file such an "
            f"ending, or name the `format`."
        )
    if found == "parquet":
        _import_parquet()
    return found


def write_csv(path: Path, records: Iterable[Record], top_k: int) -> None:
    r"""Write records as CSV (RFC 4180) in UTF-8, with a header.

    Texts that a spreadsheet would take for a formula get an apostrophe before them, as OWASP
    advises. Bytes of a file name that are no text become `\udcXX`.
    """
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(column_names(top_k))
        for record in records:
            writer.writerow([_to_cell(each) for each in to_row(record, top_k)])


def _to_cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and value.startswith(_FORMULA_STARTS):
        return f"'{value}"
    return value


def write_jsonl(path: Path, records: Iterable[Record], top_k: int) -> None:
    """Write records as JSON lines in UTF-8."""
    # The replacement of what is no text, `\udcXX`, is the very escape of JSON for it.
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def write_parquet(path: Path, records: Iterable[Record], top_k: int) -> None:
    """Write records as Parquet, in groups of rows, so that few are in memory at once."""
    arrow, parquet = _import_parquet()
    kinds = {
        "text": arrow.string(),
        "index": arrow.int64(),
        "probability": arrow.float64(),
        "flag": arrow.bool_(),
    }
    names = column_names(top_k)
    schema = arrow.schema([(name, kinds[_kind(name)]) for name in names])
    rows = (to_row(record, top_k) for record in records)
    with parquet.ParquetWriter(str(path), schema) as writer:
        while group := list(islice(rows, _ROWS_IN_GROUP)):
            columns = [[_to_text(value) for value in column] for column in zip(*group, strict=True)]
            writer.write_table(arrow.table(dict(zip(names, columns, strict=True)), schema=schema))


def _to_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return value.encode("utf-8", errors="backslashreplace").decode("utf-8")


def _import_parquet() -> tuple[Any, Any]:
    """Return pyarrow and its module for Parquet.

    Raises:
        MissingDependencyError: pyarrow is not installed.
    """
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise missing_dependency("pyarrow", purpose="Writing Parquet", extra="parquet") from error


WRITERS: dict[str, Callable[[Path, Iterator[Record], int], None]] = {
    "csv": write_csv,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
}
