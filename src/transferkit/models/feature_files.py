"""Features as a file for anybody: named arrays and texts, in `.npz` or `.safetensors`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from transferkit._checks import check_path
from transferkit._files import atomic_path
from transferkit.errors import ConfigError, DataError, OutputError

Texts: TypeAlias = "Mapping[str, Sequence[str]]"

SUFFIXES = (".npz", ".safetensors")
MAX_HEADER_BYTES = 100_000_000
"""Readers of safetensors refuse a longer header, which holds the texts."""

_JSON_KEY = "transferkit"


def check_features_path(path: str | os.PathLike[str]) -> Path:
    """Return the path of a file with features.

    Raises:
        ConfigError: Its suffix names no format that features are kept in.

    Example:
        >>> check_features_path("bees.npz").suffix
        '.npz'
    """
    file = check_path("path", path)
    if file.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"`path` should end in {' or '.join(SUFFIXES)}, the formats of features, found "
            f"`{file.name}`."
        )
    return file


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Tensor], texts: Texts) -> Path:
    """Write arrays and texts in the format that the suffix names, all or nothing.

    Args:
        path: Where to write.
        arrays: Tensors by name.
        texts: Lists of texts by name. They are arrays of text in `.npz`, and JSON in the
            metadata of `.safetensors`.

    Returns:
        The path.

    Raises:
        ConfigError: The suffix is none of the two.
        OutputError: The file cannot be written, or could not be read again.
    """
    file = check_features_path(path)
    plain = {name: value.detach().cpu().contiguous() for name, value in arrays.items()}
    write = _write_npz if file.suffix.lower() == ".npz" else _write_safetensors
    with atomic_path(file) as temporary:
        write(temporary, plain, texts)
    return file


def read_arrays(
    path: str | os.PathLike[str], arrays: Sequence[str], texts: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """Read what `write_arrays` wrote. Nothing in the file is executed, whatever it is.

    Args:
        path: The file.
        arrays: The names of the arrays.
        texts: The names of the texts.

    Returns:
        The tensors, on the CPU, and the texts.

    Raises:
        ConfigError: The suffix is none of the two.
        DataError: There is no such file, or it holds something else.
    """
    file = check_features_path(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise DataError(f"The file of features `{file}` {what}.")
    read = _read_npz if file.suffix.lower() == ".npz" else _read_safetensors
    try:
        return read(file, arrays, texts)
    except Exception as error:  # The readers raise many classes on damaged files.
        raise damaged(file, str(error).strip("'\"") or type(error).__name__) from error


def damaged(path: str | os.PathLike[str], reason: str) -> DataError:
    """Build the error for a file that does not hold features."""
    return DataError(
        f"`{Path(path)}` holds no features, or is damaged: {reason.rstrip('.')}. Expected a file "
        f"written by `Features.save`."
    )


def _write_npz(path: Path, arrays: Mapping[str, Tensor], texts: Texts) -> None:
    content: dict[str, Any] = {name: value.numpy() for name, value in arrays.items()}
    content.update({name: np.array(values, dtype=np.str_) for name, values in texts.items()})
    with path.open("wb") as file:  # Given a path, NumPy would put a suffix to it.
        np.savez(file, **content)


def _write_safetensors(path: Path, arrays: Mapping[str, Tensor], texts: Texts) -> None:
    text = json.dumps({name: list(values) for name, values in texts.items()})
    # JSON within JSON: its quotation marks are escaped once more.
    if len(json.dumps(text)) > MAX_HEADER_BYTES - 2**16:
        raise OutputError(
            f"The paths and names of these features are too long for a .safetensors file, whose "
            f"readers take {MAX_HEADER_BYTES:,} bytes of text at the most. Save them as .npz."
        )
    try:
        safetensors.torch.save_file(dict(arrays), path, metadata={_JSON_KEY: text})
    except safetensors.SafetensorError as error:  # Around the system's error, as of a full disk.
        raise OSError(str(error)) from error


def _read_npz(
    path: Path, arrays: Sequence[str], texts: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    # Given a path, NumPy would leave a damaged file open.
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        tensors = {name: torch.from_numpy(file[name]) for name in arrays}
        return tensors, {name: tuple(file[name].astype(np.str_).tolist()) for name in texts}


def _read_safetensors(
    path: Path, arrays: Sequence[str], texts: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    with safetensors.safe_open(path, framework="pt") as file:
        found = json.loads((file.metadata() or {}).get(_JSON_KEY, "{}"))
        tensors = {name: file.get_tensor(name) for name in arrays}
    return tensors, {name: tuple(str(each) for each in found[name]) for name in texts}
