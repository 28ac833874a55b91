"""What the JSON data of an artifact may be, checked before anything is made of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transferkit.errors import ArtifactError, ConfigError, TransferkitError, UnknownNameError
from transferkit.images import Preprocess
from transferkit.models import HeadSpec

MAX_IMAGE_VALUES = 2**26
"""The most values of an image that a preprocessing in a file may make: 256 MiB of float32."""

_KINDS: dict[str, tuple[type, ...]] = {
    "backbone": (str,),
    "num_features": (int,),
    "class_names": (list,),
    "preprocess": (dict,),
    "freeze_plan": (dict,),
    "history": (dict, type(None)),
    "versions": (dict,),
}
_WORDS = {str: "a text", int: "an integer", list: "a list", dict: "an object"}


@contextmanager
def explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what reading the data of a file raises into an error that names the file.

    The name of a backbone that is not registered is for the caller to explain.

    Args:
        path: The file.

    Raises:
        ArtifactError: The block raised something.
        UnknownNameError: The block raised it.
    """
    try:
        yield
    except UnknownNameError:
        raise
    except TransferkitError as error:
        raise ArtifactError(f"Cannot build the model of the artifact `{path}`: {error}") from error
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        OverflowError,
        RuntimeError,
    ) as error:
        raise ArtifactError(
            f"The artifact `{path}` is incomplete or inconsistent "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]})."
        ) from error


def check_data(data: Mapping[str, Any]) -> None:
    """Check the JSON data of an artifact of any version that is read.

    Args:
        data: The data, with a version that is known.

    Raises:
        ArtifactError: A field is missing, or is not what it should be. The message is a sentence
            without the file's name.
    """
    for name, kinds in _KINDS.items():
        if name not in data:
            raise ArtifactError(f"its metadata has no `{name}`.")
        value = data[name]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ArtifactError(f"its `{name}` should be {_WORDS[kinds[0]]}, found {value!r:.80}.")
    if not data["backbone"].isprintable():
        raise ArtifactError(f"its `backbone` has the strange name {data['backbone']!r:.80}.")
    if data["num_features"] < 1:
        raise ArtifactError(
            f"its `num_features` should be at least 1, found {data['num_features']}."
        )
    if not _is_text_by_name(data["versions"]):
        raise ArtifactError(f"its `versions` should be texts, found {data['versions']!r:.80}.")
    terms = data.get("weights_license")
    if terms is not None and not isinstance(terms, str):
        raise ArtifactError(f"its `weights_license` should be a text or null, found {terms!r:.80}.")
    check_class_names(data["class_names"], len(data["class_names"]))


def _is_text_by_name(value: Mapping[str, object]) -> bool:
    return all(isinstance(each, str) for each in value.values())


def parse_head(data: Mapping[str, Any]) -> HeadSpec:
    """Return the description of the head in the data of an artifact.

    Args:
        data: The data.

    Raises:
        ArtifactError: There is none.
        ConfigError: There is no such head.
    """
    if "head" in data:
        return HeadSpec.from_dict(data["head"])
    if data["format_version"] == 1:
        return HeadSpec()  # From before there were others.
    raise ArtifactError("its metadata has no `head`.")


def check_class_names(class_names: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """Return the names of classes as a tuple when each class has one of its own.

    Folders may be called anything, line breaks and escape sequences included, and so may classes:
    whoever shows a name makes it safe for that place (`texts`).

    Args:
        class_names: The names, by index.
        num_classes: The number of classes of the model.

    Raises:
        ConfigError: There are more or fewer, some are equal, or one is empty or no text.

    Example:
        >>> check_class_names(["ants", "bees"], 2)
        ('ants', 'bees')
    """
    names = tuple(class_names)
    texts = all(isinstance(name, str) for name in names)
    if not texts or len(names) != num_classes or len(set(names)) != len(names):
        raise ConfigError(
            f"`class_names` should be {num_classes} different texts, one for each class of the "
            f"model, found {_shorten(list(names))}."
        )
    if "" in names:
        raise ConfigError(
            f"A class name should not be empty, as that of class {names.index('')} is. Name it."
        )
    return names


def check_image_size(preprocess: Preprocess) -> None:
    """Refuse images that no memory is sure to hold.

    Args:
        preprocess: How pictures become images.

    Raises:
        ConfigError: They are too large.
    """
    values = preprocess.num_channels * preprocess.resize_size**2
    if values > MAX_IMAGE_VALUES:
        raise ConfigError(
            f"The images of an artifact's model should have at most {MAX_IMAGE_VALUES} values "
            f"after resizing; {preprocess.num_channels} channels of {preprocess.resize_size} x "
            f"{preprocess.resize_size} pixels are {values}."
        )


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
