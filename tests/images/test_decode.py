from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor

from transferkit.errors import ImageError
from transferkit.images import SUPPORTED_FORMATS, decode_image

Pixels = npt.NDArray[Any]

NO_PICTURE = "it is not a JPEG, PNG, WEBP, BMP, GIF or TIFF file, whatever its name says."


def noise(height: int = 6, width: int = 9, channels: int = 3) -> Pixels:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def as_pixels(image: Tensor) -> Pixels:
    """Return a decoded picture as an array (H, W, 3)."""
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


# Formats


@pytest.mark.parametrize(
    ("image_format", "extension", "options"),
    [
        ("PNG", ".png", {}),
        ("WEBP", ".webp", {"lossless": True}),
        ("BMP", ".bmp", {}),
        ("TIFF", ".tif", {}),
        ("TIFF", ".tiff", {"compression": "tiff_lzw"}),
    ],
)
@pytest.mark.parametrize("change", [str, str.upper])
def test_lossless_formats_give_the_very_pixels(
    tmp_path: Path,
    image_format: str,
    extension: str,
    options: dict[str, Any],
    change: Callable[[str], str],
) -> None:
    pixels = noise()
    path = tmp_path / f"picture{change(extension)}"
    path.write_bytes(encode(Image.fromarray(pixels), image_format, **options))
    np.testing.assert_array_equal(as_pixels(decode_image(path)), pixels)
    np.testing.assert_array_equal(as_pixels(decode_image(str(path))), pixels)
    np.testing.assert_array_equal(as_pixels(decode_image(path.read_bytes())), pixels)


@pytest.mark.parametrize("extension", [".jpg", ".JPEG"])
def test_jpeg_gives_nearly_the_pixels(tmp_path: Path, extension: str) -> None:
    pixels = np.full((16, 24, 3), (200, 100, 50), dtype=np.uint8)
    path = tmp_path / f"picture{extension}"
    path.write_bytes(encode(Image.fromarray(pixels), "JPEG", quality=95))
    np.testing.assert_allclose(as_pixels(decode_image(path)).astype(int), pixels, atol=3)


def test_gif_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (9, 6), color) for color in ("red", "blue")]
    path = tmp_path / "picture.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    expected = np.full((6, 9, 3), (255, 0, 0), dtype=np.uint8)
    np.testing.assert_array_equal(as_pixels(decode_image(path)), expected)


def test_content_decides_not_the_extension(tmp_path: Path) -> None:
    pixels = noise()
    path = tmp_path / "picture.jpg"
    path.write_bytes(encode(Image.fromarray(pixels), "PNG"))
    np.testing.assert_array_equal(as_pixels(decode_image(path)), pixels)


@pytest.mark.parametrize("image_format", ["PPM", "PDF", "EPS", "ICO", "TGA", "SGI"])
def test_other_formats_of_pillow_are_refused(tmp_path: Path, image_format: str) -> None:
    assert image_format not in SUPPORTED_FORMATS
    path = tmp_path / "picture.png"
    path.write_bytes(encode(Image.fromarray(noise(32, 32)), image_format))
    with pytest.raises(ImageError) as error:
        decode_image(path)
    assert str(error.value) == f"Cannot read the picture `{path}`: {NO_PICTURE}"


# Orientation

UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP"])
def test_picture_is_turned_upright(orientation: int, image_format: str) -> None:
    stored = noise()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encode(Image.fromarray(stored), image_format, exif=exif, **options)
    np.testing.assert_array_equal(as_pixels(decode_image(data)), UPRIGHT[orientation](stored))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_jpeg_is_turned_upright(orientation: int) -> None:
    stored = np.zeros((16, 32, 3), dtype=np.uint8)
    stored[:8, :16] = 250
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = as_pixels(decode_image(encode(Image.fromarray(stored), "JPEG", exif=exif)))
    np.testing.assert_array_equal(found > 125, UPRIGHT[orientation](stored) > 125)


def test_garbage_in_place_of_exif_does_no_harm() -> None:
    data = encode(Image.new("RGB", (9, 6), "white"), "JPEG", exif=b"Exif\0\0no exif at all")
    assert decode_image(data).shape == (3, 6, 9)


# Modes


def test_transparent_pixels_lie_on_white() -> None:
    pixels = noise(channels=4)
    found = as_pixels(decode_image(encode(Image.fromarray(pixels), "PNG")))
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(found, expected, atol=1)


def test_transparent_colour_of_a_palette_lies_on_white() -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), mode=None).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    for image_format in ("PNG", "GIF"):
        found = as_pixels(decode_image(encode(image, image_format, transparency=1)))
        assert found.tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]


def test_palette_without_transparency_gives_its_colours() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([2, 1, 0])
    found = as_pixels(decode_image(encode(image, "PNG")))
    assert found.tolist() == [[[0, 0, 255], [0, 255, 0], [255, 0, 0]]]


