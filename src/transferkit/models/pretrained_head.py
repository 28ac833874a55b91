"""The classifier that a backbone was trained with, as a start for classes that it knows."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TypeAlias

import torch
from torch import Tensor

from transferkit._checks import check_type
from transferkit.errors import ConfigError
from transferkit.models.head_starts import LinearStart, to_float32

Fitting: TypeAlias = "str | int | Sequence[str | int]"
"""What a class is called by the pretrained classifier: a name, an index or several."""

NUM_SUGGESTIONS = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class PretrainedHead:
    """Hold the last layer of a pretrained network with the names of its classes.

    Args:
        weight: Floating point `(K, D)`.
        bias: Floating point `(K,)`.
        class_names: The K names, in the order of the rows; a name may occur twice.

    Raises:
        ConfigError: The shapes or the number of names do not agree.

    Example:
        >>> head = PretrainedHead(
        ...     weight=torch.eye(3), bias=torch.zeros(3), class_names=("ant", "bee", "wolf")
        ... )
        >>> rows = match_class_names(["ants", "bees"], head.class_names)
        >>> pretrained_rows(head, rows, ["ants", "bees"]).weight.tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """

    weight: Tensor
    bias: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        check_type("weight", self.weight, Tensor, "a tensor (K, D)")
        check_type("bias", self.bias, Tensor, "a tensor (K,)")
        object.__setattr__(self, "class_names", _check_names("class_names", self.class_names))
        number = len(self.class_names)
        if self.weight.ndim != 2 or len(self.weight) != number or self.bias.shape != (number,):
            raise ConfigError(
                f"A pretrained head with {number} class names needs a `weight` of the shape "
                f"({number}, D) and a `bias` of the shape ({number},), found "
                f"{tuple(self.weight.shape)} and {tuple(self.bias.shape)}."
            )


def match_class_names(
    class_names: Sequence[str],
    known: Sequence[str],
    mapping: Mapping[str, Fitting] | None = None,
    *,
    argument: str = "mapping",
) -> dict[str, tuple[int, ...]]:
    """Find for each class the rows of a pretrained classifier that fit it.

    Names are compared without regard to case, underscores and hyphens, and where that finds
    nothing, also with English plurals taken for their singular: "Ants" fits "ant". Several
    classes may fit the same row.

    Args:
        class_names: The names of our classes.
        known: The names of the pretrained classifier's classes, in the order of its rows.
        mapping: What classes are called there, for those whose name does not say it: a known
            name, the index of a row in [0, K - 1], or several of these.
        argument: What the caller's argument is called that became `mapping`, for error texts.

    Returns:
        For each class the indices of its rows, at least one.

    Raises:
        ConfigError: A class fits no row, a name fits several, or the mapping names a class
            or a row that there is not.

    Example:
        >>> known = ("crane", "sports car", "racer", "crane")
        >>> match_class_names(["Sports_cars"], known)
        {'Sports_cars': (1,)}
        >>> match_class_names(["car", "crane"], known, {"car": ["sports car", 2], "crane": 0})
        {'car': (1, 2), 'crane': (0,)}
    """
    class_names = _check_names("class_names", class_names)
    known = _check_names("known", known)
    mapping = {} if mapping is None else mapping
    check_type(argument, mapping, Mapping, "a mapping from class names, or None")
    strangers = [key for key in mapping if key not in class_names]
    if strangers:
        close = difflib.get_close_matches(str(strangers[0]), class_names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"`{argument}` names {strangers[0]!r}, which is none of the {len(class_names)} "
            f"classes.{hint}"
        )
    index = _NameIndex(known, argument)
    return {
        name: index.by_mapping(mapping[name], owner=name)
        if name in mapping
        else (index.by_name(name, owner=name),)
        for name in class_names
    }


def pretrained_rows(
    head: PretrainedHead, rows: Mapping[str, Sequence[int]], class_names: Sequence[str]
) -> LinearStart:
    """Take the rows of a pretrained classifier that fit our classes, averaged for each class.

    Args:
        head: The pretrained classifier.
        rows: For each class the indices of its rows, as `match_class_names` returns them.
        class_names: The names of our C classes, in their order.

    Returns:
        The classifier, float32 `(C, D)` and `(C,)`.

    Raises:
        ConfigError: A class has no rows, or an index is out of range.
    """
    class_names = _check_names("class_names", class_names)
    number = len(head.class_names)
    for name in class_names:
        chosen = rows.get(name, ())
        if not chosen or not all(_is_index(row, number) for row in chosen):
            raise ConfigError(
                f"`rows` should have indices in [0, {number - 1}] for the class {name!r}, "
                f"found {rows.get(name)!r}. `match_class_names` finds them."
            )
    weight, bias = (
        torch.stack(
            [each.detach().cpu().double()[list(rows[name])].mean(0) for name in class_names]
        )
        for each in (head.weight, head.bias)
    )
    return LinearStart(**to_float32(weight, bias))


class _NameIndex:
    """Find rows by what their names come to."""

    def __init__(self, known: Sequence[str], argument: str) -> None:
        self._known = known
        self._argument = argument
        self._by_plain: dict[str, list[int]] = {}
        self._by_singular: dict[str, list[int]] = {}
        for row, name in enumerate(known):
            plain = _plain(name)
            self._by_plain.setdefault(plain, []).append(row)
            for form in _singulars(plain):
                self._by_singular.setdefault(form, []).append(row)

    def by_mapping(self, fitting: Fitting, *, owner: str) -> tuple[int, ...]:
        """Return the rows of a class by what the mapping says of it."""
        several = isinstance(fitting, Sequence) and not isinstance(fitting, str)
        parts = list(fitting) if several else [fitting]  # type: ignore[arg-type]
        rows = [self._row(part, owner=owner) for part in parts]
        if not rows:
            raise ConfigError(
                f"`{self._argument}[{owner!r}]` should be a known name, an index or several of "
                f"these, found {fitting!r}."
            )
        return tuple(dict.fromkeys(rows))

    def _row(self, part: object, *, owner: str) -> int:
        if isinstance(part, str):
            return self.by_name(part, owner=owner)
        if not _is_index(part, len(self._known)):
            raise ConfigError(
                f"`{self._argument}[{owner!r}]` should hold known names or indices in "
                f"[0, {len(self._known) - 1}], found {part!r}."
            )
        return int(part)  # type: ignore[call-overload, no-any-return]

    def by_name(self, name: str, *, owner: str) -> int:
        """Return the one row that a name fits."""
        plain = _plain(name)
        rows = self._by_plain.get(plain) or sorted(
            {row for form in _singulars(plain) for row in self._by_singular.get(form, ())}
        )
        if len(rows) > 1:
            listed = ", ".join(f"{row} ({self._known[row]!r})" for row in rows)
            raise ConfigError(
                f"The name {name!r} fits {len(rows)} rows of the pretrained classifier: {listed}. "
                f"Choose by index: {self._argument}={{{owner!r}: {rows[0]}}}."
            )
        if not rows:
            raise self._unknown(name, owner=owner)
        return rows[0]

    def _unknown(self, name: str, *, owner: str) -> ConfigError:
        close = difflib.get_close_matches(_plain(name), list(self._by_plain), n=NUM_SUGGESTIONS)
        names = [self._known[self._by_plain[each][0]] for each in close]
        listed = ", ".join(map(repr, names))
        hint = f"The closest are {listed}. " if names else ""
        return ConfigError(
            f"The name {name!r} fits none of the {len(self._known)} names of the pretrained "
            f"classifier. {hint}Say what the class is called there, by a name or an index: "
            f"{self._argument}={{{owner!r}: {names[0] if names else 'NAME'!r}}}."
        )


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _singulars(name: str) -> set[str]:
    """Return what a plain name may be the plural of, and itself."""
    stem, _, last = name.rpartition(" ")
    forms = {last}
    if len(last) > 3 and last.endswith("s") and not last.endswith("ss"):
        forms.add(last[:-1])
        if last.endswith("ies"):
            forms.add(f"{last[:-3]}y")
        elif last.endswith("ves"):
            forms |= {f"{last[:-3]}f", f"{last[:-3]}fe"}
        elif last.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
            forms.add(last[:-2])
    return {f"{stem} {form}".strip() for form in forms}


def _is_index(value: object, number: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 <= int(value) < number


def _check_names(argument: str, names: object) -> tuple[str, ...]:
    if (
        isinstance(names, str)
        or not isinstance(names, Sequence)
        or not all(isinstance(name, str) for name in names)
    ):
        raise ConfigError(f"`{argument}` should be a list of texts, found {names!r:.100}.")
    return tuple(names)
