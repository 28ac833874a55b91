"""Pictures per second into ready batches, beside a plain DataLoader.

    python benchmarks/loading.py                       # the photographs, else drawn pictures
    python benchmarks/loading.py --rounds 5 --workers 2 --views train

Each side loads the same files with the same number of workers into batches of 32 normalised
images of 224 x 224 pixels. The sides take turns, so that whatever else the machine does meets
all of them; the ratio is that of the medians. "ImageFolder" is
`torch.utils.data.DataLoader` over `torchvision.datasets.ImageFolder` with the transforms of
the lesson on transfer learning: PIL pictures, resize 256, centre crop 224 (or random resized
crop and flip), normalise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, DataLoader
from torchvision import datasets, transforms

from transferkit.data import ImageDataset, ImageLoader, load_folders
from transferkit.data.ants_bees import find_ants_bees
from transferkit.images import Preprocess
from transferkit.images.preprocess import IMAGENET_MEAN, IMAGENET_STD

BATCH_SIZE = 32


def make_peer(root: Path, views: str, num_workers: int) -> Callable[[], Iterable[Any]]:
    """Return a function that starts a pass of the plain loader, whose workers persist."""
    geometry = (
        [transforms.Resize(256), transforms.CenterCrop(224)]
        if views == "eval"
        else [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    )
    transform = transforms.Compose(
        [*geometry, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )
    parts = [
        datasets.ImageFolder(
            str(root / split), transform, is_valid_file=lambda path: "NotFound" not in path
        )
        for split in ("train", "val")
    ]
    loader: DataLoader[Any] = DataLoader(
        ConcatDataset(parts),
        batch_size=BATCH_SIZE,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    return lambda: (images for images, _ in loader)


def make_ours(root: Path, views: str, **options: Any) -> Callable[[], Iterable[Any]]:
    """Return a function that starts a pass of our loader."""
    splits = load_folders(root)
    paths = [*splits.train.paths, *splits.val.paths]
    targets = [*splits.train.targets.tolist(), *splits.val.targets.tolist()]
    dataset = ImageDataset(paths, targets, class_names=splits.class_names)
    preprocess = Preprocess()
    transform = preprocess.eval() if views == "eval" else preprocess.train("tutorial")
    decoder = options.pop("decoder", "torchvision")
    dataset = dataset.with_decode(Preprocess(decoder=decoder).decode)
    loader = ImageLoader(dataset, transform, batch_size=BATCH_SIZE, **options)
    return lambda: (batch.images for batch in loader.batches())


def measure(run: Callable[[], Iterable[Any]]) -> float:
    """Return pictures per second of one pass."""
    start = time.perf_counter()
    count = sum(len(images) for images in run())
    return count / (time.perf_counter() - start)


def main() -> None:
    """Read the arguments, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--views", choices=("eval", "train"), default="eval")
    options = parser.parse_args()
    root = find_ants_bees().root
    count = options.workers
    sides: dict[str, Callable[[], Iterable[Any]]] = {
        "ImageFolder": make_peer(root, options.views, count)
    }
    for worker_type in ("thread", "process") if count else ("thread",):
        for decoder in ("torchvision", "pillow"):
            sides[f"transferkit, {worker_type}, {decoder}"] = make_ours(
                root, options.views, num_workers=count, worker_type=worker_type, decoder=decoder
            )
    sides["transferkit, thread, kept in memory"] = make_ours(
        root, options.views, num_workers=count, worker_type="thread", cache_bytes=2**30
    )
    for run in sides.values():
        measure(run)  # Starts the workers, fills the file cache.
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, run in sides.items():
            rates[name].append(measure(run))
    base = statistics.median(rates["ImageFolder"])
    print(f"{options.views} transform, {count} workers, {options.rounds} rounds, {root}")
    print(f"{'side':40} {'pictures/s':>10} {'lowest':>8} {'highest':>8} {'ratio':>6}")
    for name, values in rates.items():
        median = statistics.median(values)
        spread = f"{min(values):8.0f} {max(values):8.0f}"
        print(f"{name:40} {median:10.0f} {spread} {median / base:6.2f}")


if __name__ == "__main__":
    main()
