"""The file format: tensors and JSON in one safetensors file, with a digest over both.

Artifacts and checkpoints are two kinds of such files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from transferkit._checks import check_path
from transferkit._files import atomic_path
from transferkit.errors import ArtifactError, ConfigError, TransferkitError

FORMAT_VERSION = 2
"""The newest version that is written. It and older ones are read, newer ones are refused."""


@dataclass(frozen=True)
class FileKind:
    """A kind of file: its name, and what its readers look for.

    Args:
        name: What messages call it, with its article: "an artifact".
        key: The key of the JSON text in the file's metadata; that of the digest begins with it.
        version: The newest format version that is written.
        error: What is raised where a file is not what it should be.
        writer: What writes such files, for the message about one of another kind.
    """

    name: str
    key: str
    version: int
    error: type[TransferkitError]
    writer: str

    @property
    def digest_key(self) -> str:
        """The key of the digest in the file's metadata."""
        return f"{self.key}_sha256"

    @property
    def noun(self) -> str:
        """The name without its article."""
        return self.name.partition(" ")[2]


ARTIFACT = FileKind("an artifact", "transferkit", FORMAT_VERSION, ArtifactError, "Trainer.save")


def write_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    data: Mapping[str, Any],
    kind: FileKind = ARTIFACT,
) -> Path:
    """Write tensors and JSON data as one file, all or nothing.

    Args:
        path: Where to write.
        tensors: Names to tensors, any device; they are not changed.
        data: Plain JSON data, with the `format_version` that its readers need, which is at
            most that of the kind.
        kind: The kind of file.

    Returns:
        The path.

    Raises:
        ConfigError: `data` is no JSON data.
        OutputError: The file cannot be written.
    """
    separate = _separate(tensors)
    try:
        text = json.dumps(data, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The metadata of {kind.name} should be JSON data: {error}.") from error
    metadata = {kind.key: text, kind.digest_key: _digest(separate, text)}
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(separate, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:
            # The library wraps the system's error, such as a full disk, in its own.
            raise OSError(str(error)) from error
    return Path(path)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, dense, and none in the memory of another."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        plain = value.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        # Two names for one memory (tied weights) are two tensors in the file.
        separate[name] = plain.clone() if place in seen else plain
        seen.add(place)
    return separate


def read_file(
    path: str | os.PathLike[str], kind: FileKind = ARTIFACT
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_file` wrote, and check that it is unchanged.

    Nothing in the file is executed, whatever it is.

    Args:
        path: The file.
        kind: The kind of file that it should be.

    Returns:
        The tensors on the CPU, and the JSON data.

    Raises:
        TransferkitError: Of the kind's own class: there is no such file, it is of another
            kind, is damaged, or was written by a newer version.
    """
    file = check_path("path", path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise kind.error(f"The {kind.noun} `{file}` {what}. Expected a .safetensors file.")
    try:
        with safetensors.safe_open(file, framework="pt") as reader:
            metadata = reader.metadata() or {}
            if kind.key not in metadata or kind.digest_key not in metadata:
                raise kind.error(
                    f"`{file}` is a safetensors file but no transferkit {kind.noun}: its metadata "
                    f"has no `{kind.key}`. Expected a file written by `{kind.writer}`."
                )
            data = _parse(metadata[kind.key], file, kind)
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    except kind.error:
        raise
    except Exception as error:  # The reader raises several classes on damaged headers.
        raise kind.error(
            f"Cannot read the {kind.noun} `{file}`: {_describe_damage(file)} ({error})."
        ) from error
    if _digest(tensors, metadata[kind.key]) != metadata[kind.digest_key]:
        raise kind.error(
            f"The {kind.noun} `{file}` is damaged: its content does not match its digest. "
            f"Copy it anew from where it came."
        )
    return tensors, data


def _parse(text: str, file: Path, kind: FileKind) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise kind.error(
            f"The {kind.noun} `{file}` is damaged: its metadata is no JSON ({error})."
        ) from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise kind.error(f"The {kind.noun} `{file}` is damaged: its format version is {version!r}.")
    if version > kind.version:
        raise kind.error(
            f"The {kind.noun} `{file}` has format version {version}; this transferkit reads up to "
            f"{kind.version}. Upgrade transferkit: pip install --upgrade transferkit"
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
