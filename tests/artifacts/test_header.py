from __future__ import annotations

import io
import json
import re
import tracemalloc
from typing import Any

import pytest
import safetensors.torch
import torch

from transferkit.artifacts.header import (
    DTYPE_BYTES,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    HeaderError,
    TensorEntry,
    read_header,
)

TWO = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def content(header: object, data: bytes = bytes(8)) -> bytes:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def check_refused(file: bytes, message: str) -> None:
    with pytest.raises(HeaderError, match=f"^{re.escape(message)}$"):
        read_header(io.BytesIO(file))


def test_header_as_the_library_writes_it() -> None:
    tensors = {
        "a.b": torch.ones(2, 3), "c": torch.tensor(True), "d": torch.zeros(0, 5),
        "e": torch.ones(3, dtype=torch.bfloat16), "f": torch.ones(3, dtype=torch.int64),
    }  # fmt: skip
    raw = safetensors.torch.save(tensors, metadata={"key": "ä\n"})
    header = read_header(io.BytesIO(raw))
    assert header.metadata == {"key": "ä\n"}
    assert header.num_bytes == len(raw)
    assert {name: each.shape for name, each in header.tensors.items()} == {
        name: tuple(each.shape) for name, each in tensors.items()
    }
    assert header.tensors["a.b"].numel == 6
    assert header.tensors["e"].dtype == "BF16"


def test_no_tensor_and_no_metadata() -> None:
    assert read_header(io.BytesIO(content({}, b""))) == ({}, {}, 10)


def test_every_dtype_of_the_library_that_is_read_has_its_width() -> None:
    made = [
        torch.zeros(1, dtype=dtype)
        for dtype in (
            torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2,
            torch.uint16, torch.int16, torch.float16, torch.bfloat16, torch.uint32, torch.int32,
            torch.float32, torch.uint64, torch.int64, torch.float64, torch.complex64,
        )
    ]  # fmt: skip
    known = set(safetensors.torch._SIZE)  # Which grows from version to version.
    made = [each for each in made if each.dtype in known]
    raw = safetensors.torch.save({str(number): each for number, each in enumerate(made)})
    found = read_header(io.BytesIO(raw)).tensors
    assert len(found) == len(made)
    names = {each.dtype for each in found.values()}
    oldest = {"U16", "U32", "U64", "C64"} if safetensors.__version__ == "0.5.0" else set()
    assert names == set(DTYPE_BYTES) - oldest


def entry(**changes: object) -> dict[str, Any]:
    return {"t": {**TWO, **changes}}


