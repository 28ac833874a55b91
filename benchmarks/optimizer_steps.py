"""What share of a training step on the CPU is the optimizer's: by default, foreach and fused.

Run it alone on the machine:

    python benchmarks/optimizer_steps.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from transferkit import build_model
from transferkit._allocator import buffers_kept

BACKBONES = ("resnet18", "efficientnet_lite0")
BATCH_SIZE = 16
OPTIMIZERS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}, "AdamW": {}}
WAYS: dict[str, dict[str, bool]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def fastest(run: Callable[[], object], count: int) -> float:
    """Return the seconds of the fastest of some runs, after one that warms up."""
    run()
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(backbone: str) -> None:
    """Print what an update takes beside forward and backward pass."""
    model = build_model(backbone, 2, weights=None).to(memory_format=torch.channels_last).train()
    size = model.preprocess.crop_size
    images = torch.rand(BATCH_SIZE, 3, size, size).contiguous(memory_format=torch.channels_last)
    targets = torch.arange(BATCH_SIZE) % 2

    def step() -> None:
        nn.functional.cross_entropy(model(images), targets).backward()  # type: ignore[no-untyped-call]

    whole = fastest(step, 2)
    print(f"{backbone}: {whole:.2f} s for forward and backward of {BATCH_SIZE} pictures")
    for name, options in OPTIMIZERS.items():
        for way, more in WAYS.items():
            optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-5, **options, **more)
            seconds = fastest(optimizer.step, 5)
            print(f"  {name:6}{way:8}{1000 * seconds:6.1f} ms  {seconds / whole:.1%}")


def main() -> None:
    """Measure all."""
    with buffers_kept():
        for backbone in BACKBONES:
            measure(backbone)


if __name__ == "__main__":
    main()
