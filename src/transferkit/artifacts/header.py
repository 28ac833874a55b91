"""The header of a safetensors file, read with more suspicion than the library has.

A file may come from a stranger. Before anything else looks at it, its header has to be short, to
say one thing only, and to describe exactly the bytes that are there: no tensor can then claim
memory that the file does not have.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from transferkit.artifacts.strict_json import parse_strict

MAX_HEADER_BYTES = 16 * 2**20
"""The longest header that is read. It becomes Python objects, of up to 25 times its size."""

MAX_TENSORS = 100_000
MAX_DIMS = 16
MAX_NAME_LENGTH = 1000

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""The dtypes of safetensors whose elements are whole bytes, and how many."""

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_MAX_INT = 2**63 - 1


class HeaderError(ValueError):
    """A header that no honest writer makes; the message ends a sentence about the file."""


class TensorEntry(NamedTuple):
    """What the header says of a tensor.

    Args:
        dtype: The name in safetensors, such as "F32".
        shape: The sizes.
        start: Where its bytes begin, counted from the end of the header.
        end: Where they end.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


class Header(NamedTuple):
    """A header that has been checked.

    Args:
        metadata: Texts by name.
        tensors: What there is, by name.
        num_bytes: The length of the file.
    """

    metadata: dict[str, str]
    tensors: dict[str, TensorEntry]
    num_bytes: int


def read_header(file: BinaryIO) -> Header:
    """Read and check the header of an open file, and nothing beyond it.

    Args:
        file: Open for reading in binary mode, seekable.

    Returns:
        The header, which describes each byte of the file once.

    Raises:
        HeaderError: Something is wrong with it; nothing of the size that it claims is allocated.
        OSError: The file cannot be read.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(_LENGTH_BYTES)
    if len(start) < _LENGTH_BYTES:
        raise HeaderError(f"its {len(start)} bytes are too few for a header")
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(
            f"its header would have {length} bytes, at most {MAX_HEADER_BYTES} are read"
        )
    raw = file.read(length)
    if len(raw) < length:
        raise HeaderError(f"its header would have {length} bytes, {len(raw)} are there")
    content = _parse(raw)
    metadata = _check_metadata(content.pop(_METADATA, {}))
    if len(content) > MAX_TENSORS:
        raise HeaderError(f"it has {len(content)} tensors, at most {MAX_TENSORS} are read")
    tensors = {name: _check_entry(name, entry) for name, entry in content.items()}
    _check_layout(tensors, size - _LENGTH_BYTES - length)
    return Header(metadata, tensors, size)


def _parse(raw: bytes) -> dict[str, Any]:
    if raw[:1] != b"{":
        raise HeaderError(f"its header begins with {raw[:1]!r} in the place of an object")
    try:
        content: dict[str, Any] = parse_strict(raw.decode())
    except UnicodeDecodeError as error:
        raise HeaderError("its header is no UTF-8 text") from error
    except ValueError as error:
        raise HeaderError(f"its header is no plain JSON: {error}") from error
    return content


def _check_metadata(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, Mapping) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise HeaderError(f"its `{_METADATA}` should be texts by name, found {metadata!r:.80}")
    try:
        "".join(metadata.values()).encode()
    except UnicodeEncodeError as error:
        raise HeaderError(f"its `{_METADATA}` has halves of characters") from error
    return dict(metadata)


def _check_entry(name: str, entry: object) -> TensorEntry:
    _check_name(name)
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(
            f"the tensor `{name}` should have a dtype, a shape and offsets, found {entry!r:.80}"
        )
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise HeaderError(f"the tensor `{name}` has the unknown dtype {dtype!r:.80}")
    shape = _check_numbers(name, "shape", entry["shape"])
    # Sizes of 0 make a product of 0, of which nothing has to be there.
    num_bytes = math.prod(size for size in shape if size) * DTYPE_BYTES[dtype]
    if num_bytes > _MAX_INT:
        raise HeaderError(f"the tensor `{name}` has a shape beyond all memory, {list(shape)}")
    offsets = _check_numbers(name, "offsets", entry["data_offsets"])
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"the tensor `{name}` has the offsets {list(offsets)}")
    found = TensorEntry(dtype, shape, *offsets)
    if found.numel * DTYPE_BYTES[dtype] != found.end - found.start:
        raise HeaderError(
            f"the tensor `{name}` of the shape {list(shape)} and dtype {dtype} has "
            f"{found.end - found.start} bytes"
        )
    return found


def _check_name(name: str) -> None:
    """Refuse names that a careless program would take for a path, or a terminal for a command."""
    parts = name.replace("\\", "/").split("/")
    if (
        not name.isprintable()
        or not 0 < len(name) <= MAX_NAME_LENGTH
        or ".." in parts
        or (len(parts) > 1 and not parts[0])
    ):
        raise HeaderError(f"a tensor has the strange name {name!r:.80}")


def _check_numbers(name: str, what: str, found: object) -> tuple[int, ...]:
    if (
        not isinstance(found, list)
        or len(found) > MAX_DIMS
        or not all(type(each) is int and 0 <= each <= _MAX_INT for each in found)
    ):
        raise HeaderError(f"the tensor `{name}` has the {what} {found!r:.80}")
    return tuple(found)


def _check_layout(tensors: Mapping[str, TensorEntry], num_bytes: int) -> None:
    """Check that the tensors lie one after the other and fill the file."""
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            trouble = "overlaps with another" if entry.start < end else "leaves a gap before it"
            raise HeaderError(f"the tensor `{name}` {trouble}")
        end = entry.end
    if end != num_bytes:
        raise HeaderError(f"its tensors have {end} bytes, {num_bytes} are there")


def describe_start(path: Path) -> str:
    """Say what a file is that cannot be read as safetensors, by its first bytes."""
    with path.open("rb") as handle:
        start = handle.read(2)
    if start == b"PK" or start[:1] == b"\x80":
        return "it is a pickle or PyTorch file, which could run code and is never opened"
    return "it is no safetensors file, or is truncated or damaged"
