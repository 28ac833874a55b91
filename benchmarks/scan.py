"""Seconds and memory of scanning many file names, beside torchvision's ImageFolder.

    python benchmarks/scan.py --files 1000000 --classes 100 --folder /dev/shm

makes empty files in a temporary folder, and scans them in a fresh process for each side:
`transferkit.data.load_folder` and `torchvision.datasets.ImageFolder`. "held" is the resident
memory that the data set takes, "peak" the most that the scan took, "sent" what is pickled for
a worker process that is not forked (ours is shared, and sent as handles).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import gc, io, json, resource, sys, time
from multiprocessing.reduction import ForkingPickler

side, root = sys.argv[1:]
if side == "transferkit":
    from transferkit.data import load_folder as scan
else:
    from torchvision.datasets import ImageFolder as scan

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

before = resident()
start = time.perf_counter()
dataset = scan(root)
seconds = time.perf_counter() - start
gc.collect()
held = resident() - before
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
if side == "transferkit":
    dataset.share_memory()
sent = len(ForkingPickler.dumps(dataset))
print(json.dumps({"files": len(dataset), "seconds": seconds, "held": held, "peak": peak,
                  "sent": sent}))
"""


def make_files(root: Path, num_files: int, num_classes: int) -> None:
    """Write empty files with names like a camera's."""
    for label in range(num_classes):
        folder = root / f"class {label:04}"
        folder.mkdir(parents=True)
        for number in range(label, num_files, num_classes):
            (folder / f"IMG_2024{number:08}_{number % 97:02}.jpg").touch()


def measure(side: str, root: Path) -> dict[str, float]:
    """Scan in a process of its own."""
    command = [sys.executable, "-c", CHILD, side, str(root)]
    child = subprocess.run(command, capture_output=True, check=True)
    found: dict[str, float] = json.loads(child.stdout)
    return found


def main() -> None:
    """Read the arguments, make the files, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to make them; default: the system's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder, "pictures")
        make_files(root, options.files, options.classes)
        sides = ("ImageFolder", "transferkit")
        rounds = [{side: measure(side, root) for side in sides} for _ in range(options.rounds)]
    best = {
        side: {key: min(each[side][key] for each in rounds) for key in rounds[0][side]}
        for side in sides
    }
    print(f"{options.files} files in {options.classes} classes, best of {options.rounds} rounds")
    print(f"{'':14}{'seconds':>9}{'held MiB':>10}{'peak MiB':>10}{'sent MiB':>10}")
    for side, values in best.items():
        sizes = "".join(f"{values[key] / 2**20:10.2f}" for key in ("held", "peak", "sent"))
        print(f"{side:14}{values['seconds']:9.2f}{sizes}")
    ours, peer = best["transferkit"], best["ImageFolder"]
    keys = ("seconds", "held", "peak", "sent")
    print("ratio         " + "  ".join(f"{key} {peer[key] / ours[key]:.1f}" for key in keys))


if __name__ == "__main__":
    main()
