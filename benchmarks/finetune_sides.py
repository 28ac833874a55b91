"""One side of `benchmarks/finetune.py`, in this process: train, and print its times as JSON.

    python benchmarks/finetune_sides.py '{"side": "loop", "root": "hymenoptera_data",
        "backbone": "resnet18", "epochs": 2, "limit": 64, "workers": 2, "precision": "fp32"}'

Each library's side is written as its own documentation writes it, over the same network with the
same weights, the same files, `RandomResizedCrop(224)`, a flip, and SGD.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms

import transferkit as tk

BATCH_SIZE = 32
LR, MOMENTUM = 0.001, 0.9
WITH_WEIGHTS = ("efficientnet_lite0",)  # Those that a package brings; speed needs none.


@dataclass
class Clock:
    """Take the times of epochs, from the end of one to the end of the next.

    A side calls `step_ended` after each training step, and `epoch_ended` when validation and
    whatever else belongs to the epoch is over. Nothing that happens in between is left out.
    """

    train: list[float] = field(default_factory=list)
    val: list[float] = field(default_factory=list)
    pictures: int = 0
    _start: float = field(default_factory=time.perf_counter)
    _last_step: float = 0.0

    def step_ended(self, *_: Any, **__: Any) -> None:
        """Note that a training step is over; the last one of an epoch counts."""
        self._last_step = time.perf_counter()

    def epoch_ended(self, *_: Any, **__: Any) -> None:
        """Note that an epoch is over."""
        now = time.perf_counter()
        self.train.append(self._last_step - self._start)
        self.val.append(now - self._last_step)
        self._start = now

    def count(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Count the pictures that a network is trained on: a forward hook."""
        if model.training:
            self.pictures += len(inputs[0])


@dataclass(frozen=True)
class Task:
    """What each side is given.

    Args:
        model: The network.
        data: The pictures.
        epochs: Passes over them.
        workers: Worker processes of the peers' loaders.
        precision: "fp32" or "bf16"; the peers compute in the first.
        clock: What is called after steps and epochs.
    """

    model: tk.Classifier
    data: tk.ImageSplits
    epochs: int
    workers: int
    precision: str
    clock: Clock

    def folder(self, split: str, transform: Any) -> datasets.ImageFolder:
        """Return the pictures of a split as torchvision reads them."""
        chosen = set(self.data.named()[split].paths)
        root = next(iter(chosen)).parent.parent
        return datasets.ImageFolder(
            str(root), transform, is_valid_file=lambda path: Path(path) in chosen
        )

    def folders(self) -> dict[str, datasets.ImageFolder]:
        """Return both splits with the transforms of the lesson on transfer learning."""
        preprocess = self.model.preprocess
        ends = [transforms.ToTensor(), transforms.Normalize(preprocess.mean, preprocess.std)]
        starts = {
            "train": [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()],
            "val": [transforms.Resize(preprocess.resize_size), transforms.CenterCrop(224)],
        }
        return {
            split: self.folder(split, transforms.Compose([*start, *ends]))
            for split, start in starts.items()
        }

    def loaders(self) -> dict[str, DataLoader[Any]]:
        """Return a plain loader for each split."""
        return {
            split: DataLoader(
                each, batch_size=BATCH_SIZE, shuffle=split == "train", num_workers=self.workers
            )
            for split, each in self.folders().items()
        }

    def sgd(self) -> torch.optim.SGD:
        """Return the optimizer over the whole network."""
        return torch.optim.SGD(self.model.parameters(), lr=LR, momentum=MOMENTUM)


def run_loop(task: Task) -> None:
    """Train as the PyTorch lesson on transfer learning does."""
    model, loaders, optimizer = task.model, task.loaders(), task.sgd()
    sizes = {split: len(task.data.named()[split]) for split in loaders}
    criterion = nn.CrossEntropyLoss()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    best = -1.0
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(task.epochs):
            for split in ("train", "val"):
                model.train(split == "train")
                running_loss, hits = 0.0, 0
                for inputs, labels in loaders[split]:
                    optimizer.zero_grad()
                    with torch.set_grad_enabled(split == "train"):
                        outputs = model(inputs)
                        _, predictions = torch.max(outputs, 1)
                        loss = criterion(outputs, labels)
                        if split == "train":
                            loss.backward()
                            optimizer.step()
                            task.clock.step_ended()
                    running_loss += loss.item() * inputs.size(0)
                    hits += int(torch.sum(predictions == labels.data))
                if split == "train":
                    scheduler.step()
                accuracy = hits / sizes[split]
                if split == "val" and accuracy > best:
                    best = accuracy
                    torch.save(model.state_dict(), Path(folder) / "best.pt")
            task.clock.epoch_ended()


