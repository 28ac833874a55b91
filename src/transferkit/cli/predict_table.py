"""A table of predictions for people, whose rows can be printed one by one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_MAX_PATH = 80
_PROBABILITY = "probability"


class Table:
    """Rows in columns that are as wide as what stands in them, known before the first one.

    Args:
        paths: The pictures; beyond 80 characters a path shifts its row rather than all others.
        class_names: What labels there are.
        top_k: The classes of a row.

    Example:
        >>> table = Table(["a.jpg", "bee.jpg"], ["ants", "bees"], 1)
        >>> print(table.header())
        path     label  probability
        >>> ranked = [{"label": "ants", "probability": 0.75}]
        >>> print(table.row({"path": "a.jpg", "top_k": ranked, "abstains": True}))
        a.jpg    ants   0.7500       abstains
    """

    def __init__(
        self, paths: Iterable[str | os.PathLike[str]], class_names: Sequence[str], top_k: int
    ) -> None:
        lengths = (len(_shown(os.fspath(path))) for path in paths)
        path = max((length for length in lengths if length <= _MAX_PATH), default=0)
        label = max(len(_shown(name)) for name in class_names)
        self._header = ["path", "label", _PROBABILITY]
        for rank in range(2, top_k + 1):
            self._header += [f"label_{rank}", f"{_PROBABILITY}_{rank}"]
        lengths_of_cells = [path, *([label, 0] * top_k)]
        self._widths = [
            max(len(name), length)
            for name, length in zip(self._header, lengths_of_cells, strict=True)
        ]

    def header(self) -> str:
        """Return the names of the columns."""
        return self._line(self._header)

    def row(self, record: Mapping[str, Any]) -> str:
        """Return the row of a prediction, or of a picture that could not be read."""
        path = _shown(record["path"])
        if "error" in record:
            return f"{path.ljust(self._widths[0])}  {_shown(record['error'])}"
        cells = [path]
        for each in record["top_k"]:
            cells += [_shown(each["label"]), f"{each['probability']:.4f}"]
        return self._line([*cells, "abstains" if record["abstains"] else ""])

    def _line(self, cells: Sequence[str]) -> str:
        widths = [*self._widths, 0]
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=False))
        return "  ".join(padded).rstrip()


def _shown(text: str) -> str:
    """Return a text on one line: what does not print is escaped."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
