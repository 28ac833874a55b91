"""Averaging the weights over the steps or the epochs of a phase: EMA and SWA."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from transferkit._checks import check_number, check_type
from transferkit._seeding import seeded_torch
from transferkit.data import Batch
from transferkit.errors import DataError
from transferkit.models.modes import modes_kept
from transferkit.training.schedulers import Interval


@dataclass(frozen=True)
class EMA:
    """Average the weights exponentially over the steps: the newest count most.

    The first step's weights are the first average. The decay then rises with the number t of
    steps averaged so far, `min(decay, (1 + t) / (10 + t))`, so that the average of a short fit
    is not held back by its first steps. Buffers, such as BatchNorm's statistics, are not
    averaged: those of the present weights are used.

    Args:
        decay: How much of the average a step keeps, above 0 and below 1. It covers about the
            last `1 / (1 - decay)` steps, and early on the last tenth of all.

    Raises:
        ConfigError: The decay is out of range.

    Example:
        >>> average = EMA(decay=0.99)
        >>> [round(average.share(number), 2) for number in (0, 1, 90, 10_000)]
        [1.0, 0.82, 0.09, 0.01]

    References:
        Morales-Brotons, Vogels and Hendrikx, Exponential Moving Average of Weights in Deep
        Learning: Dynamics and Benefits, 2024, https://arxiv.org/abs/2411.18704. The rise of
        the decay is that of TensorFlow's `tf.train.ExponentialMovingAverage`,
        https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage.
    """

    decay: float = 0.999

    interval: ClassVar[Interval] = "step"

    def __post_init__(self) -> None:
        decay = check_number(
            "decay", self.decay, lambda number: 0 < number < 1, "above 0 and below 1"
        )
        object.__setattr__(self, "decay", decay)

    def takes(self, epoch_in_phase: int, num_epochs: int) -> bool:
        """Tell whether the average takes weights in an epoch: in every one."""
        return True

    def share(self, num_averaged: int) -> float:
        """Return the share of the newest weights in the average that follows.

        Args:
            num_averaged: How many weights are in the average already, at least 0.
        """
        if not num_averaged:
            return 1.0
        return 1 - min(self.decay, (1 + num_averaged) / (10 + num_averaged))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON data."""
        return {"name": "ema", **asdict(self)}


@dataclass(frozen=True)
class SWA:
    """Average the weights equally over the ends of a phase's later epochs.

    BatchNorm's statistics belong to no average of weights: a pass over the training pictures
    gathers them anew. It suits a learning rate that stays high, rather than one that ends
    near 0.

    Args:
        start: The share of the phase's epochs before the first that counts, in [0, 1). The
            last epoch counts always.

    Raises:
        ConfigError: The start is out of range.

    Example:
        >>> average = SWA(start=0.5)
        >>> [average.takes(epoch, 4) for epoch in range(4)]
        [False, False, True, True]

    References:
        Izmailov, Podoprikhin, Garipov, Vetrov and Wilson, Averaging Weights Leads to Wider
        Optima and Better Generalization, 2018, https://arxiv.org/abs/1803.05407.
    """

    start: float = 0.5

    interval: ClassVar[Interval] = "epoch"

    def __post_init__(self) -> None:
        start = check_number(
            "start", self.start, lambda number: 0 <= number < 1, "in [0, 1), a share of all epochs"
        )
        object.__setattr__(self, "start", start)

    def takes(self, epoch_in_phase: int, num_epochs: int) -> bool:
        """Tell whether the weights at the end of an epoch count.

        Args:
            epoch_in_phase: The number of the epoch within its phase, from 0.
            num_epochs: The number of the phase's epochs.
        """
        return (epoch_in_phase + 1) / num_epochs > self.start

    def share(self, num_averaged: int) -> float:
        """Return the share of the newest weights in the average that follows.

        Args:
            num_averaged: How many weights are in the average already, at least 0.
        """
        return 1 / (num_averaged + 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON data."""
        return {"name": "swa", **asdict(self)}


class WeightAverage:
    """Keep the average of a model's weights while it trains.

    Only parameters that train are copied, those of half precision as float32, in which small
    steps are not lost. Each phase begins a new average: the weights before it were of a
    network of which less was trained, and an average over different spans of time for
    different layers is of no network that there was.

    Args:
        average: How to average.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = WeightAverage(SWA())
        >>> average.start(model)
        >>> for value in (1.0, 3.0):
        ...     _ = nn.init.constant_(model.weight, value)
        ...     average.update(model)
        >>> with average.applied(model):
        ...     model.weight.item()
        2.0
        >>> model.weight.item()
        3.0
    """

    def __init__(self, average: EMA | SWA) -> None:
        self.average: EMA | SWA = average
        self.num_averaged: int = 0
        self.weights: dict[str, Tensor] = {}
        self._names: tuple[str, ...] = ()

    @property
    def interval(self) -> Interval:
        """When to update: after each "step" or after the "epoch"s that `takes` names."""
        return self.average.interval

    @property
    def is_active(self) -> bool:
        """Whether there is an average yet."""
        return self.num_averaged > 0

    def start(self, model: nn.Module) -> None:
        """Begin a new average, of the parameters that train now.

        Args:
            model: The model, frozen as it stays until the next start.
        """
        self._names = tuple(name for name, each in model.named_parameters() if each.requires_grad)
        self.weights = {}
        self.num_averaged = 0

    def forget(self) -> None:
        """Give the memory of the average back."""
        self._names, self.weights, self.num_averaged = (), {}, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the number of weights in it, as plain data and tensors."""
        return {"num_averaged": self.num_averaged, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any], model: nn.Module) -> None:
        """Go on from what `state_dict` returned, after `start`.

        Args:
            state: The state.
            model: The model, whose device and layout the average follows.
        """
        self.num_averaged = state["num_averaged"]
        self.weights = {
            name: torch.empty_like(model.get_parameter(name), dtype=value.dtype).copy_(value)
            for name, value in state["weights"].items()
        }

    def takes(self, epoch_in_phase: int, num_epochs: int) -> bool:
        """Tell whether an epoch of the phase, numbered from 0, counts."""
        return self.average.takes(epoch_in_phase, num_epochs)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the present weights into the average."""
        share = self.average.share(self.num_averaged)
        for name in self._names:
            value = model.get_parameter(name).detach()
            dtype = torch.promote_types(value.dtype, torch.float32)
            if self.is_active:
                self.weights[name].lerp_(value.to(dtype), share)
            else:
                self.weights[name] = value.to(dtype, copy=True)
        self.num_averaged += 1

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Run a block with the average in the model; afterwards all is as before, bit for bit.

        The block may change the buffers, too, see `refresh_batch_norm`. Where there is no
        average yet, it finds the model as it is.

        Args:
            model: The model.
        """
        live = {name: model.get_parameter(name).detach() for name in self.weights}
        kept = {**live, **{name: each.detach() for name, each in model.named_buffers()}}
        copies = {name: value.clone() for name, value in kept.items()}
        try:
            for name, value in live.items():
                value.copy_(self.weights[name])
            yield
        finally:
            for name, value in kept.items():
                value.copy_(copies[name])