def test_transparent_colour_of_an_rgb_picture_lies_on_white() -> None:
    image = Image.new("RGB", (2, 1), "red")
    image.putpixel((1, 0), (1, 2, 3))
    found = as_pixels(decode_image(encode(image, "PNG", transparency=(1, 2, 3))))
    assert found.tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_grey_with_alpha_lies_on_white() -> None:
    image = Image.new("LA", (2, 1), (40, 255))
    image.putpixel((1, 0), (40, 0))
    assert as_pixels(decode_image(encode(image, "PNG"))).tolist() == [[[40] * 3, [255] * 3]]


def test_grey_fills_all_channels() -> None:
    pixels = noise(channels=1)
    found = as_pixels(decode_image(encode(Image.fromarray(pixels), "PNG")))
    np.testing.assert_array_equal(found, np.stack([pixels] * 3, axis=2))


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_one_bit_gives_black_and_white(image_format: str) -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    found = as_pixels(decode_image(encode(image, image_format)))
    assert found.tolist() == [[[0, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(image_format: str) -> None:
    pixels = np.array([[0, 128, 129, 256, 30000, 65407, 65535]], dtype=np.uint16)
    found = as_pixels(decode_image(encode(Image.fromarray(pixels), image_format)))
    expected = np.round(pixels / 65535 * 255).astype(np.uint8)
    np.testing.assert_array_equal(found, np.stack([expected] * 3, axis=2))


@pytest.mark.parametrize("image_format", ["TIFF", "JPEG"])
def test_cmyk_gives_its_colours(image_format: str) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    found = as_pixels(decode_image(encode(image, image_format)))
    np.testing.assert_allclose(found[4, 4].astype(int), (255, 0, 0), atol=5)


def test_float_pixels_go_from_black_to_white() -> None:
    pixels = np.array([[0.0, 0.1, 0.5, 1.0]], dtype=np.float32)
    found = as_pixels(decode_image(encode(Image.fromarray(pixels), "TIFF")))
    assert found.tolist() == [[[0] * 3, [26] * 3, [128] * 3, [255] * 3]]


@pytest.mark.parametrize(("mode", "colour"), [("La", (100, 255)), ("RGBa", (9, 8, 7, 255))])
def test_premultiplied_transparency_is_understood(mode: str, colour: tuple[int, ...]) -> None:
    found = as_pixels(decode_image(Image.new(mode, (1, 1), colour)))
    assert found.tolist() == [[[100] * 3 if mode == "La" else [9, 8, 7]]]


# PIL images, arrays and tensors


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "YCbCr", "HSV"])
def test_pil_image_is_read_and_not_changed(mode: str) -> None:
    image = Image.new(mode, (9, 6))
    before = image.tobytes()
    decode_image(image).fill_(77)
    assert image.mode == mode
    assert image.tobytes() == before


def test_pil_image_is_turned_upright_and_not_changed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encode(Image.fromarray(noise()), "PNG", exif=exif)))
    assert decode_image(image).shape == (3, 9, 6)
    assert image.size == (9, 6)
    assert image.getexif()[0x0112] == 6


def test_pil_image_of_unknown_range_is_refused() -> None:
    with pytest.raises(ImageError) as error:
        decode_image(Image.new("I", (3, 3)))
    assert str(error.value) == (
        "Cannot read the picture `PIL image`: its pixels are of Pillow's mode `I`, whose value "
        "range is not known. Convert it to 8 or 16 bits."
    )


def test_truncated_pil_image_is_an_image_error() -> None:
    data = encode(Image.fromarray(noise(80, 120)), "JPEG")
    image = Image.open(io.BytesIO(data[: len(data) // 2]))
    with pytest.raises(ImageError, match=r"^Cannot read the picture `PIL image`: "):
        decode_image(image)


def test_pil_image_without_pixels_is_an_image_error() -> None:
    with pytest.raises(ImageError):
        decode_image(Image.new("RGB", (0, 3)))


@pytest.mark.parametrize("step", [1, -1])
def test_array_is_copied_whatever_its_strides(step: int) -> None:
    pixels = noise()
    view = pixels[::step, ::step]
    image = decode_image(view)
    np.testing.assert_array_equal(as_pixels(image), view)
    image.fill_(0)
    np.testing.assert_array_equal(pixels, noise())


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((4, 5), dtype=np.uint8), "uint8 (4, 5)"),
        (np.zeros((3, 4, 5), dtype=np.uint8), "uint8 (3, 4, 5)"),
        (np.zeros((4, 5, 4), dtype=np.uint8), "uint8 (4, 5, 4)"),
        (np.zeros((0, 5, 3), dtype=np.uint8), "uint8 (0, 5, 3)"),
        (np.zeros((4, 5, 3), dtype=np.float32), "float32 (4, 5, 3)"),
    ],
)
def test_array_of_another_kind_is_an_error(array: Any, found: str) -> None:
    with pytest.raises(ImageError) as error:
        decode_image(array)
    assert str(error.value) == (
        f"A picture given as an array should be uint8 (H, W, 3) in [0, 255], found {found}."
    )


