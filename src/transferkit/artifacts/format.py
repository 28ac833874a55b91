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
from transferkit.artifacts.header import Header, HeaderError, describe_start, read_header
from transferkit.artifacts.strict_json import parse_strict
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
        ConfigError: `data` is no JSON data, or a tensor's name or the length of `data` is beyond
            what readers take.
        OutputError: The file cannot be written.
    """
    separate = _separate(tensors)
    try:
        text = json.dumps(data, allow_nan=False, sort_keys=True)
        parse_strict(text)  # Readers have limits that `json` has not.
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"The metadata of {kind.name} should be JSON data: {error}.") from error
    metadata = {kind.key: text, kind.digest_key: _digest(separate, text)}
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(separate, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:
            # The library wraps the system's error, such as a full disk, in its own.
            raise OSError(str(error)) from error
        _check_written(temporary, kind)
    return Path(path)


def _check_written(path: Path, kind: FileKind) -> None:
    """Refuse to write what would not be read: strange names, a history without end."""
    try:
        with path.open("rb") as handle:
            read_header(handle)
    except HeaderError as error:
        raise ConfigError(f"{kind.name.capitalize()} cannot be written so: {error}.") from error


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
    file, header, data = _open(path, kind)
    try:
        with safetensors.safe_open(file, framework="pt") as reader:
            tensors = {name: reader.get_tensor(name) for name in header.tensors}
    except Exception as error:  # The library has classes of its own, and the file may change.
        raise kind.error(f"Cannot read the {kind.noun} `{file}`: {error}.") from error
    _check_digest(tensors, header, file, kind)
    return tensors, data


def read_metadata(
    path: str | os.PathLike[str], kind: FileKind = ARTIFACT
) -> tuple[Header, dict[str, Any]]:
    """Read what a file says of its tensors, and its JSON data, but not the tensors.

    Whether the file is unchanged cannot be told so: the digest is over the tensors, too.

    Args:
        path: The file.
        kind: The kind of file that it should be.

    Returns:
        The header and the JSON data.

    Raises:
        TransferkitError: As for `read_file`.
    """
    _, header, data = _open(path, kind)
    return header, data


def _open(path: str | os.PathLike[str], kind: FileKind) -> tuple[Path, Header, dict[str, Any]]:
    file = check_path("path", path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        if file.exists() and not file.is_dir():
            what = "is a pipe, socket or device, no file"
        raise kind.error(f"The {kind.noun} `{file}` {what}. Expected a .safetensors file.")
    try:
        with file.open("rb") as handle:
            header = read_header(handle)
    except HeaderError as error:
        raise kind.error(
            f"Cannot read the {kind.noun} `{file}`: {describe_start(file)} ({error})."
        ) from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise kind.error(f"Cannot read the {kind.noun} `{file}`: {reason}.") from error
    if kind.key not in header.metadata or kind.digest_key not in header.metadata:
        raise kind.error(
            f"`{file}` is a safetensors file but no transferkit {kind.noun}: its metadata "
            f"has no `{kind.key}`. Expected a file written by `{kind.writer}`."
        )
    return file, header, _parse(header.metadata[kind.key], file, kind)


def _parse(text: str, file: Path, kind: FileKind) -> dict[str, Any]:
    try:
        data = parse_strict(text)
    except ValueError as error:
        raise kind.error(
            f"The {kind.noun} `{file}` is damaged: its metadata is no JSON ({error})."
        ) from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise kind.error(
            f"The {kind.noun} `{file}` is damaged: its format version is {version!r:.80}."
        )
    if version > kind.version:
        raise kind.error(
            f"The {kind.noun} `{file}` has format version {version}; this transferkit reads up to "
            f"{kind.version}. Upgrade transferkit: pip install --upgrade transferkit"
        )
    result: dict[str, Any] = data
    return result


def _check_digest(
    tensors: Mapping[str, Tensor], header: Header, file: Path, kind: FileKind
) -> None:
    if _digest(tensors, header.metadata[kind.key]) != header.metadata[kind.digest_key]:
        raise kind.error(
            f"The {kind.noun} `{file}` is damaged: its content does not match its digest. "
            f"Copy it anew from where it came."
        )


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return the SHA-256 over the JSON text and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\0{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        # A flat view as bytes; a scalar has no last dimension to reinterpret.
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
