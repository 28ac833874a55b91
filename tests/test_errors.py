from __future__ import annotations

import pytest

from transferkit import errors
from transferkit.errors import (
    ArtifactError,
    BackboneError,
    ConfigError,
    DataError,
    FreezeError,
    ImageError,
    MissingDependencyError,
    OutputError,
    TransferkitError,
    UnknownNameError,
    WeightsError,
    missing_dependency,
    unknown_name,
)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (ArtifactError, ValueError),
        (BackboneError, ValueError),
        (ConfigError, ValueError),
        (DataError, ValueError),
        (FreezeError, ValueError),
        (ImageError, ValueError),
        (MissingDependencyError, ImportError),
        (OutputError, OSError),
        (UnknownNameError, LookupError),
        (WeightsError, OSError),
    ],
)
def test_each_error_is_ours_and_the_fitting_builtin(
    error: type[Exception], builtin: type[Exception]
) -> None:
    assert issubclass(error, TransferkitError)
    assert issubclass(error, builtin)
    assert str(error("A sentence.")) == "A sentence."


def test_all_names_every_error_class() -> None:
    found = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, (TransferkitError, Warning))
    }
    assert set(errors.__all__) == found


def test_unknown_name_shows_as_a_sentence_not_as_a_key() -> None:
    assert not issubclass(UnknownNameError, KeyError)


def test_unknown_name_suggests_the_nearest() -> None:
    error = unknown_name(
        "backbone", "resnet-18", ["resnet50", "resnet18", "vgg11"], lister="list_backbones()"
    )
    assert isinstance(error, UnknownNameError)
    assert str(error) == (
        "Unknown backbone `resnet-18`. Did you mean `resnet18`? `list_backbones()` names all 3."
    )


def test_unknown_name_suggests_nothing_where_nothing_is_near() -> None:
    error = unknown_name("scheduler", "zzz", ["cosine", "step"], lister="list_schedulers()")
    assert str(error) == "Unknown scheduler `zzz`. `list_schedulers()` names all 2."


def test_unknown_name_takes_an_iterator() -> None:
    error = unknown_name("thing", "on", iter(["one"]), lister="things()")
    assert str(error) == "Unknown thing `on`. Did you mean `one`? `things()` names all 1."


def test_missing_dependency_names_the_line_that_installs_it() -> None:
    error = missing_dependency("timm", purpose="Backbone `timm:vit`", extra="timm")
    assert isinstance(error, MissingDependencyError)
    assert str(error) == (
        'Backbone `timm:vit` needs `timm`, which is not installed: pip install "transferkit[timm]"'
    )
