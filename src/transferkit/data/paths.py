"""`PathArray`: a million paths in a few arrays instead of a million objects."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transferkit.errors import DataError

_NUM_AT_A_TIME = 2**14


class PathArray(Sequence[Path]):
    """Paths, stored as one run of bytes with offsets, and a list of the folders they lie in.

    A path becomes a `Path` object when it is asked for. Forked workers share the arrays,
    since nothing in them is ever counted or written; `share_memory` makes other processes
    share them, too.

    Args:
        names: The encoded file names one after the other, uint8.
        ends: Where each name ends, int64 `(N,)`.
        folders: Which folder each file lies in, int32 `(N,)`.
        prefixes: The folders, each with its separator at the end.

    Example:
        >>> paths = PathArray.from_paths(["ants/1.jpg", "ants/2.jpg", "bees/1.jpg"])
        >>> len(paths), paths[-1].name, paths.num_bytes < 60
        (3, '1.jpg', True)
    """

    def __init__(
        self,
        names: npt.NDArray[np.uint8],
        ends: npt.NDArray[np.int64],
        folders: npt.NDArray[np.int32],
        prefixes: Sequence[str],
    ) -> None:
        self._arrays: tuple[npt.NDArray[Any], ...] = (names, ends, folders)
        self._prefixes = tuple(prefixes)
        self._shared: tuple[Tensor, ...] | None = None

    @classmethod
    def from_paths(cls, paths: Iterable[str | os.PathLike[str]]) -> PathArray:
        """Build it from paths of any kind.

        Raises:
            DataError: A path is none that a file can have.
        """
        builder = PathBuilder()
        parts = (os.path.split(_check_text(path)) for path in paths)
        for folder, group in groupby(parts, key=operator.itemgetter(0)):
            builder.add(folder, [name for _, name in group])
        return builder.build()

    def __len__(self) -> int:
        return len(self._arrays[1])

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> PathArray: ...
    def __getitem__(self, index: int | slice) -> Path | PathArray:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        count, index = len(self), operator.index(index)
        if not -count <= index < count:
            raise IndexError(f"There are {count} paths, found the index {index}.")
        names, ends, folders = self._arrays
        index %= count
        start = int(ends[index - 1]) if index else 0
        name = os.fsdecode(names[start : int(ends[index])].tobytes())
        return Path(self._prefixes[int(folders[index])] + name)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(
            one == another for one, another in zip(self, other, strict=True)
        )

    def __repr__(self) -> str:
        return f"PathArray({len(self)} paths)"

    def take(self, indices: npt.ArrayLike) -> PathArray:
        """Return the paths at these places, in their order."""
        places = np.asarray(indices, dtype=np.int64)
        names, ends, folders = self._arrays
        starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        sizes = (ends - starts)[places]
        new_ends = np.cumsum(sizes)
        new_starts = new_ends - sizes
        shifts = starts[places] - new_starts
        chosen = np.empty(int(sizes.sum()), dtype=np.uint8)
        # Some at a time: for each byte of the result eight say where it comes from.
        for first in range(0, len(places), _NUM_AT_A_TIME):
            part = slice(first, first + _NUM_AT_A_TIME)
            begin, end = int(new_starts[first]), int(new_ends[part][-1])
            chosen[begin:end] = names[np.repeat(shifts[part], sizes[part]) + np.arange(begin, end)]
        return PathArray(chosen, new_ends, folders[places], self._prefixes)

    @property
    def num_bytes(self) -> int:
        """The memory that the arrays take."""
        return sum(array.nbytes for array in self._arrays)

    def share_memory(self) -> None:
        """Move the arrays to memory that processes share: sent to one, they are not copied."""
        if self._shared is None and len(self):
            self._shared = tuple(shared(array) for array in self._arrays)
            self._arrays = tuple(tensor.numpy() for tensor in self._shared)

    def __getstate__(self) -> dict[str, Any]:
        return {"arrays": self._shared or self._arrays, "prefixes": self._prefixes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = state["arrays"]
        is_shared = isinstance(arrays[0], Tensor)
        self._shared = arrays if is_shared else None
        self._arrays = tuple(each.numpy() for each in arrays) if is_shared else arrays
        self._prefixes = state["prefixes"]


def _check_text(path: str | os.PathLike[str]) -> str:
    """Return a path as a text that can be encoded."""
    text = os.fspath(path)
    try:
        if isinstance(text, str) and (text.isascii() or os.fsencode(text)):
            return text
    except UnicodeEncodeError as error:
        raise DataError(f"No file can have the path {text!r}.") from error
    raise DataError(f"A path should be a text, found {text!r}.")


def shared(array: npt.NDArray[Any]) -> Tensor:
    """Return a copy of an array in memory that processes share."""
    result: Tensor = torch.from_numpy(np.array(array)).share_memory_()  # type: ignore[no-untyped-call]
    return result


class PathBuilder:
    """Gather paths folder by folder."""

    def __init__(self) -> None:
        self._names = bytearray()
        self._sizes: list[npt.NDArray[np.int64]] = []
        self._folders: list[npt.NDArray[np.int32]] = []
        self._prefixes: dict[str, int] = {}

    def add(self, folder: str, names: Sequence[str]) -> None:
        """Add files of a folder, in their order."""
        prefix = os.path.join(folder, "") if folder else ""  # noqa: PTH118  as a text
        number = self._prefixes.setdefault(prefix, len(self._prefixes))
        joined = "".join(names)
        # Nearly all names are ASCII, and then as many bytes as letters.
        sizes: Iterable[int] = map(len, names)
        if not joined.isascii():
            sizes = [len(os.fsencode(name)) for name in names]
        self._names += os.fsencode(joined)
        self._sizes.append(np.fromiter(sizes, np.int64, len(names)))
        self._folders.append(np.full(len(names), number, np.int32))

    def build(self) -> PathArray:
        """Return the paths."""
        sizes = np.concatenate([np.zeros(0, np.int64), *self._sizes])
        folders = np.concatenate([np.zeros(0, np.int32), *self._folders])
        names = np.frombuffer(bytes(self._names), dtype=np.uint8)
        return PathArray(names, np.cumsum(sizes), folders, list(self._prefixes))
