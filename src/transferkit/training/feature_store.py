"""Keeping features: in memory, over a budget in a memory-mapped file, if asked on disk."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from transferkit._files import atomic_path, make_folder
from transferkit.errors import OutputError

_VALUES = "values"


@dataclass(frozen=True, eq=False)
class StoredView:
    """The activations of all pictures of a data set, under one view of each.

    Args:
        values: float32 `(N, ...)`, by the pictures' places; rows that are not valid are 0.
        valid: bool `(N,)`: whether the picture could be read.
    """

    values: Tensor
    valid: Tensor


class FeatureStore:
    """Hold views, in memory as long as they fit a budget, then in memory-mapped files.

    Args:
        budget: Bytes that are held in memory at the most.
        folder: Where views are kept for later runs, each in a safetensors file named by its
            key; None keeps none.

    Raises:
        OutputError: The folder cannot be created or written.

    Example:
        >>> store = FeatureStore(budget=100)
        >>> views = [store.allocate(2, (8,)) for _ in range(2)]
        >>> store.num_bytes, store.num_spilled_bytes
        (64, 64)
        >>> store.close()
    """

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        self.budget: int = budget
        self.folder: Path | None = None if folder is None else make_folder(folder)
        self.num_bytes: int = 0
        self.num_spilled_bytes: int = 0
        self._given: list[Tensor] = []

    def allocate(self, count: int, shape: tuple[int, ...]) -> StoredView:
        """Return room for a view of `count` pictures, zeros, none of them valid.

        Raises:
            OutputError: It does not fit the budget and no file can be made for it.
        """
        size = 4 * count * math.prod(shape)
        fits = self._fits(size)
        values = torch.zeros((count, *shape)) if fits else self._spill((count, *shape), size)
        return self._hand_out(values, mapped=not fits, valid=False)

    def _fits(self, size: int) -> bool:
        return self.num_bytes + size <= self.budget

    def _hand_out(self, values: Tensor, *, mapped: bool, valid: bool) -> StoredView:
        if mapped:
            self.num_spilled_bytes += values.nbytes
        else:
            self.num_bytes += values.nbytes
        self._given.append(values)
        return StoredView(values, torch.full((len(values),), valid))

    def _spill(self, shape: tuple[int, ...], size: int) -> Tensor:
        folder = tempfile.gettempdir()
        try:
            # A file without a name: whatever ends the process, nothing of it is left.
            with tempfile.TemporaryFile(dir=folder) as file:
                _reserve(file, folder, size)
                return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))
        except OSError as error:
            raise OutputError(
                f"The features do not fit the {self.budget:,} bytes of memory that they may use, "
                f"and {size:,} bytes cannot be spilled to `{folder}` either: "
                f"{(error.strerror or str(error)).lower()}. Free room there, set TMPDIR, or "
                f"take fewer views."
            ) from error

    def load(self, key: Mapping[str, Any]) -> StoredView | None:
        """Return the view that an earlier run kept under this very key, or None.

        A file that is missing, incomplete, damaged or of another key is passed over, so that
        the view is made anew. Over the budget the file itself is mapped.
        """
        path = self._path(key)
        values = None if path is None else _read(path, key)
        if values is None:
            return None
        fits = self._fits(values.nbytes)
        return self._hand_out(values.clone() if fits else values, mapped=not fits, valid=True)

    def keep(self, key: Mapping[str, Any], view: StoredView) -> None:
        """Keep a view for later runs, all or nothing; without a folder, do nothing.

        A view that lacks pictures is not kept: later runs have to find, and report, those that
        cannot be read.

        Raises:
            OutputError: It cannot be written.
        """
        path = self._path(key)
        if path is not None and bool(view.valid.all()):
            with atomic_path(path) as temporary:
                _write(temporary, key, view.values)

    def _path(self, key: Mapping[str, Any]) -> Path | None:
        return None if self.folder is None else self.folder / f"{digest_of(key)}.safetensors"

    def close(self) -> None:
        """Give memory and files back, and leave all views empty; what was kept stays."""
        for values in self._given:
            values.set_()  # type: ignore[call-overload]
        self._given.clear()
        self.num_bytes = self.num_spilled_bytes = 0


def _reserve(file: IO[bytes], folder: str, size: int) -> None:
    """Give a file its size and its place on the disk.

    A sparse file that is mapped would end the process without a word when the disk is full.
    """
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


def _write(path: Path, key: Mapping[str, Any], values: Tensor) -> None:
    """Write a safetensors file piece by piece; the library's own way doubles the memory."""
    values = values.contiguous()
    metadata = {"key": json.dumps(key, sort_keys=True), "sha256": _digest_of_values(values)}
    tensor = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [0, values.nbytes]}
    header = json.dumps({"__metadata__": metadata, _VALUES: tensor}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.write(values.numpy().data)


def _read(path: Path, key: Mapping[str, Any]) -> Tensor | None:
    """Map the values of a file, if it is whole and of this key."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensor = file.get_slice(_VALUES)
            dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
        if json.loads(metadata["key"]) != json.loads(json.dumps(key)) or dtype != "F32":
            return None
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
        # Writes to it would stay in memory ("c").
        values = torch.from_numpy(np.memmap(path, np.float32, "c", 8 + length, shape))
    except (OSError, ValueError, KeyError, RecursionError, safetensors.SafetensorError):
        return None
    return values if _digest_of_values(values) == metadata.get("sha256") else None


def _digest_of_values(values: Tensor) -> str:
    digest = hashlib.sha256(str(tuple(values.shape)).encode())
    digest.update(values.numpy().data)
    return digest.hexdigest()


def digest_of(key: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a key of plain JSON data, as 64 hexadecimal digits.

    Example:
        >>> digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
