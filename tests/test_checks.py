from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from transferkit._checks import (
    check_callable,
    check_choice,
    check_integer,
    check_number,
    check_path,
    check_type,
)
from transferkit.errors import ConfigError


@pytest.mark.parametrize("value", [1, 7, np.int64(7), np.uint8(7)])
def test_integers_of_any_kind_pass_as_int(value: object) -> None:
    found = check_integer("epochs", value, minimum=1)
    assert found == value
    assert type(found) is int


@pytest.mark.parametrize("value", [0, True, 1.0, "1", None, np.float64(2)])
def test_what_is_no_integer_or_too_small(value: object) -> None:
    message = f"`epochs` should be an integer of at least 1, found {value!r}."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_integer("epochs", value, minimum=1)


def test_words_that_may_be_chosen() -> None:
    for word in ("on", "off"):
        check_choice("mode", word, ("on", "off"))
    for value in ("On", None, 1, ["on"]):
        message = f'`mode` should be "on" or "off", found {value!r}.'
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            check_choice("mode", value, ("on", "off"))


@pytest.mark.parametrize("value", [0.5, 1, np.float32(0.5), np.int64(1)])
def test_numbers_of_any_kind_pass_as_float(value: object) -> None:
    found = check_number("lr", value, lambda number: number > 0, "above 0")
    assert found == value
    assert type(found) is float


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), True, "1", None, 1j])
def test_what_is_no_fitting_number(value: object) -> None:
    message = f"`lr` should be a finite number above 0, found {value!r}."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_number("lr", value, lambda number: number > 0, "above 0")


def test_types_and_callables() -> None:
    check_type("data", [], list, "a list")
    check_callable("criterion", len, "a callable")
    with pytest.raises(ConfigError, match=r"^`data` should be a list, found NoneType\.$"):
        check_type("data", None, list, "a list")
    with pytest.raises(ConfigError, match=r"^`criterion` should be a callable, found 3\.$"):
        check_callable("criterion", 3, "a callable")


def test_paths() -> None:
    assert check_path("root", "a/b") == check_path("root", Path("a/b")) == Path("a/b")
    assert check_path("root", "no/such/place") == Path("no/such/place")
    assert check_path("root", f"{__file__}/below-a-file").name == "below-a-file"
    for value in (None, b"a", 3):
        message = f"`root` should be a path, found {value!r}."
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            check_path("root", value)


@pytest.mark.parametrize("value", ["a" * 5000, "a\0b"])
def test_paths_that_nothing_can_have(value: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^`root` is no usable path: (file name too long|embedded null byte), "
    ):
        check_path("root", value)
