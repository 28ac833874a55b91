"""From bytes to pixels: the one place where this happens, in training and in prediction.

What becomes of the modes that pictures have: grey is repeated in the three channels;
16-bit grey is scaled to 8 bits, `(value + 128) // 257`, of 16-bit colour the high byte is
taken, at most one level away; floats, which TIFF files may hold, go from 0 (black)
to 1 (white); transparent pixels, in a palette too, are laid on white; CMYK and YCCK are
converted without a colour profile; of an animation or a multi-page file the first frame is
taken; 32-bit integers are refused, since nothing tells their range.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Any, BinaryIO, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
import torchvision.io  # noqa: F401  registers the kernels
from PIL import Image
from torch import Tensor

from transferkit._checks import check_integer
from transferkit.errors import ConfigError, ImageError
from transferkit.images._headers import (
    NUM_SIGNATURE_BYTES,
    SUPPORTED_FORMATS,
    read_jpeg_header,
    read_orientation,
    sniff,
)
from transferkit.images._pillow import TooLargeError, check_size, decode_with_pillow, to_rgb

_Encoded: TypeAlias = "bytes | bytearray | memoryview | BinaryIO"
ImageSource: TypeAlias = (
    "str | os.PathLike[str] | _Encoded | Image.Image | npt.NDArray[np.uint8] | Tensor"
)
"""Whatever a picture may come as: path, bytes of a file, an open binary file, PIL image,
array (H, W, 3), tensor (3, H, W)."""

Decoder: TypeAlias = Literal["torchvision", "pillow"]
"""What decodes plain JPEG files. Pillow decodes the rest in either case."""

MAX_PIXELS = 100_000_000
"""The most pixels of a picture that is decoded, unless the caller says otherwise."""

MAX_FILE_BYTES = 2**30
"""The largest file that is read: 100 million pixels need no gigabyte."""


def decode_image(
    source: ImageSource,
    *,
    decoder: Decoder = "torchvision",
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Read one picture as upright RGB pixels.

    The content decides about the format, not the file name. The EXIF orientation is
    applied, malformed EXIF data are ignored. May be called from several threads at a time.

    Args:
        source: Path, bytes of a file, binary file (read from where it stands), PIL image,
            array `(H, W, 3)` or tensor `(3, H, W)`, the last two uint8 in [0, 255] and RGB.
            The source is not changed.
        decoder: What decodes JPEG files in grey or YCbCr, which nearly all are:
            "torchvision", which is faster, or "pillow". Both call libjpeg-turbo with the same
            settings, so that the pixels are the same. A torchvision that has no decoder any
            more leaves these to Pillow, too.
        max_pixels: Larger pictures are refused before they are decoded.

    Returns:
        Tensor uint8 `(3, H, W)`, RGB in [0, 255], the channels usually last in memory, not
        sharing memory with an array or a PIL image; a tensor is returned as it is.

    Raises:
        ImageError: There is no such file, or it is no picture, truncated, damaged, too
            large, of an unsupported format or mode; or an array or tensor has another shape
            or dtype.
        ConfigError: `decoder` or `max_pixels` cannot work.

    Example:
        >>> from PIL import Image
        >>> decode_image(Image.new("RGB", (4, 3), "red"))[:, 0, 0]
        tensor([255,   0,   0], dtype=torch.uint8)
    """
    check_decoding(decoder, max_pixels)
    if isinstance(source, Tensor):
        return _check_tensor(source)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _guarded(lambda: _from_pil(source, max_pixels), "PIL image", max_pixels)
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        data = _read_path(name)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        name = f"{len(data)} bytes"
    elif hasattr(source, "read"):
        data, name = read_stream(source)
    else:
        raise ImageError(
            f"A picture should be a path, bytes, a binary file, a PIL image, an array (H, W, 3) "
            f"or a tensor (3, H, W), found {type(source).__name__}."
        )
    return _guarded(lambda: _from_bytes(data, name, decoder, max_pixels), name, max_pixels)


def check_decoding(decoder: Decoder, max_pixels: int) -> int:
    """Check how pictures are to be decoded, and return `max_pixels`.

    Raises:
        ConfigError: `decoder` or `max_pixels` cannot work.
    """
    if decoder not in get_args(Decoder):
        raise ConfigError(f'`decoder` should be "torchvision" or "pillow", found {decoder!r}.')
    return check_integer("max_pixels", max_pixels, minimum=1)


def _check_tensor(image: Tensor) -> Tensor:
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        hint = (
            " Leave out the transform that made floats of it; it is done here."
            if image.is_floating_point()
            else ""
        )
        raise ImageError(
            f"A picture given as a tensor should be uint8 (3, H, W) in [0, 255], "
            f"found {str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}.{hint}"
        )
    return image


def _from_array(image: npt.NDArray[Any]) -> Tensor:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ImageError(
            f"A picture given as an array should be uint8 (H, W, 3) in [0, 255], "
            f"found {image.dtype} {image.shape}."
        )
    return torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)


def _from_pil(image: Image.Image, max_pixels: int) -> Tensor:
    if 0 in image.size:
        raise ImageError(f"Cannot read the picture `PIL image`: it has no pixels, {image.size}.")
    check_size(*image.size, max_pixels)
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # Pillow's readers of EXIF data raise nearly every class.
        orientation = 1
    return _upright(torch.from_numpy(to_rgb(image, "PIL image")).permute(2, 0, 1), orientation)