def test_tensor_is_returned_as_it_is() -> None:
    image = torch.zeros(3, 4, 5, dtype=torch.uint8)
    assert decode_image(image) is image


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.zeros(4, 5, dtype=torch.uint8), "uint8 (4, 5)"),
        (torch.zeros(1, 3, 4, 5, dtype=torch.uint8), "uint8 (1, 3, 4, 5)"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), "uint8 (4, 5, 3)"),
        (torch.zeros(3, 0, 5, dtype=torch.uint8), "uint8 (3, 0, 5)"),
    ],
)
def test_tensor_of_another_kind_is_an_error(tensor: Tensor, found: str) -> None:
    with pytest.raises(ImageError) as error:
        decode_image(tensor)
    assert str(error.value) == (
        f"A picture given as a tensor should be uint8 (3, H, W) in [0, 255], found {found}."
    )


def test_float_tensor_is_an_error_that_says_where_floats_are_made() -> None:
    with pytest.raises(ImageError) as error:
        decode_image(torch.zeros(3, 4, 5))
    assert str(error.value) == (
        "A picture given as a tensor should be uint8 (3, H, W) in [0, 255], found float32 "
        "(3, 4, 5). Leave out the transform that made floats of it; it is done here."
    )


@pytest.mark.parametrize("wrap", [bytearray, memoryview, io.BytesIO])
def test_bytes_may_come_in_any_wrapping(wrap: Any) -> None:
    pixels = noise()
    data = encode(Image.fromarray(pixels), "PNG")
    np.testing.assert_array_equal(as_pixels(decode_image(wrap(data))), pixels)


def test_binary_file_is_read_from_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "picture.bin"
    path.write_bytes(b"header" + encode(Image.fromarray(noise()), "PNG"))
    with path.open("rb") as file:
        file.seek(6)
        np.testing.assert_array_equal(as_pixels(decode_image(file)), noise())


@pytest.mark.parametrize("source", [None, 3, ["a.jpg"]])
def test_anything_else_is_an_error(source: Any) -> None:
    with pytest.raises(ImageError) as error:
        decode_image(source)
    assert str(error.value) == (
        f"A picture should be a path, bytes, a binary file, a PIL image, an array (H, W, 3) "
        f"or a tensor (3, H, W), found {type(source).__name__}."
    )


# Damage


@pytest.mark.parametrize("decoder", ["torchvision", "pillow"])
@pytest.mark.parametrize("image_format", SUPPORTED_FORMATS)
def test_truncation_at_any_place_is_an_image_error(image_format: str, decoder: Any) -> None:
    data = encode(Image.fromarray(noise(24, 32)), image_format)
    for length in range(0, len(data) // 2, max(1, len(data) // 40)):
        with pytest.raises(ImageError, match=r"^Cannot read the picture `\d+ bytes`: "):
            decode_image(data[:length], decoder=decoder)


# 16-bit colour


def crc(content: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(content))


def png_of_16_bits(pixels: Pixels) -> bytes:
    """Return a PNG file of 16-bit RGB or RGBA, which Pillow cannot write."""
    height, width, channels = pixels.shape
    color = {3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(content)) + (whole := kind + content) + crc(whole)
        for kind, content in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def tiff_of_16_bits(pixels: Pixels) -> bytes:
    """Return an uncompressed TIFF file of 16-bit RGB."""
    height, width, _ = pixels.shape
    data = pixels.astype("<u2").tobytes()
    values = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8 + len(data)), (259, 3, 1, 1)]
    values += [(262, 3, 1, 2), (273, 4, 1, 8), (277, 3, 1, 3), (278, 3, 1, height)]
    values += [(279, 4, 1, len(data))]
    place = 8 + len(data) + 6
    head = b"II*\0" + struct.pack("<I", place)
    entries = b"".join(struct.pack("<HHII", *entry) for entry in values)
    bits = struct.pack("<HHH", 16, 16, 16)
    return head + data + bits + struct.pack("<H", len(values)) + entries + bytes(4)


@pytest.mark.parametrize("write", [png_of_16_bits, tiff_of_16_bits])
def test_sixteen_bit_colour_is_scaled_not_clipped(write: Callable[[Pixels], bytes]) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (5, 7, 3))
    found = as_pixels(decode_image(write(pixels)))
    np.testing.assert_array_equal(found, pixels >> 8)
    assert np.abs(found - pixels / 257).max() < 1


def test_transparent_sixteen_bit_colour_lies_on_white() -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (5, 7, 4))
    found = as_pixels(decode_image(png_of_16_bits(pixels)))
    alpha = pixels[:, :, 3:] / 65535
    expected = pixels[:, :, :3] / 257 * alpha + 255 * (1 - alpha)
    assert np.abs(found - expected).max() < 2.5


def test_transparent_colour_of_16_bits_is_refused() -> None:
    data = png_of_16_bits(np.full((2, 2, 3), 1000))
    transparency = b"\0\0\0\x06tRNS" + struct.pack(">HHH", 1000, 1000, 1000)
    transparency += struct.pack(">I", zlib.crc32(transparency[4:]))
    data = data[:33] + transparency + data[33:]
    with pytest.raises(ImageError) as error:
        decode_image(data)
    assert str(error.value) == (
        f"Cannot read the picture `{len(data)} bytes`: it has 16-bit colours of which one is "
        f"transparent, which 8 bits cannot tell from its neighbours. Convert it to 8 bits."
    )