def run_fastai(task: Task) -> None:
    """Train with fastai's `DataBlock` and `Learner`, as in its vision tutorial."""
    from fastai.vision import all as fa

    train, val = (list(task.data.named()[split].paths) for split in ("train", "val"))
    preprocess = task.model.preprocess
    block = fa.DataBlock(
        blocks=(fa.ImageBlock, fa.CategoryBlock),
        get_items=lambda _: [*train, *val],
        get_y=fa.parent_label,
        splitter=fa.IndexSplitter(range(len(train), len(train) + len(val))),
        item_tfms=[fa.RandomResizedCrop(224), fa.FlipItem()],
        batch_tfms=fa.Normalize.from_stats(preprocess.mean, preprocess.std),
    )
    dls = block.dataloaders(train[0].parent, bs=BATCH_SIZE, num_workers=task.workers)

    class Times(fa.Callback):
        def after_batch(self) -> None:
            if self.training:
                task.clock.step_ended()

        def after_epoch(self) -> None:
            task.clock.epoch_ended()

    learner = fa.Learner(
        dls,
        task.model,
        loss_func=fa.CrossEntropyLossFlat(),
        opt_func=fa.SGD,
        moms=(MOMENTUM, MOMENTUM, MOMENTUM),
        metrics=fa.accuracy,
        cbs=Times(),
    )
    learner.fit(task.epochs, lr=LR)


def run_lightning(task: Task) -> None:
    """Train with Lightning's `LightningModule` and `Trainer`, its logs and checkpoints off."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model

        def training_step(self, batch: Any, index: int) -> Tensor:
            inputs, labels = batch
            loss = nn.functional.cross_entropy(self.model(inputs), labels)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            inputs, labels = batch
            outputs = self.model(inputs)
            self.log("val_loss", nn.functional.cross_entropy(outputs, labels))
            self.log("val_accuracy", (outputs.argmax(1) == labels).float().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return task.sgd()

    class Times(lightning.Callback):
        on_train_batch_end = staticmethod(task.clock.step_ended)
        on_train_epoch_end = staticmethod(task.clock.epoch_ended)  # Validation is over then.

    loaders = task.loaders()
    trainer = lightning.Trainer(
        max_epochs=task.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[Times()],
    )
    trainer.fit(Module(), loaders["train"], loaders["val"])


class AsDict(Dataset[dict[str, Any]]):
    """Name image and label as a Hugging Face model takes them."""

    def __init__(self, pairs: datasets.ImageFolder) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a picture with its label."""
        image, label = self.pairs[index]
        return {"pixel_values": image, "labels": label}


class WithLoss(nn.Module):
    """Return the loss with the logits, as a Hugging Face model does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute both."""
        logits = self.model(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def run_transformers(task: Task) -> None:
    """Train with Hugging Face's `Trainer`, as in its guide to image classification."""
    import transformers

    class Times(transformers.TrainerCallback):
        on_step_end = staticmethod(task.clock.step_ended)
        on_evaluate = staticmethod(task.clock.epoch_ended)

    folders = task.folders()
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            WithLoss(task.model),
            transformers.TrainingArguments(
                output_dir=folder,
                use_cpu=True,
                per_device_train_batch_size=BATCH_SIZE,
                per_device_eval_batch_size=BATCH_SIZE,
                num_train_epochs=task.epochs,
                lr_scheduler_type="constant",
                eval_strategy="epoch",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_num_workers=task.workers,
            ),
            train_dataset=AsDict(folders["train"]),
            eval_dataset=AsDict(folders["val"]),
            compute_metrics=lambda each: {
                "accuracy": (each.predictions.argmax(1) == each.label_ids).mean()
            },
            optimizers=(task.sgd(), None),
            callbacks=[Times()],
        )
        trainer.train()


