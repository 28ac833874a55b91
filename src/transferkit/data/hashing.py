"""Perceptual hashes: 64 bits that stay nearly the same when a picture is stored anew."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torchvision.transforms.v2.functional import resize

SIDE = 32
NUM_FREQUENCIES = 8
MIN_CONTRAST = 3.0
"""Pictures whose grey values vary by less (standard deviation, in levels) have no hash."""

Hashes = npt.NDArray[np.uint64]


class PictureHash(NamedTuple):
    """The hash of a picture and of its mirror image.

    Args:
        upright: 64 bits.
        mirrored: The 64 bits of the picture flipped left to right.
    """

    upright: int
    mirrored: int


def _cosines() -> npt.NDArray[np.float64]:
    """Return the first rows of the matrix of the discrete cosine transform (II)."""
    places = (np.arange(SIDE) + 0.5) * np.pi / SIDE
    return np.cos(np.arange(NUM_FREQUENCIES)[:, None] * places)


_COSINES = _cosines()
# Mirrored, a picture has the same even frequencies and the opposite odd ones.
_MIRROR = np.where(np.arange(NUM_FREQUENCIES) % 2, -1.0, 1.0)


def perceptual_hash(pixels: Tensor) -> PictureHash | None:
    """Compute the perceptual hash of a picture (pHash).

    The picture becomes 32 x 32 grey values; a bit tells for each of its 8 x 8 lowest
    frequencies whether the amplitude is above their median.

    Args:
        pixels: uint8 `(3, H, W)`.

    Returns:
        The hash; None for a picture of one colour, whose bits would be noise.

    Example:
        >>> from transferkit.data.drawn import draw_picture
        >>> from transferkit.images import decode_image
        >>> picture = decode_image(draw_picture("ants", seed=1))
        >>> one, other = perceptual_hash(picture), perceptual_hash(picture[:, ::2, ::2])
        >>> (one.upright ^ other.upright).bit_count() <= 8, perceptual_hash(picture * 0)
        (True, None)

    References:
        Christoph Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions,
        2010, https://www.phash.org/docs/pubs/thesis_zauner.pdf
    """
    small = resize(pixels, [SIDE, SIDE], antialias=True).double()
    grey = (0.299 * small[0] + 0.587 * small[1] + 0.114 * small[2]).numpy()
    if grey.std() < MIN_CONTRAST:
        return None
    amplitudes = _COSINES @ grey @ _COSINES.T
    amplitudes[0, 0] = 0.0  # The mean brightness tells nothing about what is to be seen.
    return PictureHash(_to_bits(amplitudes), _to_bits(amplitudes * _MIRROR))


def _to_bits(amplitudes: npt.NDArray[np.float64]) -> int:
    bits = amplitudes > np.median(amplitudes)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def find_near(left: Hashes, right: Hashes, *, distance: int) -> npt.NDArray[np.int64]:
    """Find the pairs of hashes that differ in few bits.

    Hashes that differ in at most d bits agree in one of d + 1 bands of bits, so that only
    those that share a band are compared.

    Args:
        left: Hashes uint64 `(N,)`.
        right: Hashes uint64 `(M,)`.
        distance: The most bits that may differ, in [0, 15].

    Returns:
        int64 `(P, 2)`: a place in `left` and one in `right` for each pair, sorted, each pair
        once.

    Example:
        >>> hashes = np.array([0b1111, 0b1110, 0b0000], dtype=np.uint64)
        >>> find_near(hashes, hashes, distance=1).tolist()
        [[0, 0], [0, 1], [1, 0], [1, 1], [2, 2]]
    """
    found = [np.zeros((0, 2), dtype=np.int64)]
    edges = np.linspace(0, 64, distance + 2).astype(int)
    for low, high in pairwise(edges):
        mask = np.uint64((1 << int(high - low)) - 1)
        one, other = ((each >> np.uint64(low)) & mask for each in (left, right))
        found.append(_compare_equals(left, right, one, other, distance))
    pairs: npt.NDArray[np.int64] = np.unique(np.concatenate(found), axis=0)
    return pairs


def _compare_equals(
    left: Hashes, right: Hashes, one: Hashes, other: Hashes, distance: int
) -> npt.NDArray[np.int64]:
    """Compare those whose bands are equal, one neighbour after the other."""
    order = np.argsort(other, kind="stable")
    ordered = other[order]
    first, last = np.searchsorted(ordered, one), np.searchsorted(ordered, one, side="right")
    places = np.arange(len(left))
    found = [np.zeros((0, 2), dtype=np.int64)]
    while len(places):
        is_left = first < last
        places, first, last = places[is_left], first[is_left], last[is_left]
        candidates = order[first]
        is_near = np.bitwise_count(left[places] ^ right[candidates]) <= distance
        found.append(np.stack([places[is_near], candidates[is_near]], axis=1))
        first = first + 1
    return np.concatenate(found)
