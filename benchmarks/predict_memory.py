"""Peak memory of predicting few and many pictures, as a table in Markdown.

    python benchmarks/predict_memory.py
    python benchmarks/predict_memory.py --counts 1000 10000 --doors predict_many

A generator gives the paths of 50 drawn pictures again and again, and each run has a process of its
own. The network is tiny and sees 32 x 32 pixels, so that 100,000 pictures take a minute or two:
what grows with their number would do so in any network. "peak MiB" is the most that the process
held, with PyTorch and all; "growth" is what it held beyond the run of the fewest. `predict_to_file`
computes each picture (`duplicates="each"`) and keeps some 8 bytes of it in memory.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

DOORS = ("predict_many", "predict_to_file")
ENGINES = ("pytorch", "openvino", "onnxruntime")


def predict(door: str, engine: str, folder: Path, count: int) -> None:
    """Predict so many pictures, and print seconds and the peak in bytes."""
    from torch import nn

    import transferkit as tk
    from transferkit.data.folders import find_images

    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    preprocess = tk.Preprocess(crop_size=32, resize_size=32)
    model = tk.Classifier(
        network, num_features=8, num_classes=2, backbone_name="tiny", preprocess=preprocess
    )
    predictor = tk.Predictor(
        model,
        class_names=["blue", "red"],
        device="cpu",
        engine=engine,  # type: ignore[arg-type]
    )
    begun = time.perf_counter()
    paths = itertools.islice(itertools.cycle(find_images(folder / "pictures")), count)
    if door == "predict_many":
        found = sum(1 for _ in predictor.predict_many(paths))
    else:
        report = tk.predict_to_file(predictor, paths, folder / "out.csv", duplicates="each")
        found = report.num_predicted
    if found != count:
        raise RuntimeError(f"{found} pictures were predicted, not {count}.")
    print(time.perf_counter() - begun, peak_bytes())


def peak_bytes() -> int:
    """Return the most memory that this process held; only Linux tells."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def measure(door: str, engine: str, counts: list[int]) -> Iterator[tuple[int, float, float]]:
    """Yield for each number of pictures the number, the seconds and the peak in MiB."""
    from transferkit.testing import make_image_folder

    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            make_image_folder(Path(name, "pictures"), num_train=20, num_val=5)
            command = [sys.executable, __file__, "--run", door, engine, name, str(count)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            seconds, peak = done.stdout.split()
            yield count, float(seconds), float(peak) / 2**20


def main() -> None:
    """Read the arguments, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--doors", nargs="+", choices=DOORS, default=list(DOORS))
    parser.add_argument("--engine", choices=ENGINES, default="pytorch")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        door, engine, folder, count = options.run
        predict(door, engine, Path(folder), int(count))
        return
    print("| door | engine | pictures | seconds | peak MiB | growth |\n|---|---|---|---|---|---|")
    for door in options.doors:
        first = None
        for count, seconds, peak in measure(door, options.engine, sorted(options.counts)):
            first = peak if first is None else first
            cells = f"{door} | {options.engine} | {count:,} | {seconds:.1f} | {peak:.0f}"
            print(f"| {cells} | {peak - first:.1f} |", flush=True)


if __name__ == "__main__":
    main()