CASES = {
    "empty": (b"", "its 0 bytes are too few for a header"),
    "short": (b"\x01\0\0", "its 3 bytes are too few for a header"),
    "longer than the file": (
        (100).to_bytes(8, "little") + b"{}", "its header would have 100 bytes, 2 are there"
    ),
    "longer than the limit": (
        (2**63).to_bytes(8, "little") + b"{}",
        f"its header would have {2**63} bytes, at most {MAX_HEADER_BYTES} are read",
    ),
    "no object": (content("[]"), "its header begins with b'[' in the place of an object"),
    "no length": (content(""), "its header begins with b'' in the place of an object"),
    "no UTF-8": (
        (3).to_bytes(8, "little") + b'{"\xff', "its header is no UTF-8 text",
    ),
    "no JSON": (
        content("{]"),
        "its header is no plain JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)",
    ),
    "two keys": (
        content('{"t": {"dtype": "F32"}, "t": {}}'),
        "its header is no plain JSON: the key 't' is there twice",
    ),
    "two inner keys": (
        content('{"t": {"dtype": "F32", "dtype": "F32"}}'),
        "its header is no plain JSON: the key 'dtype' is there twice",
    ),
    "two keys of metadata": (
        content('{"__metadata__": {"a": "1", "a": "2"}}'),
        "its header is no plain JSON: the key 'a' is there twice",
    ),
    "NaN": (
        content('{"t": NaN}'), "its header is no plain JSON: NaN is no number of JSON"
    ),
    "infinite": (
        content('{"t": -Infinity}'),
        "its header is no plain JSON: -Infinity is no number of JSON",
    ),
    "too large for a float": (
        content('{"t": 1e999}'), "its header is no plain JSON: the number 1e999 is too large"
    ),
    "too deep for Python": (
        content('{"t": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        "its header is no plain JSON: it is nested deeper than 64 levels",
    ),
    "too deep": (
        content('{"t": ' + "[" * 70 + "]" * 70 + "}"),
        "its header is no plain JSON: it is nested deeper than 64 levels",
    ),
    "metadata of numbers": (
        content({"__metadata__": {"a": 1}}, b""),
        "its `__metadata__` should be texts by name, found {'a': 1}",
    ),
    "metadata of a list": (
        content({"__metadata__": ["a"]}, b""),
        "its `__metadata__` should be texts by name, found ['a']",
    ),
    "metadata with a surrogate": (
        content('{"__metadata__": {"a": "\\ud800"}}', b""),
        "its `__metadata__` has halves of characters",
    ),
    "no tensor": (
        content({"t": 3}), "the tensor `t` should have a dtype, a shape and offsets, found 3"
    ),
    "more than a tensor": (
        content({"t": {"a": 3}}),
        "the tensor `t` should have a dtype, a shape and offsets, found {'a': 3}",
    ),
    "unknown dtype": (content(entry(dtype="F4")), "the tensor `t` has the unknown dtype 'F4'"),
    "dtype that is no text": (content(entry(dtype=[])), "the tensor `t` has the unknown dtype []"),
    "shape that is no list": (content(entry(shape="2")), "the tensor `t` has the shape '2'"),
    "negative shape": (content(entry(shape=[-2])), "the tensor `t` has the shape [-2]"),
    "float shape": (content(entry(shape=[2.0])), "the tensor `t` has the shape [2.0]"),
    "true shape": (content(entry(shape=[2, True])), "the tensor `t` has the shape [2, True]"),
    "many dimensions": (
        content(entry(shape=[1] * 17)),
        "the tensor `t` has the shape [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]",
    ),
    "shape that overflows": (
        content(entry(shape=[2**62, 2**62])),
        f"the tensor `t` has a shape beyond all memory, [{2**62}, {2**62}]",
    ),
    "empty shape that overflows": (
        content(entry(shape=[0, 2**62, 4], data_offsets=[0, 0]), b""),
        f"the tensor `t` has a shape beyond all memory, [0, {2**62}, 4]",
    ),
    "shape that wraps around to what is there": (
        content(entry(shape=[2**62 + 2])),
        f"the tensor `t` has a shape beyond all memory, [{2**62 + 2}]",
    ),
    "gigantic shape": (
        content(entry(shape=[10**12])),
        "the tensor `t` of the shape [1000000000000] and dtype F32 has 8 bytes",
    ),
    "fewer bytes than the shape": (
        content(entry(data_offsets=[0, 4]), bytes(4)),
        "the tensor `t` of the shape [2] and dtype F32 has 4 bytes",
    ),
    "three offsets": (
        content(entry(data_offsets=[0, 8, 8])), "the tensor `t` has the offsets [0, 8, 8]"
    ),
    "negative offset": (
        content(entry(data_offsets=[-8, 0])), "the tensor `t` has the offsets [-8, 0]"
    ),
    "offsets backwards": (
        content(entry(data_offsets=[8, 0])), "the tensor `t` has the offsets [8, 0]"
    ),
    "offset beyond 64 bits": (
        content(entry(data_offsets=[0, 2**64])), f"the tensor `t` has the offsets [0, {2**64}]"
    ),
    "overlap": (
        content({"s": TWO, "t": {**TWO, "data_offsets": [4, 12]}}, bytes(12)),
        "the tensor `t` overlaps with another",
    ),
    "the same bytes": (content({"s": TWO, "t": TWO}), "the tensor `t` overlaps with another"),
    "gap": (
        content(entry(data_offsets=[4, 12]), bytes(12)), "the tensor `t` leaves a gap before it"
    ),
    "runs out": (content(entry(), bytes(7)), "its tensors have 8 bytes, 7 are there"),
    "more bytes": (content(entry(), bytes(9)), "its tensors have 8 bytes, 9 are there"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_headers_that_no_honest_writer_makes(case: str) -> None:
    file, message = CASES[case]
    check_refused(file, message)


@pytest.mark.parametrize(
    "name",
    ["", "../a", "a/../b", "..\\a", "/etc/passwd", "\\\\host\\share", "a\nb", "a\0", "\x1b[2J",
     "\u202ea", "\ud800", "n" * 1001],
)  # fmt: skip
def test_strange_names(name: str) -> None:
    check_refused(content({name: TWO}), f"a tensor has the strange name {name!r:.80}")


def test_too_many_tensors() -> None:
    empty = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ",".join(f'"{number}":{empty}' for number in range(MAX_TENSORS + 1))
    check_refused(
        content("{" + text + "}", b""),
        f"it has {MAX_TENSORS + 1} tensors, at most {MAX_TENSORS} are read",
    )


@pytest.mark.parametrize(
    "case", ["longer than the limit", "gigantic shape", "shape that overflows", "runs out"]
)
def test_nothing_is_allocated_for_what_a_header_claims(case: str) -> None:
    file, message = CASES[case]
    tracemalloc.start()
    try:
        check_refused(file, message)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_long_number_in_place_of_a_length_takes_no_time() -> None:
    file = content('{"t": ' + "9" * 5000 + "}")
    with pytest.raises(HeaderError, match=r"^its header is no plain JSON: Exceeds the limit"):
        read_header(io.BytesIO(file))


def test_entry_of_no_dimension() -> None:
    assert TensorEntry("F32", (), 0, 4).numel == 1