def run_skorch(task: Task) -> None:
    """Train with skorch's `NeuralNetClassifier`, as in its transfer learning notebook."""
    import skorch
    from skorch.helper import predefined_split

    class Times(skorch.callbacks.Callback):
        def on_batch_end(self, net: Any, training: bool = False, **_: Any) -> None:
            if training:
                task.clock.step_ended()

        on_epoch_end = staticmethod(task.clock.epoch_ended)

    folders = task.folders()
    net = skorch.NeuralNetClassifier(
        task.model,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        optimizer__momentum=MOMENTUM,
        lr=LR,
        batch_size=BATCH_SIZE,
        max_epochs=task.epochs,
        iterator_train__shuffle=True,
        iterator_train__num_workers=task.workers,
        iterator_valid__num_workers=task.workers,
        train_split=predefined_split(folders["val"]),
        classes=list(range(task.data.num_classes)),  # With `y=None` it cannot tell them itself.
        callbacks=[("times", Times())],
        device="cpu",
    )
    net.fit(folders["train"], y=None)


def run_bare(task: Task) -> None:
    """Train on batches that are ready in memory: nothing but the network and the optimizer."""
    from transferkit._allocator import buffers_kept

    preprocess = task.model.preprocess
    loader = tk.ImageLoader(
        task.data.train, preprocess.train("tutorial"), batch_size=BATCH_SIZE, shuffle=True
    )
    batches = [
        each.to(torch.device("cpu"), memory_format=torch.channels_last) for each in loader.batches()
    ]
    model = task.model.to(memory_format=torch.channels_last).train()
    criterion, optimizer = nn.CrossEntropyLoss(), task.sgd()
    with buffers_kept():
        for _ in range(task.epochs):
            for inputs, labels, _ in batches:
                with torch.autocast("cpu", torch.bfloat16, enabled=task.precision == "bf16"):
                    loss = criterion(model(inputs), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                task.clock.step_ended()
            task.clock.epoch_ended()


def run_ours(task: Task) -> None:
    """Train with `Trainer` and its defaults."""

    class Times(tk.Callback):
        def on_step_end(self, trainer: tk.Trainer, step: int) -> None:
            task.clock.step_ended()

        def on_epoch_end(self, trainer: tk.Trainer, record: tk.EpochRecord) -> None:
            task.clock.epoch_ended()

    options: dict[str, Any] = {} if task.precision == "fp32" else {"precision": task.precision}
    trainer = tk.Trainer(
        task.model,
        task.data,
        recipe="finetune",
        batch_size=BATCH_SIZE,
        callbacks=[Times()],
        verbose=False,
        **options,
    )
    trainer.fit(task.epochs)


SIDES: dict[str, Callable[[Task], None]] = {
    "loop": run_loop,
    "fastai": run_fastai,
    "lightning": run_lightning,
    "transformers": run_transformers,
    "skorch": run_skorch,
    "bare": run_bare,
    "transferkit": run_ours,
}


def choose(dataset: tk.ImageDataset, count: int) -> tk.ImageDataset:
    """Return so many pictures of a data set, from all over it."""
    places = [place * len(dataset) // count for place in range(count)]
    return tk.ImageDataset(
        [dataset.paths[place] for place in places],
        dataset.targets[places].tolist(),
        class_names=dataset.class_names,
    )


def make_task(options: dict[str, Any]) -> Task:
    """Make what a side is given of what the command line says."""
    data, limit = tk.load_folders(options["root"]), options["limit"]
    # Whole batches only, for fastai leaves out a last one that is smaller.
    count = min(limit or len(data.train), len(data.train)) // BATCH_SIZE * BATCH_SIZE
    data = tk.ImageSplits(
        choose(data.train, count), choose(data.val, min(limit or len(data.val), len(data.val)))
    )
    name = options["backbone"]
    weights: dict[str, Any] = {} if name in WITH_WEIGHTS else {"weights": None}
    model = tk.build_model(name, data.num_classes, seed=0, **weights)
    clock = Clock()
    model.register_forward_pre_hook(clock.count)
    return Task(model, data, options["epochs"], options["workers"], options["precision"], clock)


def peak_bytes() -> int | None:
    """Return the most memory that this process held, without its workers; only Linux tells."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return None


def main() -> None:
    """Run the side that the first argument describes."""
    options = json.loads(sys.argv[1])
    torch.manual_seed(0)
    task = make_task(options)
    with contextlib.redirect_stdout(sys.stderr):  # Peers print their tables.
        SIDES[options["side"]](task)
    clock, wanted = task.clock, task.epochs * len(task.data.train)
    if clock.pictures != wanted or len(clock.train) != task.epochs:
        raise RuntimeError(
            f"{clock.pictures} pictures in {len(clock.train)} epochs were trained on, not {wanted} "
            f"in {task.epochs}."
        )
    found = {
        "train": clock.train,
        "val": clock.val,
        "pictures": len(task.data.train),
        "peak": peak_bytes(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
