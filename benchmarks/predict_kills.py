"""Kill a bulk prediction again and again, and look whether the output has every picture once.

    python benchmarks/predict_kills.py --kills 100

A process predicts a folder, with duplicates and damaged files in it, into a file of JSON lines. It
gets SIGKILL, which nothing can catch, at a random moment, also while it writes the output, and is
started again with `resume`. A run that ends before all kills are used up is followed by another
one. Each has to end in the rows of the run that nobody touched: every picture once, in its order,
with the same label or error. Probabilities may differ by 1e-6: a run that goes on puts pictures
into other batches, on which the last bits of a network depend. With `--batch-size 1` they may not
differ at all.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


def predict(root: Path, name: str, batch_size: int) -> None:
    """Run the prediction of this name to its end, from its journal."""
    import torch

    import transferkit as tk

    torch.set_num_threads(1)
    model = tk.build_model("squeezenet1_1", 2, weights=None)
    predictor = tk.Predictor(model, class_names=["blue", "red"], device="cpu", engine="pytorch")
    print("begun", flush=True)
    tk.predict_to_file(
        predictor, root / "pictures", root / f"{name}.jsonl", resume=True, batch_size=batch_size
    )


def make_pictures(folder: Path) -> list[Path]:
    """Draw pictures, copy some and damage some; return all in their order."""
    from transferkit.data.folders import find_images
    from transferkit.testing import make_image_folder

    make_image_folder(folder, num_train=40, num_val=10)
    for number, path in enumerate(find_images(folder)):
        if number % 5 == 0:
            shutil.copyfile(path, path.with_stem(f"{path.stem}_copy"))
        if number % 13 == 0:
            path.with_stem(f"{path.stem}_cut").write_bytes(path.read_bytes()[:40])
    return find_images(folder)


def start(root: Path, name: str, batch_size: int) -> subprocess.Popen[str]:
    """Start the prediction in a process of its own, and wait until it begins."""
    command = [sys.executable, __file__, "--predict", str(root), name]
    command += ["--batch-size", str(batch_size)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def run_with_kills(root: Path, name: str, waits: Sequence[float], batch_size: int) -> int:
    """Run to the end, killed after each of these seconds; return how many kills it took."""
    out = root / f"{name}.jsonl"
    num_kills = 0
    while not out.exists() or out.with_name(f"{out.name}.journal").exists():
        process = start(root, name, batch_size)
        if num_kills < len(waits):
            time.sleep(waits[num_kills])
            process.send_signal(signal.SIGKILL)
        num_kills += process.wait() == -signal.SIGKILL
    return num_kills


def read(path: Path) -> tuple[list[tuple[str, str | None, str | None]], list[float]]:
    """Return the rows of an output, and their probabilities."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [(each["path"], each.get("label"), each.get("error")) for each in records]
    return rows, [each["probability"] for each in records if "probability" in each]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--predict", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.predict:
        predict(Path(options.predict[0]), options.predict[1], options.batch_size)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return compare(Path(folder), options)


def compare(root: Path, options: argparse.Namespace) -> int:
    """Kill runs and compare them with one that was left alone; return the exit code."""
    rng = random.Random(options.seed)
    paths = make_pictures(root / "pictures")
    whole = start(root, "whole", options.batch_size)
    begun = time.perf_counter()
    whole.wait()
    seconds = time.perf_counter() - begun
    rows, values = read(root / "whole.jsonl")
    assert [path for path, _, _ in rows] == [str(path) for path in paths]
    num_kills = num_runs = num_good = num_same = 0
    while num_kills < options.kills:
        num_runs += 1
        name = f"run{num_runs}"
        waits = [rng.uniform(0, seconds / 4) for _ in range(options.kills - num_kills)]
        num_kills += run_with_kills(root, name, waits, options.batch_size)
        found, others = read(root / f"{name}.jsonl")
        distance = max(abs(one - other) for one, other in zip(values, others, strict=True))
        num_good += found == rows and distance <= (0 if options.batch_size == 1 else 1e-6)
        num_same += found == rows and distance == 0
        print(
            f"{num_kills} kills, {num_runs} runs, {num_good} right, off by {distance:.1e}",
            flush=True,
        )
    print(
        f"{num_good} of {num_runs} runs over {len(paths)} pictures, killed {num_kills} times, have "
        f"every picture once with its label; {num_same} have the same bits"
    )
    return int(num_good != num_runs)


if __name__ == "__main__":
    sys.exit(main())
