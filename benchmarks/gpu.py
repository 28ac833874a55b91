"""Fine-tuning on a GPU, beside the plain loop with AMP and a bare loop, as a table in Markdown.

    pip install -e ".[offline]"
    python benchmarks/gpu.py                         # the photographs, else drawn pictures
    python benchmarks/gpu.py --backbone resnet18 --batch-size 32 --epochs 4

The whole network trains by SGD, on the same files with the same augmentation, in the precision of
`--precision`; weights are random, since speed needs none. "loop" is the PyTorch lesson on transfer
learning as one writes it for a GPU: worker processes, `pin_memory`, `non_blocking`, autocast, and a
scaler for float16. "bare" is no peer: it loads nothing and computes no metrics, but trains on
batches that lie on the device, with the channels last. "transferkit" is `Trainer`.

The pictures are shown `--repeat` times in an epoch, so that it lasts some seconds. The first epoch
is a warm-up, and the fastest of the others counts, training apart from validation. "speed / loop"
is the number of pictures a second over that of the loop, "speed / bare" over that of the bare loop.
Without an accelerator it says so, and ends.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

import transferkit as tk
from transferkit._device import describe_device
from transferkit.data.ants_bees import find_ants_bees
from transferkit.data.loader import num_cores
from transferkit.training import Callback

LR, MOMENTUM = 0.001, 0.9
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Clock:
    """Take the times of training epochs and of validation, when the device is through."""

    train: list[float] = field(default_factory=list)
    val: list[float] = field(default_factory=list)

    @contextmanager
    def timing(self, times: list[float]) -> Iterator[None]:
        """Add the seconds of a block."""
        torch.accelerator.synchronize()
        start = time.perf_counter()
        yield
        torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)


@dataclass(frozen=True)
class Task:
    """What each side is given.

    Args:
        data: The pictures.
        backbone: The network's name.
        batch_size: Pictures in a batch.
        epochs: Passes over them.
        workers: Threads or processes that load pictures.
        precision: "fp32", "bf16" or "fp16".
        device: The accelerator.
        clock: Takes the times.
    """

    data: tk.ImageSplits
    backbone: str
    batch_size: int
    epochs: int
    workers: int
    precision: str
    device: torch.device
    clock: Clock

    def model(self) -> tk.Classifier:
        """Return the network with random weights."""
        return tk.build_model(self.backbone, self.data.num_classes, weights=None, seed=0)

    def autocast(self) -> Any:
        """Return what a forward pass runs in."""
        dtype = DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def scaler(self) -> torch.amp.GradScaler:
        """Return what scales the losses of float16, and does nothing to others."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")


class Pictures(torch.utils.data.Dataset[Any]):
    """A split under torchvision's transforms, read by Pillow."""

    def __init__(self, dataset: tk.ImageDataset, transform: Any) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        with Image.open(self.dataset.paths[index]) as image:
            return self.transform(image.convert("RGB")), int(self.dataset.targets[index])


def make_loaders(task: Task, model: tk.Classifier) -> dict[str, DataLoader[Any]]:
    """Return the plain loop's loaders, with the transforms of the lesson."""
    preprocess = model.preprocess
    size = preprocess.crop_size
    ends = [transforms.ToTensor(), transforms.Normalize(preprocess.mean, preprocess.std)]
    starts = {
        "train": [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()],
        "val": [transforms.Resize(preprocess.resize_size), transforms.CenterCrop(size)],
    }
    return {
        split: DataLoader(
            Pictures(task.data.named()[split], transforms.Compose([*start, *ends])),
            batch_size=task.batch_size,
            shuffle=split == "train",
            num_workers=task.workers,
            pin_memory=True,
            persistent_workers=task.workers > 0,
        )
        for split, start in starts.items()
    }


