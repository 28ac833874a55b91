"""Names of parameters: those of the backbone, of stages, and those that globs match."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from transferkit.errors import FreezeError
from transferkit.models.stages import Stage

BACKBONE = "backbone."
"""What the names of a classifier's backbone start with."""


def parameter_names(model: nn.Module) -> list[str]:
    """Return the names of a model's parameters."""
    return [name for name, _ in model.named_parameters()]


def backbone_names(names: Iterable[str]) -> set[str]:
    """Return those of the names that are the backbone's."""
    return {name for name in names if name.startswith(BACKBONE)}


def names_in(names: Iterable[str], stages: Sequence[Stage]) -> set[str]:
    """Return those of the names that lie in one of the stages."""
    return {
        name
        for name in backbone_names(names)
        if any(stage.holds(name.removeprefix(BACKBONE)) for stage in stages)
    }


def match_names(
    patterns: Sequence[str], names: Sequence[str], stages: Sequence[Stage] = ()
) -> set[str]:
    """Return the names that a glob matches.

    Args:
        patterns: The globs; `*` crosses dots.
        names: The names of all parameters.
        stages: The stages of the backbone, for a hint where a glob is the name of one.

    Raises:
        FreezeError: A glob matches no name.

    Example:
        >>> sorted(match_names(["backbone.*", "*.bias"], ["backbone.conv1", "head.bias", "a"]))
        ['backbone.conv1', 'head.bias']
    """
    found: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            raise FreezeError(_no_match(pattern, names, stages))
        found |= matches
    return found


def _no_match(pattern: str, names: Sequence[str], stages: Sequence[Stage]) -> str:
    text = f"The freeze pattern `{pattern}` matches no parameter."
    if any(stage.name == pattern for stage in stages):
        return f"{text} Did you mean `until:{pattern}`, or `{BACKBONE}{pattern}.*`?"
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"{text} Did you mean `{pattern}.*`?"
    return f"{text} The parameters' names start with: {', '.join(beginnings(names))}."


def beginnings(names: Iterable[str]) -> list[str]:
    """Return what names start with, up to the second dot.

    Example:
        >>> beginnings(["backbone.layer1.0.weight", "backbone.layer1.0.bias", "head.bias"])
        ['backbone.layer1', 'head.bias']
    """
    return sorted({".".join(name.split(".")[:2]) for name in names})
