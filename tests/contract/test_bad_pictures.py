"""Everything that a picture can be instead of one, and what is said about it."""

from __future__ import annotations

import io
import os
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageFile

from transferkit.data import load_folders
from transferkit.errors import ImageError
from transferkit.images import Decoder, decode_image
from transferkit.testing import make_image_folder

DAMAGED = "the file is damaged or truncated. Replace or remove it."
NO_PICTURE = "it is not a JPEG, PNG, WEBP, BMP, GIF or TIFF file, whatever its name says."
both_decoders = pytest.mark.parametrize("decoder", ["torchvision", "pillow"])


def noise(height: int = 40, width: int = 60) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(width: int, height: int, *more: bytes, pixels: bytes = b"") -> bytes:
    """Return a PNG file that says it has so many pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + body + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


def gif(width: int, height: int) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame + b";"


def tiff(**tags: int) -> bytes:
    """Return a TIFF file of one strip with these tags, by name."""
    numbers = {"width": 256, "height": 257, "compression": 259, "tile_width": 322}
    numbers |= {"tile_height": 323, "tile_offset": 324, "tile_bytes": 325}
    values = {258: 8, 262: 1, 273: 8, 277: 1, 278: 2**31, 279: 10}
    values |= {numbers[name]: value for name, value in tags.items()}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, values[tag]) for tag in sorted(values))
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + bytes(4)


def jpeg(width: int, height: int) -> bytes:
    """Return a JPEG file that says it has so many pixels."""
    data = bytearray(encode(noise(), "JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp(width: int, height: int) -> bytes:
    """Return a lossless WebP file that says it has so many pixels."""
    data = bytearray(encode(noise(), "WEBP", lossless=True))
    place = data.index(b"VP8L") + 9
    sides = struct.unpack_from("<I", data, place)[0] & ~(2**28 - 1) | (height - 1) << 14 | width - 1
    struct.pack_into("<I", data, place, sides)
    return bytes(data)


def half(kind: str) -> bytes:
    data = encode(noise(), kind)
    return data[: len(data) // 2]


def flipped_png() -> bytes:
    data = bytearray(encode(noise(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty."),
    "text": (b"This is a text.\n" * 100, NO_PICTURE),
    "html": (b"<!DOCTYPE html><html>not found</html>", NO_PICTURE),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", NO_PICTURE),
    "pdf": (encode(noise(), "PDF"), NO_PICTURE),
    "eps": (encode(noise(), "EPS"), NO_PICTURE),
    "ico": (encode(noise(), "ICO"), NO_PICTURE),
    "psd": (b"8BPS\0\1" + bytes(100), NO_PICTURE),
    "fits": (b"SIMPLE  =                    T" + bytes(100), NO_PICTURE),
    "pickle": (b"\x80\x04\x95" + bytes(100), NO_PICTURE),
    "signature alone": (b"\xff\xd8\xff", DAMAGED),
    "half a JPEG": (half("JPEG"), DAMAGED),
    "half a PNG": (half("PNG"), DAMAGED),
    "half a WebP": (half("WEBP"), DAMAGED),
    "half a BMP": (half("BMP"), DAMAGED),
    "half a GIF": (half("GIF"), DAMAGED),
    "half a TIFF": (half("TIFF"), DAMAGED),
    "PNG with a flipped byte": (flipped_png(), DAMAGED),
    "PNG without pixels": (png(30, 20), DAMAGED),
    "PNG of no size": (png(0, 0), DAMAGED),
    "TIFF of 32-bit integers": (
        encode(Image.new("I", (3, 3)), "TIFF"),
        "its pixels are of Pillow's mode `I`, whose value range is not known. "
        "Convert it to 8 or 16 bits.",
    ),
    "TIFF of a colour space without RGB": (
        encode(Image.new("LAB", (3, 3)), "TIFF"),
        "its pixels are of Pillow's mode `LAB`, whose value range is not known. "
        "Convert it to 8 or 16 bits.",
    ),
    "TIFF of large floats": (
        encode(Image.fromarray(np.array([[-3.0, 250.5]], dtype=np.float32)), "TIFF"),
        "its float pixels should lie in [0, 1], black to white, found -3 to 250.5. Rescale it.",
    ),
    "TIFF of no numbers": (
        encode(Image.fromarray(np.array([[0.0, np.nan]], dtype=np.float32)), "TIFF"),
        "its float pixels should lie in [0, 1], black to white, found nan to nan. Rescale it.",
    ),
}


@pytest.mark.parametrize("case", FILES)
@both_decoders
def test_file_that_cannot_be_read(tmp_path: Path, case: str, decoder: Decoder) -> None:
    content, reason = FILES[case]
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError) as error:
        decode_image(path, decoder=decoder)
    assert str(error.value) == f"Cannot read the picture `{path}`: {reason}"
    assert path.read_bytes() == content


# Places


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # Such names must be short.


NO_FILE = "it is a pipe, socket or device, no file."
PLACES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "no such file or directory."),
    "folder": (lambda path: path.mkdir(), "is a directory."),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "no such file or directory."),
    "loop of links": (
        lambda path: path.symlink_to(path),
        "too many levels of symbolic links.",
    ),
    "pipe": (make_fifo, NO_FILE),
    "device": (lambda path: path.symlink_to("/dev/zero"), NO_FILE),
}


@pytest.mark.parametrize("case", PLACES)
def test_place_that_cannot_be_read(tmp_path: Path, case: str) -> None:
    path = tmp_path / "picture.jpg"
    make, reason = PLACES[case]
    make(path)
    with pytest.raises(ImageError) as error:
        decode_image(path)
    assert str(error.value) == f"Cannot read the picture `{path}`: {reason}"


def test_socket_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_socket(Path("s"))
    with pytest.raises(ImageError) as error:
        decode_image("s")
    assert str(error.value) == f"Cannot read the picture `s`: {NO_FILE}"


def test_file_without_the_right_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(encode(noise(), "PNG"))

    def refuse(path: str, flags: int) -> int:  # The tests may run as root, who may read all.
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("transferkit.images.decode.os.open", refuse)
    with pytest.raises(ImageError) as error:
        decode_image(path)
    assert str(error.value) == f"Cannot read the picture `{path}`: permission denied."


def test_name_that_no_file_can_have() -> None:
    with pytest.raises(ImageError) as error:
        decode_image("ant\0.jpg")
    assert str(error.value) == "Cannot read the picture `ant\0.jpg`: embedded null byte."


def test_file_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(encode(noise(), "PNG"))
    monkeypatch.setattr("transferkit.images.decode.MAX_FILE_BYTES", 100)
    with pytest.raises(ImageError) as error:
        decode_image(path)
    assert str(error.value) == (
        f"Cannot read the picture `{path}`: the file is larger than 100 bytes."
    )


def test_text_file_object() -> None:
    with pytest.raises(ImageError) as error:
        decode_image(io.StringIO("text"))  # type: ignore[arg-type]
    assert str(error.value) == (
        'Cannot read the picture `StringIO`: the file should be open in binary mode ("rb").'
    )


class _Failing(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        raise OSError("the wire was cut")


def test_file_object_that_fails() -> None:
    with pytest.raises(ImageError) as error:
        decode_image(_Failing())  # type: ignore[arg-type]
    assert str(error.value) == "Cannot read the picture `_Failing`: the wire was cut."


# Bombs


def no_pixels(width: int, height: int, limit: int = 100_000_000) -> str:
    return (
        f"it has {width} x {height} pixels, more than `max_pixels`, {limit}. "
        f"Make it smaller, or raise the limit if you trust it."
    )


BEYOND_PILLOW = (
    "it has more pixels than `PIL.Image.MAX_IMAGE_PIXELS` allows, %d. Raise that if you trust it."
)
WEBP_IS_LIMITED = int(PIL.__version__.partition(".")[0]) >= 13
"""Pillow's reader of WebP asks for Pillow's limit."""
BOMBS = {
    "PNG": png(50_000, 50_000),
    "JPEG": jpeg(65_000, 65_000),
    "BMP": bmp(50_000, 50_000),
    "GIF": gif(60_000, 60_000),
    "TIFF": tiff(width=50_000, height=50_000),
    "TIFF compressed": tiff(width=50_000, height=50_000, compression=8),
    "WEBP": webp(16_000, 16_000),
}


@pytest.mark.parametrize("case", BOMBS)
@both_decoders
def test_bomb_is_refused_by_its_header(case: str, decoder: Decoder) -> None:
    data = BOMBS[case]
    side = {"JPEG": 65_000, "GIF": 60_000}.get(case, 50_000)
    if case == "WEBP":
        reason = BEYOND_PILLOW % 178956970 if WEBP_IS_LIMITED else no_pixels(16_000, 16_000)
    else:
        reason = no_pixels(side, side)
    with pytest.raises(ImageError) as error:
        decode_image(data, decoder=decoder)
    assert str(error.value) == f"Cannot read the picture `{len(data)} bytes`: {reason}"


def test_huge_tile_is_refused() -> None:
    data = tiff(
        width=10, height=10, tile_width=2**20, tile_height=2**20, tile_offset=8, tile_bytes=9
    )
    with pytest.raises(ImageError) as error:
        decode_image(data)
    assert str(error.value) == (
        f"Cannot read the picture `{len(data)} bytes`: {no_pixels(2**20, 2**20)}"
    )


@both_decoders
def test_limit_is_the_callers(decoder: Decoder) -> None:
    data = encode(noise(), "PNG")
    assert decode_image(data, decoder=decoder, max_pixels=2400).shape == (3, 40, 60)
    with pytest.raises(ImageError) as error:
        decode_image(data, decoder=decoder, max_pixels=2399)
    assert str(error.value) == (
        f"Cannot read the picture `{len(data)} bytes`: {no_pixels(60, 40, 2399)}"
    )
    with pytest.raises(ImageError) as error:
        decode_image(noise(), max_pixels=2399)
    assert str(error.value) == f"Cannot read the picture `PIL image`: {no_pixels(60, 40, 2399)}"


ZEROS = zlib.compress(bytes(2**28), 9)
TEXT_BOMBS = {
    "profile": chunk(b"iCCP", b"icc\0\0" + ZEROS),
    "text": chunk(b"zTXt", b"Comment\0\0" + ZEROS) * 4,
    "international text": chunk(b"iTXt", b"Comment\0\1\0\0\0" + ZEROS) * 4,
}
MEMORY_LIMIT = 3 * 2**30
_CHILD = f"""
import resource, sys
from pathlib import Path
from transferkit.errors import ImageError
from transferkit.images import decode_image
resource.setrlimit(resource.RLIMIT_DATA, ({MEMORY_LIMIT}, {MEMORY_LIMIT}))

