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
from hypothesis.extra import numpy as st_numpy
from PIL import Image
from torch import Tensor

from transferkit.errors import ImageError
from transferkit.images import Preprocess, decode_image
from transferkit.images.channels import decode_channels, to_grey

COLORS = st_numpy.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3)))


def noise(*shape: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@given(COLORS)
def test_grey_is_the_one_of_pillow(pixels: npt.NDArray[np.uint8]) -> None:
    expected = np.asarray(Image.fromarray(pixels).convert("L"))
    kept = pixels.copy()
    found = to_grey(torch.from_numpy(pixels).permute(2, 0, 1))
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found.numpy(), expected[None])
    np.testing.assert_array_equal(pixels, kept)


def test_every_grey_keeps_its_value() -> None:
    greys = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert torch.equal(to_grey(greys.expand(3, -1, -1)), greys)


@pytest.mark.parametrize("decoder", ["torchvision", "pillow"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_files_in_grey_and_in_colour_become_grey(
    decoder: Any, suffix: str, mode: str, tmp_path: Path
) -> None:
    path = tmp_path / f"picture{suffix}"
    image = Image.fromarray(noise(20, 30) if mode == "L" else noise(20, 30, 3))
    image.save(path)
    found = decode_channels(path, 1, decoder=decoder)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(found.numpy()[0], np.asarray(opened.convert("L")))
    preprocess = Preprocess(mean=(0.5,), std=(0.5,), decoder=decoder)
    assert torch.equal(preprocess.decode(path), found)
    assert torch.equal(preprocess.decode(path.read_bytes()), found)
    if suffix != ".jpg":
        assert torch.equal(preprocess.decode(image), found)


def test_grey_pixels_are_taken_as_they_are() -> None:
    pixels = noise(5, 7)
    expected = torch.from_numpy(pixels.copy())[None]
    sources: list[Any] = [pixels, pixels[:, :, None], expected, expected[0]]
    for source in sources:
        assert torch.equal(decode_channels(source, 1), expected)
    # A strip of three rows is grey: only the place of the channels makes it a colour picture.
    assert decode_channels(noise(3, 7), 1).shape == (1, 3, 7)
    assert decode_channels(torch.from_numpy(noise(3, 7)), 1).shape == (1, 3, 7)


def test_pixels_of_an_array_are_copied() -> None:
    for shape, num_channels in (((5, 7), 1), ((5, 7, 1), 1), ((5, 7, 4), 4)):
        pixels = noise(*shape)
        found = decode_channels(pixels, num_channels)
        kept = found.clone()
        pixels[:] = 0
        assert torch.equal(found, kept)


def test_colour_pixels_become_grey_too() -> None:
    pixels = noise(5, 7, 3)
    expected = to_grey(decode_image(pixels))
    assert torch.equal(decode_channels(pixels, 1), expected)
    assert torch.equal(decode_channels(decode_image(pixels), 1), expected)


def test_three_channels_are_the_colours() -> None:
    pixels = noise(5, 7, 3)
    assert torch.equal(decode_channels(pixels, 3), decode_image(pixels))
    with pytest.raises(ImageError, match=r"^A picture given as an array should be uint8 \(H, W, 3"):
        decode_channels(noise(5, 7), 3)


@pytest.mark.parametrize("num_channels", [2, 4, 13])
def test_any_number_of_channels_comes_as_pixels(num_channels: int) -> None:
    pixels = noise(5, 7, num_channels)
    expected = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    assert torch.equal(decode_channels(pixels, num_channels), expected)
    assert decode_channels(expected, num_channels) is expected


@pytest.mark.parametrize("share", ["limit", "file"])
def test_limit_and_bad_files_are_those_of_decode_image(share: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(noise(5, 7)).save(path)
    if share == "file":
        path.write_bytes(b"")
    errors = []
    for decode in (decode_image, lambda source, **options: decode_channels(source, 1, **options)):
        with pytest.raises(ImageError) as error:
            decode(path, max_pixels=10)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("a.png", "the file `a.png`"),
        (Path("a.png"), "the file `a.png`"),
        (b"data", "bytes"),
        (io.BytesIO(), "BytesIO"),
        (Image.new("RGB", (3, 3)), "Image"),
        (None, "NoneType"),
    ],
)
def test_files_with_other_numbers_of_channels_are_an_error(source: Any, found: str) -> None:
    with pytest.raises(ImageError) as error:
        decode_channels(source, 4)
    assert str(error.value) == (
        f"A picture of 4 channels should be an array uint8 (H, W, 4) or a tensor uint8 "
        f"(4, H, W), found {found}. Files and PIL images are read with 3 channels or 1."
    )


def tensor(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("source", "num_channels", "text"),
    [
        (
            tensor(2, 5, 5),
            1,
            "1 channel given as a tensor should be uint8 (H, W), (1, H, W) or (3, H, W) in "
            "[0, 255], found uint8 (2, 5, 5)",
        ),
        (
            tensor(5, 5, dtype=torch.float32),
            1,
            "1 channel given as a tensor should be uint8 (H, W), (1, H, W) or (3, H, W) in "
            "[0, 255], found float32 (5, 5)",
        ),
        (
            np.zeros((1, 5, 5), np.uint8),
            1,
            "1 channel given as an array should be uint8 (H, W), (H, W, 1) or (H, W, 3) in "
            "[0, 255], found uint8 (1, 5, 5)",
        ),
        (
            np.zeros((0, 5), np.uint8),
            1,
            "1 channel given as an array should be uint8 (H, W), (H, W, 1) or (H, W, 3) in "
            "[0, 255], found uint8 (0, 5)",
        ),
        (
            np.zeros((5, 5, 3), np.uint8),
            4,
            "4 channels given as an array should be uint8 (H, W, 4) in [0, 255], found uint8 "
            "(5, 5, 3)",
        ),
        (
            np.zeros((5, 5, 4), np.uint16),
            4,
            "4 channels given as an array should be uint8 (H, W, 4) in [0, 255], found uint16 "
            "(5, 5, 4)",
        ),
        (
            tensor(5, 5),
            2,
            "2 channels given as a tensor should be uint8 (2, H, W) in [0, 255], found uint8 "
            "(5, 5)",
        ),
    ],
)
def test_other_pixels_are_an_error(source: Any, num_channels: int, text: str) -> None:
    with pytest.raises(ImageError) as error:
        decode_channels(source, num_channels)
    assert str(error.value) == f"A picture of {text}."
