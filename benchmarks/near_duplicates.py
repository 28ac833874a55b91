"""How far perceptual hashes move when a picture is stored anew, and how near others come.

    python benchmarks/near_duplicates.py               # the photographs, else drawn pictures

For each way to store a picture again it prints the largest number of bits, of 64, by which a
hash moved, and the share of pictures within 4, 6 and 8 bits; then how many pairs of different
pictures are within each distance. `transferkit.data.check.NEAR_DISTANCE` follows from it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from transferkit.data.ants_bees import find_ants_bees
from transferkit.data.folders import find_images
from transferkit.data.hashing import find_near, perceptual_hash
from transferkit.images import decode_image

DISTANCES = (4, 6, 8, 10, 12)


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """Return the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def crop(image: Image.Image, share: float) -> Image.Image:
    """Cut a share off at each side."""
    width, height = image.size
    box = (share * width, share * height, (1 - share) * width, (1 - share) * height)
    return image.crop(tuple(map(int, box)))  # type: ignore[arg-type]


WAYS: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG of quality 50": lambda image: encode(image, quality=50),
    "JPEG of quality 20": lambda image: encode(image, quality=20),
    "WebP of quality 70": lambda image: encode(image, "WEBP", quality=70),
    "grey": lambda image: encode(image.convert("L")),
    "half the size": lambda image: encode(image.resize((image.width // 2, image.height // 2))),
    "squashed to a square": lambda image: encode(image.resize((256, 256))),
    "brighter by a fifth": lambda image: encode(ImageEnhance.Brightness(image).enhance(1.2)),
    "3 % cut off at each side": lambda image: encode(crop(image, 0.03)),
}


def hash_of(source: Any) -> int:
    """Return the hash of a picture that has one."""
    found = perceptual_hash(decode_image(source))
    if found is None:
        raise ValueError(f"{source} has no hash")
    return found.upright


def main() -> None:
    """Measure and print."""
    files = find_images(find_ants_bees().root)
    print(f"{'stored again':28} {'most bits':>9} {'<= 4':>6} {'<= 6':>6} {'<= 8':>6}")
    for name, store in WAYS.items():
        moved = []
        for path in files[::4]:
            with Image.open(path) as image:
                again = store(image.convert("RGB"))
            moved.append((hash_of(path) ^ hash_of(again)).bit_count())
        shares = "".join(f" {np.mean(np.array(moved) <= distance):6.2f}" for distance in (4, 6, 8))
        print(f"{name:28} {max(moved):9d}{shares}")
    hashes = np.array([hash_of(path) for path in files], dtype=np.uint64)
    for distance in DISTANCES:
        num_pairs = (len(find_near(hashes, hashes, distance=distance)) - len(files)) // 2
        print(f"{num_pairs} of {len(files)} pictures' pairs within {distance} bits")


if __name__ == "__main__":
    main()