def make_average(average: EMA | SWA | None) -> WeightAverage | None:
    """Build what keeps the average.

    Args:
        average: How to average; None for not at all.

    Returns:
        The running average, without any weights yet, or None.

    Raises:
        ConfigError: It is something else.
    """
    if average is None:
        return None
    check_type("average", average, (EMA, SWA), "EMA(...), SWA(...) or None")
    return WeightAverage(average)


@torch.no_grad()
def refresh_batch_norm(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    memory_format: torch.memory_format = torch.preserve_format,
    logits_of: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Gather BatchNorm's statistics anew for the present weights, in place.

    The statistics become the mean over the batches. Layers that stand still in training, as
    freezing tells them to, keep theirs.

    Args:
        model: The model; afterwards in the mode it was in. PyTorch's random state is left
            alone.
        batches: One pass: images float32 `(N, C, H, W)`, without a use for their targets. None
            is loaded where no layer follows the batches.
        memory_format: The layout that images are brought into.
        logits_of: Runs what the batches hold through the layers, where that is not images;
            None takes the model.

    Raises:
        DataError: There are no batches. Whatever ends the pass early, the statistics are then
            as they were.

    References:
        Izmailov, Podoprikhin, Garipov, Vetrov and Wilson, Averaging Weights Leads to Wider
        Optima and Better Generalization, 2018, https://arxiv.org/abs/1803.05407 (section 3.2).
    """
    with modes_kept(model):
        layers = _following(model.train())
        if not layers:
            return
        device = next(model.parameters()).device
        with _gathering(layers), seeded_torch(0, device):
            num_batches = 0
            for batch in batches:
                layout = memory_format if batch.images.dim() == 4 else torch.preserve_format
                inputs = batch.to(device, memory_format=layout).images
                _ = model(inputs) if logits_of is None else logits_of(inputs)
                num_batches += 1
            if not num_batches:
                raise DataError("BatchNorm's statistics need at least one batch, found none.")


def _following(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers whose statistics follow the batches."""
    return [
        each
        for each in model.modules()
        if isinstance(each, _BatchNorm) and each.training and each.running_mean is not None
    ]


@contextmanager
def _gathering(layers: list[_BatchNorm]) -> Iterator[None]:
    """Run a block in which the layers average over all batches; an error leaves them as before."""
    momenta = [layer.momentum for layer in layers]
    before = [{name: each.clone() for name, each in layer.named_buffers()} for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # Which is PyTorch's word for the mean over all batches.
        yield
    except BaseException:
        for layer, buffers in zip(layers, before, strict=True):
            for name, value in layer.named_buffers():
                value.copy_(buffers[name])
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
