"""The file format: tensors and JSON in one safetensors file, with a digest over both."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from transferkit._checks import check_path
from transferkit._files import atomic_path
from transferkit.errors import ArtifactError, ConfigError

FORMAT_VERSION = 2
"""The newest version that is written. It and older ones are read, newer ones are refused."""

_JSON_KEY = "transferkit"
_DIGEST_KEY = "transferkit_sha256"


def write_file(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], data: Mapping[str, Any]
) -> Path:
    """Write tensors and JSON data as one file, all or nothing.

    Args:
        path: Where to write.
        tensors: Names to tensors, any device; they are not changed.
        data: Plain JSON data, with the `format_version` that its readers need, which is at
            most `FORMAT_VERSION`.

    Returns:
        The path.

    Raises:
        ConfigError: `data` is no JSON data.
        OutputError: The file cannot be written.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # Two names for one memory (tied weights) are two tensors in the file.
    separate = {name: value.clone() for name, value in plain.items()}
    try:
        text = json.dumps(data, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The metadata of an artifact should be JSON data: {error}.") from error
    metadata = {_JSON_KEY: text, _DIGEST_KEY: _digest(separate, text)}
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(separate, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:
            # The library wraps the system's error, such as a full disk, in its own.
            raise OSError(str(error)) from error
    return Path(path)


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_file` wrote, and check that it is unchanged.

    Nothing in the file is executed, whatever it is.

    Args:
        path: The file.

    Returns:
        The tensors on the CPU, and the JSON data.

    Raises:
        ArtifactError: There is no such file, it is no artifact, is damaged, or was written
            by a newer version.
    """
    file = check_path("path", path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise ArtifactError(f"The artifact `{file}` {what}. Expected a .safetensors file.")
    try:
        with safetensors.safe_open(file, framework="pt") as reader:
            metadata = reader.metadata() or {}
            if _JSON_KEY not in metadata or _DIGEST_KEY not in metadata:
                raise ArtifactError(
                    f"`{file}` is a safetensors file but no transferkit artifact: its metadata "
                    f"has no `{_JSON_KEY}`. Expected a file written by `Trainer.save`."
                )
            data = _parse(metadata[_JSON_KEY], file)
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    except ArtifactError:
        raise
    except Exception as error:  # The reader raises several classes on damaged headers.
        raise ArtifactError(
            f"Cannot read the artifact `{file}`: {_describe_damage(file)} ({error})."
        ) from error
    if _digest(tensors, metadata[_JSON_KEY]) != metadata[_DIGEST_KEY]:
        raise ArtifactError(
            f"The artifact `{file}` is damaged: its content does not match its digest. "
            f"Copy it anew from where it came."
        )
    return tensors, data


def _parse(text: str, file: Path) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ArtifactError(
            f"The artifact `{file}` is damaged: its metadata is no JSON ({error})."
        ) from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtifactError(f"The artifact `{file}` is damaged: its format version is {version!r}.")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"The artifact `{file}` has format version {version}; this transferkit reads up to "
            f"{FORMAT_VERSION}. Upgrade transferkit: pip install --upgrade transferkit"
        )
    result: dict[str, Any] = data
    return result


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return the SHA-256 over the JSON text and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\0{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        # A flat view as bytes; a scalar has no last dimension to reinterpret.
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _describe_damage(file: Path) -> str:
    with file.open("rb") as handle:
        start = handle.read(2)
    if start == b"PK" or start[:1] == b"\x80":
        return "it is a pickle or PyTorch file, which could run code and is never opened"
    return "it is no safetensors file, or is truncated or damaged"
