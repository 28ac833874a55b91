"""Generated pictures of every format and mode: the reference pixels, whoever decodes them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from transferkit.data.folders import find_images
from transferkit.errors import ImageError
from transferkit.images import SUPPORTED_FORMATS, Decoder, decode_image

DECODERS: tuple[Decoder, ...] = ("torchvision", "pillow")
Pixels = npt.NDArray[Any]

LOSSLESS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "PNG": ({}, ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    "WEBP": ({"lossless": True, "exact": True}, ("RGB", "RGBA")),
    "BMP": ({}, ("1", "L", "P", "RGB")),
    "GIF": ({}, ("L", "P")),
    "TIFF": ({}, ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "F")),
}


def make(mode: str, height: int, width: int, rng: np.random.Generator) -> Image.Image:
    """Return a picture of noise of a mode."""
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    if mode == "F":
        return Image.fromarray(rng.random((height, width), dtype=np.float32))
    if mode == "1":
        return Image.fromarray(rng.integers(0, 2, (height, width), dtype=np.uint8) * 255).convert(
            "1"
        )
    channels = {"L": 1, "P": 1, "LA": 2, "RGB": 3, "RGBA": 4}[mode]
    values = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    image = Image.fromarray(values[:, :, 0] if channels == 1 else values)
    if mode == "P":
        image = Image.fromarray(values[:, :, 0] % 16)
        image = image.convert("P")
        image.putpalette(rng.integers(0, 256, 48, dtype=np.uint8).tobytes())
    return image


def reference(image: Image.Image) -> Pixels:
    """Return the pixels that a picture should give, computed in floats."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "P":
        palette = np.asarray(image.getpalette(), dtype=np.float64).reshape(-1, 3)
        colours: Pixels = palette[np.asarray(image)]
        return colours
    if image.mode in ("1", "F"):
        values = values * 255
    elif image.mode == "I;16":
        values = values / 257
    if values.ndim == 2:
        values = values[:, :, None]
    if image.mode in ("LA", "RGBA"):
        alpha = values[:, :, -1:] / 255
        values = values[:, :, :-1] * alpha + 255 * (1 - alpha)
    return np.broadcast_to(values, (*values.shape[:2], 3))


CASES = [(kind, mode) for kind, (_, modes) in LOSSLESS.items() for mode in modes]


@pytest.mark.parametrize(("kind", "mode"), CASES)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    decoder=st.sampled_from(DECODERS),
)
def test_lossless_picture_gives_the_reference_pixels(
    kind: str, mode: str, height: int, width: int, seed: int, decoder: Decoder
) -> None:
    image = make(mode, height, width, np.random.default_rng(seed))
    file = io.BytesIO()
    image.save(file, kind, **LOSSLESS[kind][0])
    found = decode_image(file.getvalue(), decoder=decoder)
    assert found.dtype == torch.uint8
    # Half a level for rounding; Pillow's composition may be off by one more.
    tolerance = 1.0 if mode in ("LA", "RGBA") else 0.5
    difference = np.abs(found.permute(1, 2, 0).numpy() - reference(image))
    assert difference.max() <= tolerance + 1e-3


@given(
    mode=st.sampled_from(["L", "RGB", "CMYK", "YCbCr"]),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    quality=st.integers(1, 95),
    subsampling=st.sampled_from([0, 1, 2]),
    progressive=st.booleans(),
)
def test_decoders_agree_on_jpeg(
    mode: str, height: int, width: int, seed: int, quality: int, subsampling: int, progressive: bool
) -> None:
    rng = np.random.default_rng(seed)
    smooth = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    image = Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling=subsampling, progressive=progressive)
    one, other = (decode_image(file.getvalue(), decoder=decoder) for decoder in DECODERS)
    assert torch.equal(one, other)
    assert one.shape == (3, height, width)


@given(data=st.binary(max_size=200), kind=st.sampled_from([None, *SUPPORTED_FORMATS]))
def test_arbitrary_bytes_give_an_image_error(data: bytes, kind: str | None) -> None:
    starts = {"JPEG": b"\xff\xd8\xff", "PNG": b"\x89PNG\r\n\x1a\n", "GIF": b"GIF89a", "BMP": b"BM"}
    starts |= {"TIFF": b"II*\0", "WEBP": b"RIFF\x20\0\0\0WEBP"}
    content = (starts[kind] if kind else b"") + data
    for decoder in DECODERS:
        with pytest.raises(ImageError, match=r"^Cannot read the picture `\d+ bytes`: "):
            decode_image(content, decoder=decoder)


def test_decoders_agree_on_the_photographs(photographs: Path) -> None:
    for path in find_images(photographs)[::8]:
        one, other = (decode_image(path, decoder=decoder) for decoder in DECODERS)
        assert torch.equal(one, other), path
        assert one.stride() == other.stride()
