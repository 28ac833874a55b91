"""How a fit runs where that changes the last bits at most: the layout in memory.

Nothing here changes what is computed. What does, such as the precision, is never chosen without
the user's word.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from transferkit._allocator import buffers_kept
from transferkit._seeding import seeded_torch
from transferkit.errors import ConfigError
from transferkit.models.recompute import recomputing
from transferkit.training.admission import frozen_as
from transferkit.training.checkpoints import Checkpoint
from transferkit.training.estimates import noise
from transferkit.training.feed_choice import find_split
from transferkit.training.memory import is_out_of_memory
from transferkit.training.phases import ResolvedPhase
from transferkit.training.updates import lay_out_state

if TYPE_CHECKING:
    from transferkit.training.job import Job

ChannelsLast: TypeAlias = "bool | Literal['auto']"
"""Whether the channels lie last in memory; "auto" measures what is faster."""

MIN_BATCHES = 50
"""A fit of fewer batches of pictures is over before a measurement has repaid itself."""

_FORMATS: dict[str, torch.memory_format] = {
    "channels_last": torch.channels_last,
    "contiguous": torch.contiguous_format,
}
_LAST, _FIRST = _FORMATS

_FEW = 2
"""Pictures in a batch that warms up and tells how many more there is time for."""

_NUM_TIMED = 2

_BUDGET = 4.0
"""Seconds that the timed batches may take together, about."""

_TIE = 1.05
"""By which factor the contiguous layout has to be faster to be taken."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a fit runs.

    Args:
        memory_format: "channels_last" or "contiguous".
        reason: Why, in words.
    """

    memory_format: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON data."""
        return asdict(self)

    def __str__(self) -> str:
        """Return the line that a plan shows."""
        return f"execution: {self.memory_format} ({self.reason})"


def check_channels_last(channels_last: ChannelsLast) -> ChannelsLast:
    """Return the choice.

    Raises:
        ConfigError: It is none.
    """
    if isinstance(channels_last, bool) or channels_last == "auto":
        return channels_last
    raise ConfigError(f'`channels_last` should be "auto", True or False, found {channels_last!r}.')


def first_format(channels_last: ChannelsLast) -> torch.memory_format:
    """Return the layout before any fit: that which was asked for, or the likely one."""
    return _FORMATS[_LAST if channels_last else _FIRST]


def lay_out(job: Job, execution: Execution) -> Job:
    """Return the job that runs so; its model is brought into the layout in place."""
    memory_format = _FORMATS[execution.memory_format]
    if memory_format is job.memory_format:
        return job
    job.model.to(memory_format=memory_format)
    if isinstance(job.optimizer, Optimizer):
        lay_out_state(job.optimizer)
    return replace(job, memory_format=memory_format)


def agree_on_execution(
    job: Job, phases: Sequence[ResolvedPhase], checkpoint: Checkpoint | None
) -> Execution:
    """Return how a fit runs, the same in all processes that train together.

    Args:
        job: The job; it is left as it is.
        phases: The phases of the fit.
        checkpoint: What the fit goes on from, as it ran before; None where it begins.
    """
    world = job.world
    if checkpoint is not None and job.channels_last == "auto":
        return _execution_of(checkpoint)

    def choose() -> Execution:
        unmeasured = Execution(memory_format=_LAST, reason="as in the first process")
        return choose_execution(job, phases) if world.is_first else unmeasured

    return world.share(world.together(choose))


def _execution_of(checkpoint: Checkpoint) -> Execution:
    try:
        settings = checkpoint.data["parts"]["history"]["settings"]
        found = Execution(**settings["execution"])
        _FORMATS[found.memory_format]
    except (KeyError, TypeError):  # The fit refuses such a checkpoint, and says why.
        return Execution(memory_format=_LAST, reason="unknown")
    return found


