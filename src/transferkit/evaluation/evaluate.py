"""One pass over a split without training: loss, accuracy and who is taken for whom."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from transferkit.data import Batch, SkippedFile
from transferkit.errors import DataError
from transferkit.evaluation.metrics import class_accuracies, confusion_matrix
from transferkit.models.modes import evaluating


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one pass over a split found.

    Args:
        loss: Mean of the criterion over the images.
        accuracy: Share of images whose class was predicted, in [0, 1].
        num_images: The number of images.
        class_names: The names of the classes, by index.
        confusion: int64 `(C, C)`, true class by predicted class.
        skipped: The pictures that were left out since they could not be read.
        metrics: The values of further metrics, by name.
    """

    loss: float
    accuracy: float
    num_images: int
    class_names: tuple[str, ...]
    confusion: npt.NDArray[np.int64]
    skipped: tuple[SkippedFile, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def class_accuracies(self) -> dict[str, float]:
        """The accuracy within each class; NaN for a class without images."""
        values = class_accuracies(self.confusion).tolist()
        return dict(zip(self.class_names, values, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain JSON data; a class without images has None."""
        return {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "num_images": self.num_images,
            "class_accuracies": {
                name: None if value != value else value
                for name, value in self.class_accuracies.items()
            },
            "confusion": self.confusion.tolist(),
            "skipped": [{"path": str(each.path), "reason": each.reason} for each in self.skipped],
            "metrics": {
                name: value if math.isfinite(value) else None
                for name, value in self.metrics.items()
            },
        }


class Metric(Protocol):
    """What a metric does, as those of torchmetrics do."""

    def reset(self) -> None:
        """Forget all batches."""
        ...

    def update(self, preds: Tensor, target: Tensor, /) -> None:
        """Take in a batch: logits `(N, C)` and class indices int64 `(N,)`."""
        ...

    def compute(self) -> Any:
        """Return the value over all batches since the reset: a number, or a tensor of one."""
        ...


class RunningMean:
    """Average a loss and count hits over batches of different sizes, on the device."""

    def __init__(self, device: torch.device) -> None:
        self.num_images: int = 0
        # Sums stay on the device: reading one back each step would make the device wait.
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64.
        self._loss = torch.zeros((), device=device, dtype=dtype)
        self._hits = torch.zeros((), device=device, dtype=torch.int64)

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Add a batch: its mean loss, its logits `(N, C)` and its targets `(N,)`."""
        self.num_images += len(targets)
        self._loss += loss.detach().to(self._loss.dtype) * len(targets)
        self._hits += (logits.detach().argmax(dim=1) == targets).sum()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, as plain data and tensors."""
        return {"num_images": self.num_images, "loss": self._loss, "hits": self._hits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from sums that `state_dict` returned, on whichever device."""
        self.num_images = state["num_images"]
        self._loss.copy_(state["loss"])
        self._hits.copy_(state["hits"])

    def sum_up(self, add: Callable[[Tensor], Tensor]) -> None:
        """Make the sums those of several processes.

        Args:
            add: Sums a tensor over the processes, in place, and returns it.
        """
        count = torch.tensor(self.num_images, device=self._loss.device)
        self.num_images = int(add(count))
        add(self._loss)
        add(self._hits)

    @property
    def loss(self) -> float:
        """The mean loss over all images added."""
        return self._loss.item() / self.num_images

    @property
    def accuracy(self) -> float:
        """The share of images predicted right."""
        return self._hits.item() / self.num_images


def evaluate_model(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    class_names: tuple[str, ...],
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
    logits_of: Callable[[Tensor], Tensor] | None = None,
    gather: Callable[[RunningMean, Tensor], None] | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> Evaluation:
    """Evaluate a model on batches.

    Args:
        model: The classifier, or what of it `logits_of` runs; in eval mode for the pass,
            afterwards in the mode it was in.
        batches: Batches of images float32 `(N, 3, H, W)` with targets `(N,)`.
        class_names: The names of the classes, by index.
        criterion: Maps logits `(N, C)` and targets `(N,)` to the batch's mean loss; None
            takes cross-entropy.
        memory_format: The layout that images are brought into.
        logits_of: Maps what the batches hold to logits `(N, C)`, where that is not images;
            None takes the model.
        gather: Makes the sums, and the confusion int64 `(C, C)`, those of several processes,
            each with batches of its own; called when all batches are through.
        metrics: Further metrics, by name.

    Returns:
        The numbers, each image counted once whatever the batches' sizes.

    Raises:
        DataError: There are no batches.
    """
    criterion = criterion or nn.CrossEntropyLoss()
    device = next(model.parameters()).device
    mean = RunningMean(device)
    confusion = torch.zeros(len(class_names), len(class_names), dtype=torch.int64)
    pairs: list[tuple[Tensor, Tensor]] = []
    metrics = metrics or {}
    for metric in metrics.values():
        metric.reset()
    with evaluating(model), torch.no_grad():
        for batch in batches:
            layout = memory_format if batch.images.dim() == 4 else torch.preserve_format
            images, targets, _ = batch.to(device, memory_format=layout)
            logits = model(images) if logits_of is None else logits_of(images)
            mean.add(criterion(logits, targets), logits, targets)
            pairs.append((logits.argmax(dim=1), targets))
            for metric in metrics.values():
                metric.update(logits, targets)
    if pairs:
        predictions, all_targets = (torch.cat(each) for each in zip(*pairs, strict=True))
        confusion += torch.from_numpy(
            confusion_matrix(predictions, all_targets, num_classes=len(class_names))
        )
    if gather is not None:
        gather(mean, confusion)
    if not mean.num_images:
        raise DataError("There is nothing to evaluate: the batches hold no images.")
    return Evaluation(
        loss=mean.loss,
        accuracy=mean.accuracy,
        num_images=mean.num_images,
        class_names=class_names,
        confusion=confusion.numpy(),
        metrics={name: float(each.compute()) for name, each in metrics.items()},
    )
