"""The exception tree: every error that transferkit raises on purpose is a `TransferkitError`.

Each class also inherits the built-in that fits, so that `except ValueError` or
`except OSError` written by somebody who does not know this library still works.
A message says what happened (with the value), what was expected and how to mend it.
This module imports nothing of the package and is open to every room.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArtifactError",
    "ArtifactWarning",
    "BackboneError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ExportError",
    "FeatureError",
    "FreezeError",
    "ImageError",
    "LossError",
    "MissingDependencyError",
    "OutOfMemoryError",
    "OutputError",
    "ProcessError",
    "TransferkitError",
    "UnknownNameError",
    "WeightsError",
]


class TransferkitError(Exception):
    """Base class of all errors raised by transferkit."""


class ConfigError(TransferkitError, ValueError):
    """An argument has a value that cannot work."""


class DataError(TransferkitError, ValueError):
    """A folder, a split or a set of classes is not what training needs."""


class ImageError(TransferkitError, ValueError):
    """Something that should be a picture cannot be read as one."""


class BackboneError(TransferkitError, ValueError):
    """A backbone cannot be built or does not keep its contract."""


class ExportError(TransferkitError, RuntimeError):
    """A model cannot be exported, or would compute something else after it."""


class FeatureError(TransferkitError, RuntimeError):
    """Cached features are not those that the network gives."""


class FreezeError(TransferkitError, ValueError):
    """A freeze pattern does not fit the model."""


class WeightsError(TransferkitError, OSError):
    """Weights cannot be found, downloaded, read or fitted to the backbone."""


class ArtifactError(TransferkitError, ValueError):
    """A file is not an artifact that this version can trust and read."""


class ArtifactWarning(UserWarning):
    """An artifact gives nearly, but not quite, what it gave when it was saved."""


class CheckpointError(TransferkitError, ValueError):
    """A file is not a checkpoint that this fit can go on from, or a state cannot be kept in one."""


class LossError(TransferkitError, ArithmeticError):
    """The loss of a batch is not a finite number."""


class OutOfMemoryError(TransferkitError, MemoryError):
    """A batch does not fit the memory; the message says how large a one does."""


class OutputError(TransferkitError, OSError):
    """A result cannot be written."""


class ProcessError(TransferkitError, RuntimeError):
    """Another process has failed: one that trains with this one, or one that reads for it."""


class MissingDependencyError(TransferkitError, ImportError):
    """An optional package is not installed; the message names the line that installs it."""


class UnknownNameError(TransferkitError, LookupError):
    """A name is not in a registry; the message suggests the nearest one."""


def unknown_name(kind: str, name: str, known: Iterable[str], *, lister: str) -> UnknownNameError:
    """Build the error for a name that a registry does not hold.

    Args:
        kind: What the registry holds, singular: "backbone", "scheduler".
        name: The name that was asked for.
        known: The registered names.
        lister: The public function that lists them, as code: "list_backbones()".

    Returns:
        The error, ready to raise, with the nearest registered name as a suggestion.

    Example:
        >>> print(unknown_name("backbone", "resnet-18", ["resnet18"], lister="list_backbones()"))
        Unknown backbone `resnet-18`. Did you mean `resnet18`? `list_backbones()` names all 1.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    return UnknownNameError(f"Unknown {kind} `{name}`.{hint} `{lister}` names all {len(names)}.")


def missing_dependency(package: str, *, purpose: str, extra: str) -> MissingDependencyError:
    """Build the error for an optional package that is not installed.

    Args:
        package: The package that could not be imported.
        purpose: What it is needed for, as the subject of the sentence.
        extra: The extra of transferkit that installs it.

    Returns:
        The error, ready to raise.

    Example:
        >>> print(missing_dependency("timm", purpose="Backbone `timm:vit`", extra="timm"))
        Backbone `timm:vit` needs `timm`, which is not installed: pip install "transferkit[timm]"
    """
    return MissingDependencyError(
        f'{purpose} needs `{package}`, which is not installed: pip install "transferkit[{extra}]"'
    )
