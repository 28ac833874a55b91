"""A pass over validation pictures on the CPU: its batch size, and what keeping the pixels saves.

Run it alone on the machine; the pictures are the photographs of ants and bees where they are,
else drawn ones:

    python benchmarks/validation.py
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from transferkit import build_model, load_folders
from transferkit._allocator import buffers_kept
from transferkit.data import ImageLoader, ImageSplits
from transferkit.data.ants_bees import find_ants_bees
from transferkit.data.prefetch import to_images
from transferkit.models import Classifier
from transferkit.training.resident import KeptBatches

BACKBONES = ("resnet18", "mobilenet_v3_small", "efficientnet_lite0")
BATCH_SIZES = (16, 32, 64)
NUM_IMAGES = 128
REPEATS = 5
CPU = torch.device("cpu")


def measure_batches(backbone: str) -> None:
    """Print the pictures that the network takes in a second, by batch size, in turns."""
    model = build_model(backbone, 2, weights=None).to(memory_format=torch.channels_last).eval()
    size = model.preprocess.crop_size
    images = torch.rand(NUM_IMAGES, 3, size, size).contiguous(memory_format=torch.channels_last)
    model(images[:16])
    seconds: dict[int, list[float]] = {each: [] for each in BATCH_SIZES}
    for _ in range(REPEATS):
        for batch_size, found in seconds.items():
            start = time.perf_counter()
            for part in torch.split(images, batch_size):
                model(part)
            found.append(time.perf_counter() - start)
    rates = {each: NUM_IMAGES / statistics.median(found) for each, found in seconds.items()}
    shown = ", ".join(f"{rate:.0f} in batches of {each}" for each, rate in rates.items())
    spread = max(max(found) / min(found) for found in seconds.values())
    print(f"{backbone}: {shown} pictures/s; runs of the same differ by up to {spread - 1:.0%}")


def measure_pixels(data: ImageSplits, model: Classifier) -> None:
    """Print what the pictures of a pass take to load: the first time, and from kept pixels."""
    transform = model.preprocess.eval(normalize=False)
    loader = ImageLoader(data.val, transform, batch_size=32, num_workers=0)
    kept = KeptBatches(loader, CPU, budget=2**32)
    for words in ("the first pass", "the second", "the third"):
        start = time.perf_counter()
        for _ in to_images(kept.batches(), model.preprocess):
            pass
        passed = 1000 * (time.perf_counter() - start) / len(data.val)
        print(f"loading in {words}: {passed:.2f} ms for a picture")
    kept.close()


def main() -> None:
    """Measure both."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args()
    with buffers_kept(), torch.no_grad():
        data = load_folders(find_ants_bees().root)
        measure_pixels(data, build_model(BACKBONES[0], 2, weights=None))
        for backbone in BACKBONES:
            measure_batches(backbone)


if __name__ == "__main__":
    main()