def choose_execution(job: Job, phases: Sequence[ResolvedPhase]) -> Execution:
    """Choose how a fit runs, by a few batches of noise on a copy of the model where it is long.

    Args:
        job: The job; it and the random state are left as they are.
        phases: The phases of the fit.
    """
    if job.channels_last != "auto":
        return Execution(memory_format=_LAST if job.channels_last else _FIRST, reason="given")
    per_epoch = len(job.train_loader)
    stepped = [each for each in phases if not job.solves(each)]
    if per_epoch * _num_epochs(stepped) >= MIN_BATCHES:
        live = list(_live(job, stepped))
        if per_epoch * _num_epochs(live) >= MIN_BATCHES:
            return _measure(job, max(live, key=lambda each: each.phase.epochs))
    return Execution(memory_format=_LAST, reason="too short to measure")


def _num_epochs(phases: Sequence[ResolvedPhase]) -> int:
    return sum(each.phase.epochs for each in phases)


def _live(job: Job, phases: Sequence[ResolvedPhase]) -> Iterator[ResolvedPhase]:
    """Give the phases that see pictures in every epoch, not cached features."""
    for phase in phases:
        with frozen_as(job.model, phase.freeze_plan):
            job.model.train()
            if isinstance(find_split(job, epochs=phase.phase.epochs), str):
                yield phase


def _measure(job: Job, phase: ResolvedPhase) -> Execution:
    try:
        model = copy.deepcopy(job.model)
    except Exception as error:  # Of whatever class: a network of the user's own may refuse.
        return Execution(
            memory_format=_LAST, reason=f"the model cannot be copied: {_first_line(error)}"
        )
    size = min(-(-job.recipe.batch_size // job.world.size), len(job.data.train))
    with (
        seeded_torch(job.seed, job.device),
        buffers_kept(),
        recomputing(model) if job.recomputes else nullcontext(),
    ):
        model.freeze(phase.freeze_plan).train()
        return pick_format(lambda name, count: _seconds(job, model, name, count), size)


def _seconds(job: Job, model: nn.Module, name: str, count: int) -> float:
    """Return the seconds of a forward and a backward pass over so many pictures."""
    model.to(memory_format=_FORMATS[name])
    images = noise(replace(job, memory_format=_FORMATS[name]), count)
    targets = torch.arange(count, device=job.device) % job.model.num_classes
    model.zero_grad(set_to_none=True)
    _wait(job)
    start = time.perf_counter()
    with job.precision.autocast():
        loss = nn.functional.cross_entropy(model(images), targets)
    loss.backward()  # type: ignore[no-untyped-call]
    _wait(job)
    return time.perf_counter() - start


def _wait(job: Job) -> None:
    if job.device.type != "cpu":
        torch.accelerator.synchronize()


def pick_format(run: Callable[[str, int], float], size: int) -> Execution:
    """Pick the faster layout; of two about as fast the one with the channels last.

    Args:
        run: Returns the seconds of a step, by the layout's name and the number of pictures.
        size: Pictures in a batch; slow networks are measured on fewer.

    Example:
        >>> speeds = {"channels_last": 0.01, "contiguous": 0.02}
        >>> print(pick_format(lambda name, count: speeds[name] * count, 32))
        execution: channels_last (measured: channels_last 0.32 s, contiguous 0.64 s for 32 pictures)
    """
    running = _LAST
    found: dict[str, float] = {}
    count = few = min(size, _FEW)
    try:
        for running in _FORMATS:
            run(running, few)  # Which sets up what the first run of all has to.
            found[running] = run(running, few)
        room = _BUDGET / (_NUM_TIMED * max(sum(found.values()), 1e-9))
        count = max(few, min(size, int(few * room)))
        for running in _FORMATS:
            found[running] = min(run(running, count) for _ in range(_NUM_TIMED))
    except Exception as error:  # Noise may be refused where pictures are not.
        if is_out_of_memory(error):
            return Execution(memory_format=_LAST, reason="too little memory to measure")
        if not isinstance(error, RuntimeError):  # Which `view` raises in a layout.
            return Execution(
                memory_format=_LAST, reason=f"cannot be measured: {_first_line(error)}"
            )
        (other,) = _FORMATS.keys() - {running}
        return Execution(memory_format=other, reason=f"{running} fails: {_first_line(error)}")
    is_first = found[_FIRST] * _TIE < found[_LAST]
    times = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in found.items())
    return Execution(
        memory_format=_FIRST if is_first else _LAST,
        reason=f"measured: {times} for {count} pictures",
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
