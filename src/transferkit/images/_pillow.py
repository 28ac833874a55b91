"""Decoding by Pillow, format by format, and what becomes of its modes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from transferkit.errors import ImageError
from transferkit.images._headers import ORIENTATION_TAG, read_orientation, without_exif

Pixels = npt.NDArray[np.uint8]

BACKGROUND = (255, 255, 255)
"""The colour (white) that transparent pixels are laid on."""

# The classes themselves rather than `Image.open`: no other plug-in, and no setting of
# Pillow's that another library may have changed, comes in.
_OPENERS: dict[str, Callable[[Any], Image.Image]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "BMP": BmpImageFile,
    "GIF": GifImageFile,
    "TIFF": TiffImageFile,
}
_TILE_TAGS = (322, 323)
_CONVERTED_MODES = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"})
_UNMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


class TooLargeError(Exception):
    """More pixels than allowed; the arguments are width and height."""


def decode_with_pillow(data: bytes, kind: str, *, name: str, max_pixels: int) -> tuple[Pixels, int]:
    """Decode the bytes of a file of a known format.

    Args:
        data: The bytes.
        kind: The format, one of the keys of Pillow's own names.
        name: What messages call the picture.
        max_pixels: The most pixels that are decoded.

    Returns:
        Pixels `(H, W, 3)` as stored, and the EXIF orientation.

    Raises:
        ImageError: The mode cannot be turned into RGB.
        TooLargeError: There are too many pixels.
        Exception: Whatever Pillow raises on damaged bytes.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ImageError(
            f"Cannot read the picture `{name}`: `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is switched "
            f"on in this program, so that Pillow would fill a damaged picture with grey. "
            f"Switch it off."
        )
    with _OPENERS[kind](io.BytesIO(without_exif(data) if kind == "JPEG" else data)) as image:
        check_size(*image.size, max_pixels)
        tags = getattr(image, "tag_v2", {})
        tile = [tags.get(tag, 1) for tag in _TILE_TAGS]
        if all(isinstance(side, int) for side in tile):
            check_size(tile[0], tile[1], max_pixels)
        image.load()
        check_size(*image.size, max_pixels)  # A GIF's frame may be larger than its screen.
        return to_rgb(image, name), _orientation_of(image)


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Stop before a picture of too many pixels is decoded."""
    if width * height > max_pixels:
        raise TooLargeError(width, height)


def _orientation_of(image: Image.Image) -> int:
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        value = tags.get(ORIENTATION_TAG)
        return value if isinstance(value, int) and 1 <= value <= 8 else 1
    exif = image.info.get("exif")
    profile = image.info.get("Raw profile type exif")
    if exif is None and isinstance(profile, str):  # ImageMagick's way with older PNG files.
        try:
            exif = bytes.fromhex("".join(profile.split("\n")[3:]))
        except ValueError:
            return 1
    return read_orientation(exif)


def to_rgb(image: Image.Image, name: str) -> Pixels:
    """Return the pixels `(H, W, 3)` of a loaded picture of any mode.

    Raises:
        ImageError: The mode's range of values is not known, or it cannot become RGB.
    """
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey to 255 on conversion; scaling is what is meant.
        values = np.asarray(image).astype(np.uint32)
        return _grey(_scale_16_bits(values))
    if image.mode == "F":
        return _grey(_scale_floats(np.asarray(image), name))
    if image.mode in _UNMULTIPLIED:
        image = image.convert(_UNMULTIPLIED[image.mode])
    if isinstance(image.info.get("transparency"), tuple) and max(image.info["transparency"]) > 255:
        raise ImageError(
            f"Cannot read the picture `{name}`: it has 16-bit colours of which one is transparent, "
            f"which 8 bits cannot tell from its neighbours. Convert it to 8 bits."
        )
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(ground, layer)
    elif image.mode not in _CONVERTED_MODES:
        raise ImageError(
            f"Cannot read the picture `{name}`: its pixels are of Pillow's mode "
            f"`{image.mode}`, whose value range is not known. Convert it to 8 or 16 bits."
        )
    return np.array(image.convert("RGB"))


def _scale_16_bits(values: npt.NDArray[Any]) -> Pixels:
    return ((values + 128) // 257).astype(np.uint8)


def _scale_floats(values: npt.NDArray[Any], name: str) -> Pixels:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= 1.0):  # So written, NaN is out of range too.
        raise ImageError(
            f"Cannot read the picture `{name}`: its float pixels should lie in [0, 1], black to "
            f"white, found {low:g} to {high:g}. Rescale it."
        )
    return np.rint(values * np.float32(255)).astype(np.uint8)


def _grey(values: Pixels) -> Pixels:
    return np.repeat(values[:, :, None], 3, axis=2)