def peak_kib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])

pictures = [bytes.fromhex(line) for line in sys.stdin]
before = peak_kib()
for data in pictures:
    for decoder in ("torchvision", "pillow"):
        try:
            print(tuple(decode_image(data, decoder=decoder).shape))
        except ImageError as error:
            print(error)
print((peak_kib() - before) // 1024 < 128)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted as Linux counts it")
def test_bombs_in_texts_take_little_memory() -> None:
    pixels = b"".join(b"\0" + bytes(30) for _ in range(10))
    pictures = [png(10, 10, bomb, pixels=pixels) for bomb in TEXT_BOMBS.values()]
    lines = "".join(f"{data.hex()}\n" for data in pictures)
    child = subprocess.run(
        [sys.executable, "-c", _CHILD], input=lines, capture_output=True, text=True
    )
    *answers, is_small = child.stdout.splitlines()
    assert len(answers) == 2 * len(pictures), child.stderr
    for number, answer in enumerate(answers):
        data = pictures[number // 2]
        damaged = f"Cannot read the picture `{len(data)} bytes`: {DAMAGED}"
        assert answer in ("(3, 10, 10)", damaged)
    assert is_small == "True"


# What others may have set


def test_grey_filling_that_somebody_switched_on_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encode(noise(), "BMP")
    with pytest.raises(ImageError) as error:
        decode_image(data)
    assert str(error.value) == (
        f"Cannot read the picture `{len(data)} bytes`: `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is "
        f"switched on in this program, so that Pillow would fill a damaged picture with grey. "
        f"Switch it off."
    )


def test_pixel_limit_of_pillow_neither_matters_nor_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    limited = {"TIFF", "WEBP"} if WEBP_IS_LIMITED else {"TIFF"}
    for kind in {"PNG", "BMP", "JPEG", "TIFF", "WEBP"} - limited:
        assert decode_image(encode(noise(), kind)).shape == (3, 40, 60)
    for kind in limited:  # Pillow's readers of these ask for it themselves.
        data = encode(noise(), kind)
        with pytest.raises(ImageError) as error:
            decode_image(data)
        assert str(error.value) == (
            f"Cannot read the picture `{len(data)} bytes`: {BEYOND_PILLOW % 20}"
        )
    assert Image.MAX_IMAGE_PIXELS == 10


def test_a_pillow_without_room_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("transferkit.images.decode.decode_with_pillow", fail)
    data = encode(noise(), "BMP")
    with pytest.raises(ImageError) as error:
        decode_image(data)
    assert str(error.value) == (
        f"Cannot read the picture `{len(data)} bytes`: there is not enough memory to decode it."
    )


# EXIF

ORIENTATION = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01%c\0\x01\0\0\0%c\0\0\0\0\0\0\0"
BROKEN_EXIF = {
    "garbage": b"Exif\0\0garbage",
    "nothing": b"Exif\0\0",
    "no such order": b"Exif\0\0XX*\0\x08\0\0\0",
    "far away": b"Exif\0\0II*\0\xff\xff\xff\xff",
    "too many": b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
    "orientation 9": ORIENTATION % (3, 9),
    "orientation as text": ORIENTATION % (2, 6),
}


@pytest.mark.parametrize("case", BROKEN_EXIF)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@both_decoders
def test_malformed_exif_is_ignored(case: str, kind: str, decoder: Decoder) -> None:
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    plain = decode_image(encode(noise(), kind, **options), decoder=decoder)
    data = encode(noise(), kind, exif=BROKEN_EXIF[case], **options)
    assert torch.equal(decode_image(data, decoder=decoder), plain)


@pytest.mark.parametrize("profile", ["no hex", "\nexif\n 8\nzzzz", "\nexif\n 4\n45786966"])
def test_malformed_exif_in_a_text_is_ignored(profile: str) -> None:
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_text("Raw profile type exif", profile)
    data = encode(noise(), "PNG", pnginfo=texts)
    assert decode_image(data, decoder="pillow").shape == (3, 40, 60)


# In a data set


def test_broken_picture_in_a_data_set_is_named(tmp_path: Path) -> None:
    data = load_folders(make_image_folder(tmp_path))
    path = data.train.paths[3]
    path.write_bytes(half("JPEG"))
    with pytest.raises(ImageError) as error:
        data.train[3]
    assert str(error.value) == f"Cannot read the picture `{path}`: {DAMAGED}"
