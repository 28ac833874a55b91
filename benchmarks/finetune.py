"""An epoch of fine-tuning, beside the plain loop and other libraries, as a table in Markdown.

    pip install -e ".[benchmarks]"
    python benchmarks/finetune.py                    # the photographs, else drawn pictures
    python benchmarks/finetune.py --backbone resnet18 --only loop transferkit --limit 64

The whole network trains by SGD on batches of 32 in float32, on the same files with the same
augmentation. Each side runs in a process of its own, one after the other, and is written in
`benchmarks/finetune_sides.py` as its library's documentation writes it. "loop" is the PyTorch
lesson on transfer learning. "bare" is no peer: it loads nothing and computes no metrics, but
trains on batches that lie in memory, with the same memory format and allocator as `Trainer`.

The first epoch is a warm-up, and the fastest of the others counts, training and validation apart;
only whole batches are trained on. Each peer has the number of worker processes, of those in
`--workers`, that was faster for it in a run on 64 pictures. "time / peer" is the time of a
side's training epoch over that of the fastest peer, "speed / bare" its speed over that of the bare
loop in the same precision. Memory is the most that the process itself held, without its workers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from transferkit.data.ants_bees import find_ants_bees
from transferkit.models.engine_facts import has_bfloat16

PEERS = ("loop", "fastai", "lightning", "transformers", "skorch")
OURS = ("bare", "transferkit")
NEEDS = {"transformers": ("transformers", "accelerate")}  # Other peers need what they are called.
INSTALL = 'pip install -e ".[benchmarks]"'
TRIAL = {"limit": 64, "epochs": 2}
CHILD = Path(__file__).with_name("finetune_sides.py")


def measure(side: str, **options: Any) -> dict[str, Any] | None:
    """Run one side in a process of its own; return its times, or None where it failed."""
    text = json.dumps({"side": side, **options})
    done = subprocess.run([sys.executable, str(CHILD), text], capture_output=True, text=True)
    if done.returncode:
        print(f"{side} failed:\n{done.stderr[-2000:]}", file=sys.stderr, flush=True)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["seconds"] = min(found["train"][1:])
    found["val_seconds"] = min(found["val"][1:])
    times = ", ".join(f"{each:.2f}" for each in found["train"])
    print(f"{text}: {times} s", file=sys.stderr, flush=True)
    return found


def choose_workers(side: str, counts: list[int], **options: Any) -> int:
    """Return the number of worker processes with which a peer is fastest."""
    if len(counts) == 1:
        return counts[0]
    trials = {count: measure(side, **{**options, **TRIAL, "workers": count}) for count in counts}
    return min(counts, key=lambda count: (trials[count] or {"seconds": float("inf")})["seconds"])


def missing(side: str) -> list[str]:
    """Return the packages that a side needs and that are not installed."""
    needs = NEEDS.get(side, () if side in ("loop", *OURS) else (side,))
    return [name for name in needs if importlib.util.find_spec(name) is None]


def run_sides(
    sides: list[str], precisions: list[str], counts: list[int], **options: Any
) -> dict[tuple[str, str], dict[str, Any] | None]:
    """Measure the sides of one backbone; the peers run in float32 only."""
    found: dict[tuple[str, str], dict[str, Any] | None] = {}
    for side in sides:
        if missing(side):
            continue
        if side in PEERS:
            fixed = {**options, "precision": "fp32"}
            workers = choose_workers(side, counts, **fixed)
            found[side, "fp32"] = measure(side, **fixed, workers=workers)
            if (each := found[side, "fp32"]) is not None:
                each["workers"] = workers
            continue
        for precision in precisions:
            found[side, precision] = measure(side, **options, precision=precision, workers=0)
    return found


def report(
    backbone: str, sides: list[str], found: dict[tuple[str, str], dict[str, Any] | None]
) -> None:
    """Print the rows of one backbone."""
    peers = [each["seconds"] for (side, _), each in found.items() if side in PEERS and each]
    for side in sides:
        if missing(side):
            print(f"| {backbone} | {side} | not installed: `{INSTALL}` | | | | | |", flush=True)
    for (side, precision), run in found.items():
        name = side if precision == "fp32" else f"{side}, {precision}"
        if run is None:
            print(f"| {backbone} | {name} | failed, see above | | | | | |", flush=True)
            continue
        if "workers" in run:
            name = f"{name}, {run['workers']} workers"
        bare = found.get(("bare", precision))
        cells = (
            backbone,
            name,
            f"{run['seconds']:.2f}",
            f"{run['pictures'] / run['seconds']:.1f}",
            "" if side == "bare" else f"{run['val_seconds']:.2f}",
            f"{run['seconds'] / min(peers):.2f}" if peers else "",
            f"{bare['seconds'] / run['seconds']:.2f}" if bare else "",
            "" if run["peak"] is None else f"{run['peak'] / 2**20:.0f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Read the arguments, measure, print the table."""
    everything = (*PEERS, *OURS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", nargs="+", default=["efficientnet_lite0", "resnet18"])
    parser.add_argument("--only", nargs="+", choices=everything, default=list(everything))
    parser.add_argument("--epochs", type=int, default=3, help="with the warm-up, at least 2")
    parser.add_argument("--limit", type=int, help="training pictures, at least 32; all by default")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument(
        "--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"]
    )
    options = parser.parse_args()
    if options.epochs < 2 or (options.limit is not None and options.limit < 32):
        parser.error("--epochs should be at least 2, --limit at least 32.")
    precisions = options.precision
    if "bf16" in precisions and not has_bfloat16(torch.device("cpu")):
        precisions = [each for each in precisions if each != "bf16"]
        print("left out, since this processor has no bfloat16: bf16")
    root = find_ants_bees().root
    print(f"{options.epochs} epochs, {root.name}, PyTorch {torch.__version__}\n")
    print(
        "| backbone | side | s / training epoch | pictures/s | s / validation | time / peer "
        "| speed / bare | peak MiB |\n|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for backbone in options.backbone:
        found = run_sides(
            options.only,
            precisions,
            options.workers,
            root=str(root),
            backbone=backbone,
            epochs=options.epochs,
            limit=options.limit,
        )
        report(backbone, options.only, found)


if __name__ == "__main__":
    main()
