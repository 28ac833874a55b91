from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from transferkit.data.drawn import draw_picture
from transferkit.data.folders import find_images
from transferkit.data.hashing import find_near, perceptual_hash
from transferkit.images import decode_image


def hash_of(image: Image.Image) -> int:
    found = perceptual_hash(decode_image(image))
    assert found is not None
    return found.upright


def stored_again(image: Image.Image, kind: str, **options: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


@pytest.mark.parametrize("seed", range(4))
def test_hash_stays_near_when_a_picture_is_stored_anew(seed: int) -> None:
    image = draw_picture("ants", seed=seed)
    changed = [
        stored_again(image, "JPEG", quality=50),
        stored_again(image, "WEBP", quality=50),
        image.resize((image.width // 2, image.height // 2)),
        image.resize((200, 200)),
        image.convert("L"),
        ImageEnhance.Brightness(image).enhance(1.1),
    ]
    assert all((hash_of(image) ^ hash_of(each)).bit_count() <= 8 for each in changed)


def test_mirrored_hash_is_that_of_the_mirrored_picture() -> None:
    for seed in range(5):
        image = draw_picture("bees", seed=seed)
        mirrored = perceptual_hash(decode_image(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
        found = perceptual_hash(decode_image(image))
        assert found is not None
        assert mirrored is not None
        assert (found.mirrored ^ mirrored.upright).bit_count() <= 2
        assert (found.upright ^ mirrored.mirrored).bit_count() <= 2


def test_other_pictures_have_other_hashes() -> None:
    hashes = [
        hash_of(draw_picture(name, seed=seed)) for name in ("ants", "bees") for seed in range(10)
    ]
    distances = [
        (one ^ other).bit_count() for place, one in enumerate(hashes) for other in hashes[:place]
    ]
    assert min(distances) > 8


def test_picture_of_one_colour_has_no_hash() -> None:
    noise = torch.randint(100, 103, (3, 40, 50), dtype=torch.uint8)
    assert perceptual_hash(noise) is None


@given(
    count=st.integers(0, 60),
    distance=st.integers(0, 15),
    seed=st.integers(0, 2**32 - 1),
    num_flips=st.integers(0, 20),
)
def test_near_pairs_are_those_of_a_plain_comparison(
    count: int, distance: int, seed: int, num_flips: int
) -> None:
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 2**63, 3, dtype=np.uint64)
    left = base[rng.integers(0, 3, count)]
    for _ in range(num_flips):
        left = left ^ (np.uint64(1) << rng.integers(0, 64, count).astype(np.uint64))
    right = np.roll(left, 1)
    expected = [
        [one, other]
        for one in range(count)
        for other in range(count)
        if int(left[one] ^ right[other]).bit_count() <= distance
    ]
    assert find_near(left, right, distance=distance).tolist() == expected


def test_no_photographs_are_nearly_the_same(photographs: Path) -> None:
    found = [perceptual_hash(decode_image(path)) for path in find_images(photographs)[::4]]
    hashes = np.array([each.upright for each in found if each is not None], dtype=np.uint64)
    pairs = find_near(hashes, hashes, distance=8)
    assert pairs.tolist() == [[place, place] for place in range(len(found))]
