"""What the first bytes of a picture tell: its format, its size, its orientation."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

SUPPORTED_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""The formats that are read, by content. No other Pillow plug-in is ever reached."""

_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)
NUM_SIGNATURE_BYTES = 12
ORIENTATION_TAG = 0x0112


def sniff(start: bytes) -> str | None:
    """Return the format that a file's first 12 bytes tell; None if it is none of ours."""
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    for signature, name in _SIGNATURES:
        if start.startswith(signature):
            return name
    return None


@dataclass(frozen=True)
class Header:
    """What the header of a JPEG file tells.

    Args:
        width: Width in pixels, as stored.
        height: Height in pixels, as stored.
        is_plain: 8 bits for each of one (grey) or three (YCbCr) channels: what every
            decoder makes the same of.
        exif: The EXIF data without their prefix; None where there are none.
    """

    width: int
    height: int
    is_plain: bool
    exif: bytes | None = None


def read_jpeg_header(data: bytes) -> Header | None:
    """Return the header of a JPEG file; None where it is out of the ordinary."""
    exif: bytes | None = None
    adobe_transform = 1
    frame: tuple[int, int, bool] | None = None
    for marker, start, end in jpeg_segments(data):
        if marker == 0xE1 and exif is None and data[start : start + 6] == b"Exif\0\0":
            exif = data[start + 6 : end]
        elif marker == 0xEE and data[start : start + 5] == b"Adobe" and end - start >= 12:
            adobe_transform = data[start + 11]
        elif marker in _FRAME_MARKERS and end - start >= 6 and frame is None:
            precision, height, width, num_channels = struct.unpack_from(">BHHB", data, start)
            is_usual = marker in (0xC0, 0xC1, 0xC2) and data[start + 6 : end : 3][:3] != b"RGB"
            frame = width, height, is_usual and precision == 8 and num_channels in (1, 3)
    if frame is None:
        return None
    width, height, is_plain = frame
    return Header(width, height, is_plain and adobe_transform == 1, exif)


_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of what each segment before the pixels holds."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # A fill byte.
            position += 1
            continue
        if marker == 0xDA or 0xD0 <= marker <= 0xD9:
            return
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        end = position + 2 + length
        if length < 2 or end > len(data):
            return
        yield marker, position + 4, end
        position = end


def without_exif(data: bytes) -> bytes:
    """Return a JPEG file without its EXIF segments, whose damage is none of the pixels'."""
    parts, position = [], 0
    for marker, start, end in jpeg_segments(data):
        if marker == 0xE1:
            parts.append(data[position : start - 4])
            position = end
    return b"".join([*parts, data[position:]]) if parts else data


def read_orientation(exif: bytes | None) -> int:
    """Return the orientation, 1 to 8, that EXIF data tell; 1 where they are malformed.

    References:
        CIPA DC-008, Exchangeable image file format, section 4.6.5: tag 0x0112.
    """
    if exif is None:
        return 1
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (first,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, first)
        for entry in range(count):
            place = first + 2 + 12 * entry
            tag, kind, number = struct.unpack_from(f"{order}HHI", exif, place)
            if tag == ORIENTATION_TAG:
                (value,) = struct.unpack_from(f"{order}H", exif, place + 8)
                return value if kind == 3 and number == 1 and 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1
