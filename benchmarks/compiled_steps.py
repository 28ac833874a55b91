"""What `torch.compile` changes in a training step on the CPU, and how long it takes to compile.

Run it alone on the machine; it needs a C++ compiler:

    python benchmarks/compiled_steps.py
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from transferkit import build_model
from transferkit._allocator import buffers_kept

BACKBONES = ("resnet18", "efficientnet_lite0")
BATCH_SIZE = 32
REPEATS = 7


def seconds_of(run: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def make_step(model: nn.Module, size: int) -> Callable[[], None]:
    """Return what trains the model on a batch of noise once."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.rand(BATCH_SIZE, 3, size, size).contiguous(memory_format=torch.channels_last)
    targets = torch.arange(BATCH_SIZE) % 2

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def measure(backbone: str) -> None:
    """Print the time to compile, and both steps, measured in turns."""
    model = build_model(backbone, 2, weights=None).to(memory_format=torch.channels_last).train()
    compiled = copy.deepcopy(model)
    compiled.compile()
    steps = [make_step(each, model.preprocess.crop_size) for each in (model, compiled)]
    steps[0]()
    first = seconds_of(steps[1])
    steps[1]()
    pairs = [[seconds_of(step) for step in steps] for _ in range(REPEATS)]
    plain, fast = (statistics.median(each) for each in zip(*pairs, strict=True))
    saved = plain - fast
    repaid = f"repaid after {first / saved:.0f} steps" if saved > 0 else "never repaid"
    print(
        f"{backbone}: {BATCH_SIZE} pictures take {plain:.2f} s as written, {fast:.2f} s compiled "
        f"(ratio {fast / plain:.2f}); compiling took {first:.0f} s, {repaid}"
    )


def main() -> None:
    """Measure all, or one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", choices=BACKBONES, help="measure this one alone")
    only = parser.parse_args().backbone
    with buffers_kept():
        for backbone in [only] if only else BACKBONES:
            measure(backbone)


if __name__ == "__main__":
    main()
