"""Linear probing from pictures on disk to the best weights, beside the plain PyTorch loop.

    python benchmarks/probe.py --seeds 3            # the photographs, else drawn pictures
    python benchmarks/probe.py --sides loop views=0 --epochs 5 --seeds 1

"loop" is the PyTorch lesson on transfer learning: ImageFolder, DataLoader with batches of 4 and 4
workers, `requires_grad = False`, SGD with learning rate 0.001 and momentum 0.9, a tenth of it every
7 epochs, the best epoch's weights kept. The other sides are `Trainer` with its recipe for probing
(batches of 16, learning rate 0.01 along a cosine) and a `FeatureCache`. All train a new last layer
on the same EfficientNet-Lite0 with the same weights, for the same number of epochs, each in a
process of its own, one after the other; imports are not timed. "ratio" is the loop's time over a
side's in the same round, the median over the rounds. Memory is the most that a side's processes
held together (proportional set size), above what they held once everything was imported, sampled in
a short run of its own, so that the sampling takes no time from what is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

SIDES: dict[str, dict[str, Any]] = {
    "loop": {},
    "views=0": {"cache": {"views": 0}},
    "views=4": {"cache": {"views": 4}},
    "views=epochs": {"cache": {"views": "epochs"}},
    "views=0, lbfgs": {"cache": {"views": 0}, "solver": "lbfgs"},
    "views=0, openvino": {"cache": {"views": 0, "engine": "openvino"}},
    "views=0, openvino, bfloat16": {
        "cache": {"views": 0, "engine": "openvino", "precision": "bfloat16"}
    },
    "not cached": {"cache": False},
}
DEFAULT_SIDES = [name for name in SIDES if name not in ("not cached",)]
BACKBONE = "efficientnet_lite0"
MEMORY_EPOCHS = 4


def run_loop(root: Path, *, epochs: int, seed: int) -> float:
    """Train as the lesson does; return the best validation accuracy."""
    import copy

    import torch
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    import transferkit as tk

    torch.manual_seed(seed)
    preprocess = tk.get_backbone(BACKBONE).preprocess
    ends = [transforms.ToTensor(), transforms.Normalize(preprocess.mean, preprocess.std)]
    resize = transforms.Resize(preprocess.resize_size, transforms.InterpolationMode.BICUBIC)
    starts = {
        "train": [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()],
        "val": [resize, transforms.CenterCrop(224)],
    }
    sets = {
        split: datasets.ImageFolder(
            str(root / split),
            transforms.Compose([*start, *ends]),
            is_valid_file=lambda path: "NotFound" not in path,
        )
        for split, start in starts.items()
    }
    loaders = {
        split: DataLoader(each, batch_size=4, shuffle=True, num_workers=4)
        for split, each in sets.items()
    }
    model: nn.Module = tk.build_model(BACKBONE, len(sets["train"].classes), seed=seed)
    for parameter in model.backbone.parameters():  # type: ignore[union-attr]
        parameter.requires_grad = False
    nn.Module.train(model)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.001, momentum=0.9)  # type: ignore[union-attr]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    best, weights = 0.0, copy.deepcopy(model.state_dict())
    for _ in range(epochs):
        for split in ("train", "val"):
            model.train(split == "train")
            hits = 0
            for images, targets in loaders[split]:
                optimizer.zero_grad()
                with torch.set_grad_enabled(split == "train"):
                    logits = model(images)
                    loss = criterion(logits, targets)
                    if split == "train":
                        loss.backward()
                        optimizer.step()
                hits += int((logits.argmax(1) == targets).sum())
            if split == "train":
                scheduler.step()
            elif hits / len(sets["val"]) > best:
                best, weights = hits / len(sets["val"]), copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    return best


def run_ours(root: Path, settings: dict[str, Any], *, epochs: int, seed: int) -> float:
    """Train with a feature cache; return the best validation accuracy."""
    import transferkit as tk

    options = dict(settings)
    if options["cache"]:
        options["cache"] = tk.FeatureCache(**options["cache"])
    data = tk.load_folders(root)
    model = tk.build_model(BACKBONE, data.num_classes, freeze="backbone", seed=seed)
    trainer = tk.Trainer(model, data, seed=seed, verbose=False, **options)
    return trainer.fit(epochs).best.val_accuracy


def run_child(side: str, root: Path, epochs: int, seed: int) -> None:
    """Run one side in this process, and print what it found."""
    import timm  # noqa: F401 - so that no side pays for its import
    import torch  # noqa: F401
    import torchvision  # noqa: F401

    import transferkit.training  # noqa: F401

    if "openvino" in side:
        import openvino  # noqa: F401
    print(json.dumps({"ready": True}), flush=True)
    start = time.perf_counter()
    if side == "loop":
        accuracy = run_loop(root, epochs=epochs, seed=seed)
    else:
        accuracy = run_ours(root, SIDES[side], epochs=epochs, seed=seed)
    print(json.dumps({"seconds": time.perf_counter() - start, "accuracy": accuracy}), flush=True)


def held_bytes(pid: int) -> int:
    """Return the proportional set size of a process and its children; only Linux tells it."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return 0
    own = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return 1024 * own + sum(held_bytes(int(child)) for child in children)


