"""JSON that says one thing only: no key twice, no NaN, no depth without end."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

MAX_DEPTH = 64
"""How deep lists and objects may lie in each other."""


def parse_strict(text: str) -> Any:
    """Read JSON, and refuse what readers understand in different ways.

    Args:
        text: The JSON text. What it becomes takes up to about 25 times its memory, so that the
            caller bounds its length.

    Returns:
        The data.

    Raises:
        ValueError: It is no JSON; an object has a key twice; a number is NaN, infinite or of more
            digits than Python reads; or it is nested deeper than `MAX_DEPTH`.

    Example:
        >>> parse_strict('{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ValueError: the key 'a' is there twice
    """
    try:
        data = json.loads(
            text,
            object_pairs_hook=_make_object,
            parse_constant=_refuse_constant,
            parse_float=_parse_float,
        )
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    _check_depth(data)
    return data


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r:.80} is there twice")
    return made


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.40} is too large")
    return value


def _check_depth(data: Any) -> None:
    """Walk level by level, since a function that calls itself would meet Python's own limit."""
    level = [data]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for each in level
            if isinstance(each, (dict, list))
            for child in (each.values() if isinstance(each, dict) else each)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
