"""Checks of arguments at the door, each with the one sentence that says what was expected."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from transferkit.errors import ConfigError


def check_integer(name: str, value: object, *, minimum: int) -> int:
    """Return `value` as an int when it is an integer, NumPy's too, of at least `minimum`.

    Raises:
        ConfigError: It is something else.

    Example:
        >>> check_integer("epochs", 3, minimum=1)
        3
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ConfigError(f"`{name}` should be an integer of at least {minimum}, found {value!r}.")
    return int(value)


def check_number(name: str, value: object, fits: Callable[[float], bool], words: str) -> float:
    """Return `value` as a float when it is a finite number, NumPy's too, that fits.

    Args:
        name: The argument's name.
        value: What was given.
        fits: Tells whether a number can work.
        words: The same in words: "above 0".

    Raises:
        ConfigError: It is something else.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_number and math.isfinite(float(value)) and fits(float(value))):  # type: ignore[arg-type]
        raise ConfigError(f"`{name}` should be a finite number {words}, found {value!r}.")
    return float(value)  # type: ignore[arg-type]


def check_type(name: str, value: object, kind: type | tuple[type, ...], words: str) -> None:
    """Pass over a value of the right kind.

    Args:
        name: The argument's name.
        value: What was given.
        kind: The classes that it may be of.
        words: What was expected, with how to come by it.

    Raises:
        ConfigError: It is of another kind.
    """
    if not isinstance(value, kind):
        raise ConfigError(f"`{name}` should be {words}, found {type(value).__name__}.")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Pass over a value that is one of several words.

    Args:
        name: The parameter's name, for the message.
        value: What was given.
        choices: The words, at least two.

    Raises:
        ConfigError: It is none of them.

    Example:
        >>> check_choice("engine", "onnx", ["pytorch", "openvino", "onnxruntime"])
        Traceback (most recent call last):
        transferkit.errors.ConfigError: `engine` should be "pytorch", "openvino" or \
"onnxruntime", found 'onnx'.
    """
    if value not in choices:
        *others, last = (f'"{each}"' for each in choices)
        raise ConfigError(f"`{name}` should be {', '.join(others)} or {last}, found {value!r}.")


def check_callable(name: str, value: Any, words: str) -> None:
    """Pass over a callable.

    Raises:
        ConfigError: It cannot be called.
    """
    if not callable(value):
        raise ConfigError(f"`{name}` should be {words}, found {value!r}.")


def check_flag(name: str, value: object) -> bool:
    """Return `value` when it is True or False.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"`{name}` should be True or False, found {value!r}.")
    return value


def check_path(name: str, value: object) -> Path:
    """Return `value` as a path when it is a text or a path.

    Raises:
        ConfigError: It is something else, or nothing on this system can have that path.
    """
    if isinstance(value, (str, os.PathLike)):
        path = os.fspath(value)
        if isinstance(path, str):
            return _check_usable(name, path)
    raise ConfigError(f"`{name}` should be a path, found {value!r}.")


def _check_usable(name: str, path: str) -> Path:
    """Refuse what no file can be called: too long, or with a NUL in it."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        pass
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise ConfigError(f"`{name}` is no usable path: {reason}, found {path[:100]!r}.") from error
    return Path(path)