def start_child(side: str, root: Path, epochs: int, seed: int) -> subprocess.Popen[str]:
    """Start a process for one side, and wait until it has imported everything."""
    command = [sys.executable, __file__, "--child", side, str(root), str(epochs), str(seed)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    return child


def read_child(child: subprocess.Popen[str], side: str) -> dict[str, float]:
    """Return what a side found."""
    assert child.stdout is not None
    line = child.stdout.readline()
    if child.wait() or not line:
        raise RuntimeError(f"The side {side!r} failed.")
    found: dict[str, float] = json.loads(line)
    return found


def measure(side: str, root: Path, *, epochs: int, seed: int) -> dict[str, float]:
    """Run one side in a process of its own; return its seconds and its accuracy."""
    return read_child(start_child(side, root, epochs, seed), side)


def measure_memory(side: str, root: Path, *, epochs: int) -> int:
    """Return the most bytes that one side's processes hold together in a short run."""
    child = start_child(side, root, epochs, 0)
    before, peak, ended = held_bytes(child.pid), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.1):
            peak = max(peak, held_bytes(child.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        read_child(child, side)
    finally:
        ended.set()
        watcher.join()
    return max(0, peak - before)


def report(
    rounds: list[dict[str, dict[str, float]]], memory: dict[str, int], sides: list[str]
) -> None:
    """Print the table."""
    print("| side | seconds | ratio | best val accuracy by seed | mean | peak memory, MiB |")
    print("|---|---|---|---|---|---|")
    for side in sides:
        runs = [each[side] for each in rounds]
        ratios = [each["loop"]["seconds"] / each[side]["seconds"] for each in rounds]
        accuracies = [run["accuracy"] for run in runs]
        print(
            f"| {side} | {statistics.median(run['seconds'] for run in runs):.1f} "
            f"| {statistics.median(ratios):.1f} "
            f"| {', '.join(f'{each:.4f}' for each in accuracies)} "
            f"| {statistics.mean(accuracies):.4f} "
            f"| {memory[side] / 2**20:.0f} |"
        )


def main() -> None:
    """Read the arguments, measure, print a table."""
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
        return
    import torch

    from transferkit.data.ants_bees import find_ants_bees
    from transferkit.models.engine_facts import has_bfloat16

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=DEFAULT_SIDES)
    options = parser.parse_args()
    sides = ["loop", *(side for side in options.sides if side != "loop")]
    if not has_bfloat16(torch.device("cpu")):
        left_out = [side for side in sides if "bfloat16" in side]
        sides = [side for side in sides if side not in left_out]
        if left_out:
            print(f"left out, since this processor has no bfloat16: {'; '.join(left_out)}")
    root = find_ants_bees().root
    print(
        f"{options.epochs} epochs of {BACKBONE} on {root.name}, {options.seeds} seeds", flush=True
    )
    rounds = []
    for seed in range(options.seeds):
        found = {}
        for side in sides:
            found[side] = measure(side, root, epochs=options.epochs, seed=seed)
            print(f"seed {seed} {side}: {found[side]['seconds']:.1f} s", file=sys.stderr)
        rounds.append(found)
    # Each view is computed within the first epochs, so that a few show the most.
    memory = {side: measure_memory(side, root, epochs=MEMORY_EPOCHS) for side in sides}
    report(rounds, memory, sides)


if __name__ == "__main__":
    main()
