"""Decode mutants of pictures of every format, in a process of its own; see `test_fuzz_decode`.

    python tests/images/fuzz_decode.py --seed 0 --first 0 --count 500

prints one line of JSON with what happened. A crash, a hang or a foreign exception ends it.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from transferkit.errors import ImageError
from transferkit.images import SUPPORTED_FORMATS, Decoder, decode_image

MAX_SECONDS = 5
MAX_PIXELS = 10_000_000
DECODERS: tuple[Decoder, ...] = ("torchvision", "pillow")
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def make_seeds() -> list[tuple[str, bytes]]:
    """Return small files of every format, in several modes."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((61, 47))
    exif = Image.Exif()
    exif[0x0112] = 6
    options: list[tuple[str, str, dict[str, Any]]] = [
        ("JPEG", "RGB", {"exif": exif}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {"exif": exif}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "1", {}),
        ("WEBP", "RGB", {"exif": exif}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("GIF", "P", {"save_all": True, "append_images": [smooth.rotate(90).convert("P")]}),
        ("BMP", "RGB", {}),
        ("BMP", "P", {}),
        ("TIFF", "RGB", {"exif": exif}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "RGB", {"compression": "tiff_adobe_deflate"}),
        ("TIFF", "RGB", {"compression": "jpeg"}),
        ("TIFF", "1", {"compression": "group4"}),
        ("TIFF", "L", {"compression": "packbits"}),
    ]
    seeds = []
    for kind, mode, extra in options:
        file = io.BytesIO()
        smooth.convert(mode).save(file, kind, **extra)
        seeds.append((kind, file.getvalue()))
    assert {kind for kind, _ in seeds} == set(SUPPORTED_FORMATS)
    return seeds


def mutate(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Return the bytes with something wrong in them."""
    out = bytearray(data)
    kind = rng.integers(7)
    place = int(rng.integers(len(out)))
    # Headers are where lies do most: half of all places lie there.
    if rng.random() < 0.5:
        place = int(rng.integers(min(200, len(out))))
    if kind == 0:
        for _ in range(rng.integers(1, 9)):
            out[int(rng.integers(len(out)))] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        out[place:] = b""
    elif kind == 2:
        size = int(rng.integers(1, 64))
        out[place : place + size] = b""
    elif kind == 3:
        size = int(rng.integers(1, 64))
        out[place:place] = out[place : place + size]
    elif kind == 4:
        width = int(rng.choice([1, 2, 4]))
        order = rng.choice(["big", "little"])
        value = int(rng.choice(EXTREMES)) & (256**width - 1)
        out[place : place + width] = value.to_bytes(width, order)
    elif kind == 5:
        out[place:] = other[int(rng.integers(len(other))) :]
    else:
        size = int(rng.integers(1, 64))
        out[place : place + size] = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
    return bytes(out)


def run(seed: int, first: int, count: int) -> dict[str, Any]:
    """Decode the mutants number `first` to `first + count`, both ways."""
    seeds = make_seeds()
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    for number in range(first, first + count):
        rng = np.random.default_rng((seed, number))
        kind, data = seeds[number % len(seeds)]
        mutant = mutate(data, seeds[int(rng.integers(len(seeds)))][1], rng)
        for decoder in DECODERS:
            faulthandler.dump_traceback_later(MAX_SECONDS, exit=True)
            start = time.perf_counter()
            try:
                pixels = decode_image(mutant, decoder=decoder, max_pixels=MAX_PIXELS)
                outcomes[f"{kind} decoded"] += 1
                assert pixels.shape[0] == 3
            except ImageError:
                outcomes[f"{kind} refused"] += 1
            except Exception as error:
                raise AssertionError(f"mutant {number} by {decoder}: {error!r}") from error
            slowest = max(slowest, time.perf_counter() - start)
            faulthandler.cancel_dump_traceback_later()
    return {"outcomes": dict(sorted(outcomes.items())), "slowest": slowest, "peak_mib": peak_mib()}


def peak_mib() -> int:
    """Return the most memory that this program took, in MiB.

    `ru_maxrss` would count what the process that started it had at that time.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM:"))
    return int(peak.split()[1]) // 1024


def main() -> None:
    """Read the arguments and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=500)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # Pillow's about odd tags; they are no one's business here.
    json.dump(run(options.seed, options.first, options.count), sys.stdout)


if __name__ == "__main__":
    main()
