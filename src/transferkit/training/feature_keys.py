"""The key of a kept view: everything that features depend on, as plain JSON data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transferkit.data import ImageDataset
from transferkit.data.paths import PathArray
from transferkit.errors import ConfigError, ImageError
from transferkit.images import Augmentation, Preprocess, decode_image
from transferkit.models import Classifier
from transferkit.models.splitting import Split
from transferkit.training.fingerprints import code_of, describe, structure_digest, tensors_digest

FORMAT_VERSION = 1

_PACKAGES = ("transferkit", "torch", "torchvision", "pillow", "numpy")

_UNREADABLE = bytes(32)
"""Stands for the digest of a picture that cannot be read."""


def view_key(
    model: Classifier,
    split: Split,
    dataset: ImageDataset,
    *,
    engine: Mapping[str, Any],
    augmentation: str | Augmentation | None,
    seed: int | None,
    view: int,
) -> dict[str, Any]:
    """Return the key of one view of all pictures of a data set.

    Args:
        model: The model.
        split: Its parts; the key depends on the weights and the structure of the prefix.
        dataset: The pictures; the key depends on the bytes of each and on their order, not on
            their paths, classes or times. Where the data set has a decoder of its own, it
            depends on the pixels.
        engine: What computes the features: its description, with all that changes their bits.
        augmentation: How pictures are augmented; None where they are not.
        seed: Rules the augmentation.
        view: The number of the view.

    Returns:
        Plain JSON data.

    Raises:
        ConfigError: The augmentation does not say what it does.
    """
    return {
        "format": FORMAT_VERSION,
        "backbone": model.backbone_name,
        "num_stages": split.num_stages,
        "structure": structure_digest(split.prefix),
        "weights": tensors_digest(split.prefix),
        "pictures": pictures_digest(dataset, model.preprocess),
        "preprocess": model.preprocess.to_dict(),
        "augmentation": describe_for_key(augmentation),
        "seed": seed,
        "view": view,
        "engine": dict(engine),
        "device": next(model.parameters()).device.type,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {name: version(name) for name in _PACKAGES}
    with suppress(PackageNotFoundError):  # It may have built the backbone.
        found["timm"] = version("timm")
    return found


def pictures_digest(dataset: ImageDataset, preprocess: Preprocess) -> str:
    """Return the SHA-256 over all pictures, in their order.

    Args:
        dataset: The pictures. Of files that `preprocess` decodes the bytes count, of others the
            pixels. What cannot be read has a mark of its own.
        preprocess: Decodes pictures unless the data set has a decoder of its own.

    Returns:
        64 hexadecimal digits.
    """
    has_own_decoder = dataset.decode not in (decode_image, preprocess.decode)
    is_files = isinstance(dataset.images, PathArray) and not has_own_decoder
    if not has_own_decoder:
        dataset = dataset.with_decode(preprocess.decode)
    dataset = dataset.with_transform(None)
    digest = hashlib.sha256(b"bytes" if is_files else b"pixels")
    for index in range(len(dataset)):
        digest.update(_file_digest(dataset.paths[index]) if is_files else _digest(dataset, index))
    return digest.hexdigest()


def _file_digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for part in iter(partial(file.read, 2**20), b""):
                digest.update(part)
    except OSError:  # Loading pictures says so, or leaves it out, as it was told.
        return _UNREADABLE
    return digest.digest()


def _digest(dataset: ImageDataset, index: int) -> bytes:
    try:
        pixels = dataset[index][0].contiguous()
    except ImageError:
        return _UNREADABLE
    head = f"{pixels.dtype}{tuple(pixels.shape)}".encode()
    return hashlib.sha256(head + pixels.numpy().tobytes()).digest()


def describe_for_key(augmentation: str | Augmentation | None) -> str | None:
    """Return a text that changes with what an augmentation does.

    Args:
        augmentation: A preset's name; an instance of a dataclass whose fields are numbers, texts
            and tuples of them, told by these and its code; or None.

    Raises:
        ConfigError: It is another callable, which does not say what it does.
    """
    if augmentation is None or isinstance(augmentation, str):
        return augmentation
    kind = type(augmentation)
    if is_dataclass(kind):
        values = describe([(each.name, getattr(augmentation, each.name)) for each in fields(kind)])
        if values is not None:
            return f"{values} {hashlib.sha256(code_of(kind).encode()).hexdigest()}"
    found = getattr(augmentation, "__qualname__", kind.__qualname__)
    raise ConfigError(
        f"Augmented features can be kept in a folder only where the augmentation says what it "
        f"does: a preset's name, or a dataclass of numbers and texts, found `{found}`. Pass "
        f"`folder=None`, or `views=0`."
    )
