"""From bytes to pixels: the one place where this happens, in training and in prediction."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from transferkit.errors import ImageError

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8] | Tensor"
)
"""Whatever a picture may come as: path, bytes, PIL image, array (H, W, 3), tensor (3, H, W)."""

SUPPORTED_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""The formats that are read, by content. No other Pillow plug-in is ever reached."""

BACKGROUND = (255, 255, 255)
"""The colour (white) that transparent pixels are laid on."""


def decode_image(source: ImageSource) -> Tensor:
    """Read one picture as upright RGB pixels.

    The content decides about the format, not the file name. The EXIF orientation is
    applied, transparency is laid on white, 16-bit grey is scaled to 8 bits, and of an
    animation the first frame is taken.

    Args:
        source: Path, bytes of a file, PIL image, array `(H, W, 3)` or tensor `(3, H, W)`,
            the last two uint8 in [0, 255] and RGB. The source is never changed.

    Returns:
        Tensor uint8 `(3, H, W)`, RGB in [0, 255], contiguous, not sharing memory with
        an array or a PIL image; a tensor is returned as it is.

    Raises:
        ImageError: There is no such file, or it is no picture, truncated, damaged, of an
            unsupported format or mode; or an array or tensor has another shape or dtype.

    Example:
        >>> from PIL import Image
        >>> decode_image(Image.new("RGB", (4, 3), "red"))[:, 0, 0]
        tensor([255,   0,   0], dtype=torch.uint8)
    """
    if isinstance(source, Tensor):
        return _check_tensor(source)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _guarded(lambda: _from_pil(source, "PIL image"), "PIL image")
    if isinstance(source, bytes):
        return _from_file(io.BytesIO(source), f"{len(source)} bytes")
    if isinstance(source, (str, os.PathLike)):
        return _from_path(Path(source))
    raise ImageError(
        f"A picture should be a path, bytes, a PIL image, an array (H, W, 3) or a tensor "
        f"(3, H, W), found {type(source).__name__}."
    )


def _check_tensor(image: Tensor) -> Tensor:
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ImageError(
            f"A picture given as a tensor should be uint8 (3, H, W) in [0, 255], "
            f"found {_dtype_name(image)} {tuple(image.shape)}."
        )
    return image


def _from_array(image: npt.NDArray[Any]) -> Tensor:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ImageError(
            f"A picture given as an array should be uint8 (H, W, 3) in [0, 255], "
            f"found {image.dtype} {image.shape}."
        )
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def _dtype_name(image: Tensor) -> str:
    return str(image.dtype).removeprefix("torch.")


def _from_path(path: Path) -> Tensor:
    try:
        # Opened here rather than by Pillow, so that a missing file and a bad one differ.
        with path.open("rb") as file:
            return _from_file(file, str(path))
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have.
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"Cannot read the picture `{path}`: {reason.lower()}.") from error


def _from_file(file: Any, name: str) -> Tensor:
    def read() -> Tensor:
        with Image.open(file, formats=SUPPORTED_FORMATS) as image:
            return _from_pil(image, name)

    return _guarded(read, name)


def _guarded(read: Callable[[], Tensor], name: str) -> Tensor:
    """Turn whatever Pillow raises into an ImageError that names the picture."""
    try:
        return read()
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"Cannot read the picture `{name}`: it has too many pixels to be opened safely "
            f"({error})."
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"Cannot read the picture `{name}`: it is not a {', '.join(SUPPORTED_FORMATS[:-1])} "
            f"or {SUPPORTED_FORMATS[-1]} file, whatever its name says."
        ) from error
    except Exception as error:  # Pillow's plug-ins raise nearly every class on damaged bytes.
        raise ImageError(
            f"Cannot read the picture `{name}`: the file is damaged or truncated ({error}). "
            f"Replace or remove it."
        ) from error


def _from_pil(image: Image.Image, name: str) -> Tensor:
    if 0 in image.size:
        raise ImageError(f"Cannot read the picture `{name}`: it has no pixels, {image.size}.")
    image = ImageOps.exif_transpose(image)
    pixels = np.array(_to_rgb(image, name))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey to 255 on conversion; the high byte is what is meant.
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(
            f"Cannot read the picture `{name}`: its pixels are of Pillow's mode "
            f"`{image.mode}`, whose value range is not known. Convert it to 8 or 16 bits."
        )
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (*BACKGROUND, 255))
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")