def _read_path(path: str) -> bytes:
    """Read a file whose first bytes are a picture's."""
    try:
        # Opening a FIFO waits for a writer unless told not to. The system's own calls rather
        # than a file object: in several threads each step less counts.
        handle = os.open(path, os.O_RDONLY | _READ_FLAGS)
        try:
            status = os.fstat(handle)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(
                    f"Cannot read the picture `{path}`: it is a pipe, socket or device, no file."
                )
            if status.st_size > MAX_FILE_BYTES:
                raise _too_long(path)
            return _read_all(handle, status.st_size, path)
        finally:
            os.close(handle)
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have.
        if isinstance(error, ImageError):
            raise
        if getattr(error, "errno", None) == errno.ENXIO:  # What opening a socket gives.
            raise ImageError(
                f"Cannot read the picture `{path}`: it is a pipe, socket or device, no file."
            ) from error
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"Cannot read the picture `{path}`: {reason.lower()}.") from error


_READ_FLAGS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | os.O_CLOEXEC


def _read_all(handle: int, size: int, path: str) -> bytes:
    """Read an open file; of one that is no picture no more than its start."""
    data = os.read(handle, min(size, _FIRST_READ))
    _check_format(data[:NUM_SIGNATURE_BYTES], path)
    parts = [data]
    while parts[-1] and sum(map(len, parts)) < size:
        parts.append(os.read(handle, size - sum(map(len, parts))))
    return data if len(parts) == 1 else b"".join(parts)


_FIRST_READ = 2**20
"""Most pictures are read at once; a large file that is none is not read whole."""


def read_stream(file: BinaryIO) -> tuple[bytes, str]:
    """Return what is left in a binary file, and what messages call it.

    Raises:
        ImageError: It cannot be read, is too large or is no binary file.
    """
    name = str(getattr(file, "name", type(file).__name__))
    try:
        data = _read_rest(file, name)
    except ImageError:
        raise
    except Exception as error:  # Files are of many classes: in archives, closed, of one's own.
        raise ImageError(f"Cannot read the picture `{name}`: {error}.") from error
    if not isinstance(data, bytes):
        raise ImageError(
            f'Cannot read the picture `{name}`: the file should be open in binary mode ("rb").'
        )
    return data, name


def _read_rest(file: BinaryIO, name: str) -> bytes:
    data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise _too_long(name)
    return data


def _too_long(name: str) -> ImageError:
    return ImageError(
        f"Cannot read the picture `{name}`: the file is larger than {MAX_FILE_BYTES} bytes."
    )


def _check_format(start: bytes, name: str) -> str:
    if not start:
        raise ImageError(f"Cannot read the picture `{name}`: the file is empty.")
    kind = sniff(start)
    if kind is None:
        raise ImageError(
            f"Cannot read the picture `{name}`: it is not a {', '.join(SUPPORTED_FORMATS[:-1])} "
            f"or {SUPPORTED_FORMATS[-1]} file, whatever its name says."
        )
    return kind


def _from_bytes(data: bytes, name: str, decoder: Decoder, max_pixels: int) -> Tensor:
    kind = _check_format(data[:NUM_SIGNATURE_BYTES], name)
    header = read_jpeg_header(data) if kind == "JPEG" else None
    if header is not None:
        check_size(header.width, header.height, max_pixels)
        if header.is_plain and decoder == "torchvision" and _fast_decode_jpeg is not None:
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return _upright(_fast_decode_jpeg(encoded, _RGB), read_orientation(header.exif))
    array, orientation = decode_with_pillow(data, kind, name=name, max_pixels=max_pixels)
    if header is not None:  # Pillow was given the file without its EXIF data.
        orientation = read_orientation(header.exif)
    return _upright(torch.from_numpy(array).permute(2, 0, 1), orientation)


# torchvision's kernel, where this torchvision has it: the function around it in `torchvision.io`
# warns that it will go in some release to come. Its PNG kernel is not used, since a damaged
# file makes it crash the whole process (torchvision 0.29).
_fast_decode_jpeg: Callable[[Tensor, int], Tensor] | None = getattr(
    torch.ops.image, "decode_jpeg", None
)
_RGB = 3
"""torchvision's number for "make RGB of it"."""

_QUARTER_TURNS = {3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}
_MIRRORED = frozenset({2, 4, 5, 7})


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    """Undo an EXIF orientation: turn by quarters counter-clockwise, then mirror."""
    turns = _QUARTER_TURNS.get(orientation, 0)
    if turns:
        pixels = torch.rot90(pixels, turns, (1, 2))
    return pixels.flip(2) if orientation in _MIRRORED else pixels


def _guarded(read: Callable[[], Tensor], name: str, max_pixels: int) -> Tensor:
    """Turn whatever the decoders raise into an ImageError that names the picture."""
    try:
        return read()
    except ImageError:
        raise
    except TooLargeError as error:
        width, height = error.args
        raise ImageError(
            f"Cannot read the picture `{name}`: it has {width} x {height} pixels, more than "
            f"`max_pixels`, {max_pixels}. Make it smaller, or raise the limit if you trust it."
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"Cannot read the picture `{name}`: it has more pixels than "
            f"`PIL.Image.MAX_IMAGE_PIXELS` allows, {2 * (Image.MAX_IMAGE_PIXELS or 0)}. "
            f"Raise that if you trust it."
        ) from error
    except MemoryError as error:
        raise ImageError(
            f"Cannot read the picture `{name}`: there is not enough memory to decode it."
        ) from error
    except Exception as error:  # Decoders raise nearly every class on damaged bytes.
        raise ImageError(
            f"Cannot read the picture `{name}`: the file is damaged or truncated. "
            f"Replace or remove it."
        ) from error