def run_loop(task: Task) -> None:
    """Train as the PyTorch lesson on transfer learning does, with AMP."""
    model = task.model().to(task.device)
    loaders, scaler, criterion = make_loaders(task, model), task.scaler(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    for _ in range(task.epochs):
        for split, times in (("train", task.clock.train), ("val", task.clock.val)):
            model.train(split == "train")
            running_loss, hits = 0.0, 0
            with task.clock.timing(times):
                for batch in loaders[split]:
                    inputs, labels = (each.to(task.device, non_blocking=True) for each in batch)
                    optimizer.zero_grad()
                    with torch.set_grad_enabled(split == "train"):
                        with task.autocast():
                            outputs = model(inputs)
                            loss = criterion(outputs, labels)
                        if split == "train":
                            scaler.scale(loss).backward()
                            scaler.step(optimizer)
                            scaler.update()
                    running_loss += loss.item() * len(inputs)
                    hits += int((outputs.argmax(1) == labels).sum())


def run_bare(task: Task) -> None:
    """Train on batches that lie on the device, and do nothing else."""
    model = task.model().to(task.device).to(memory_format=torch.channels_last).train()
    size, scaler, criterion = model.preprocess.crop_size, task.scaler(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    images = torch.randn(task.batch_size, 3, size, size, device=task.device)
    images = images.to(memory_format=torch.channels_last)
    targets = torch.arange(task.batch_size, device=task.device) % task.data.num_classes
    for _ in range(task.epochs):
        with task.clock.timing(task.clock.train):
            for first in range(0, len(task.data.train), task.batch_size):
                count = min(task.batch_size, len(task.data.train) - first)
                optimizer.zero_grad(set_to_none=True)
                with task.autocast():
                    loss = criterion(model(images[:count]), targets[:count])
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()


class Times(Callback):
    """Tell the clock when training and validation of an epoch end."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.start = self.last_step = 0.0

    def on_epoch_start(self, trainer: tk.Trainer, epoch: int) -> None:
        """Begin an epoch."""
        torch.accelerator.synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, trainer: tk.Trainer, step: int) -> None:
        """End training after its last step."""
        if step == trainer.steps_per_epoch:
            torch.accelerator.synchronize()
            self.last_step = time.perf_counter()
            self.clock.train.append(self.last_step - self.start)

    def on_epoch_end(self, trainer: tk.Trainer, record: tk.EpochRecord) -> None:
        """End validation."""
        self.clock.val.append(time.perf_counter() - self.last_step)


def run_transferkit(task: Task) -> None:
    """Train by `Trainer`."""
    tk.Trainer(
        task.model(),
        task.data,
        optimizer="sgd",
        lr=LR,
        momentum=MOMENTUM,
        backbone_lr_factor=1.0,
        scheduler="none",
        augmentation="tutorial",
        batch_size=task.batch_size,
        precision=task.precision,
        num_workers=task.workers,
        device=task.device,
        callbacks=[Times(task.clock)],
        verbose=False,
    ).fit(task.epochs)


SIDES: dict[str, Callable[[Task], None]] = {
    "loop": run_loop,
    "bare": run_bare,
    "transferkit": run_transferkit,
}


def report(speeds: dict[str, float], clocks: dict[str, Clock]) -> None:
    """Print a row for each side."""
    print(
        "| side | pictures/s | s / training epoch | s / validation | speed / loop "
        "| speed / bare |\n|---|---|---|---|---|---|"
    )
    for side, speed in speeds.items():
        clock = clocks[side]
        cells = (
            side,
            f"{speed:.0f}",
            f"{min(clock.train[1:]):.2f}",
            f"{min(clock.val[1:]):.2f}" if clock.val else "",
            f"{speed / speeds['loop']:.2f}",
            f"{speed / speeds['bare']:.2f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Read the arguments, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3, help="with the warm-up, at least 2")
    parser.add_argument("--repeat", type=int, default=10, help="shows of a picture in an epoch")
    parser.add_argument("--workers", type=int, default=num_cores())
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16")
    options = parser.parse_args()
    if options.epochs < 2 or options.repeat < 1:
        parser.error("--epochs should be at least 2, --repeat at least 1.")
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        sys.exit("needs an accelerator: PyTorch finds none on this machine.")
    root = find_ants_bees().root
    data = tk.load_folders(root)
    places = list(range(len(data.train))) * options.repeat
    data = tk.ImageSplits(data.train.subset(places), data.val)
    print(
        f"{options.backbone} on {describe_device(device)}, {options.precision}, batches of "
        f"{options.batch_size}, {len(places)} pictures an epoch, {options.workers} workers, "
        f"{root.name}, PyTorch {torch.__version__}\n"
    )
    speeds, clocks = {}, {side: Clock() for side in SIDES}
    for side, run in SIDES.items():
        torch.manual_seed(0)
        run(
            Task(
                data,
                options.backbone,
                options.batch_size,
                options.epochs,
                options.workers,
                options.precision,
                device,
                clocks[side],
            )
        )
        speeds[side] = len(places) / min(clocks[side].train[1:])
    report(speeds, clocks)


if __name__ == "__main__":
    main()
