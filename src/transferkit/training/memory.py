"""How large a batch fits the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from transferkit._device import empty_cache
from transferkit._seeding import seeded_torch
from transferkit.errors import ConfigError, OutOfMemoryError
from transferkit.training.admission import frozen_as
from transferkit.training.estimates import measure_step, noise, weight_bytes
from transferkit.training.phases import ResolvedPhase

if TYPE_CHECKING:
    from transferkit.training.job import Job

_SHARE = 0.8
"""The part of the free memory that a fit may plan with."""

_CPU_TEXTS = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that there is no memory left, on whichever device."""
    is_kind = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_kind or any(text in str(error) for text in _CPU_TEXTS)


def halves(size: int) -> Iterator[int]:
    """Yield half of a size, a quarter of it and so on, down to 1.

    Example:
        >>> list(halves(12))
        [6, 3, 1]
    """
    while size > 1:
        size //= 2
        yield size


def explain_out_of_memory(
    size: int, run: Callable[[int], object], *, device: torch.device, accumulate: int
) -> OutOfMemoryError:
    """Return the error for a batch that did not fit, with the size that does.

    Args:
        size: Pictures in the batch.
        run: Trains on the first so many of them, without an update.
        device: Where.
        accumulate: Batches for one update, as it was.
    """
    start = f"A batch of {size} pictures does not fit the memory of `{device}`. "
    for smaller in halves(size):
        empty_cache(device)
        try:
            run(smaller)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            continue
        number = accumulate * -(-size // smaller)
        return OutOfMemoryError(
            f"{start}One of {smaller} does. Pass batch_size={smaller}, accumulate={number} for "
            f'updates like these, or batch_size="auto".'
        )
    return OutOfMemoryError(
        f"{start}Not even one picture does. Freeze more of the network, or take a smaller one."
    )


def find_batch_size(job: Job, phases: Sequence[ResolvedPhase]) -> int:
    """Return the recipe's batch size, or the largest half, quarter and so on that fits.

    On the CPU it is what a picture takes, measured on two of them, and the memory that is free;
    on an accelerator batches of noise are tried.

    Args:
        job: The job, with a model of its own: its statistics and gradients change.
        phases: The phases of the fit.

    Raises:
        ConfigError: Not even one picture fits.
    """
    size = job.recipe.batch_size
    for smaller in (size, *halves(size)):
        if all(_fits(job, phase, smaller) for phase in phases):
            return smaller
    raise ConfigError(
        f'batch_size="auto" finds no room for a single picture in the memory of `{job.device}`. '
        f"Freeze more of the network, or take a smaller one."
    )


def _fits(job: Job, phase: ResolvedPhase, size: int) -> bool:
    with frozen_as(job.model, phase.freeze_plan), seeded_torch(job.seed, job.device):
        job.model.train()
        if job.device.type != "cpu":
            return _runs(job, size)
        free = free_memory()
        if free is None:
            return True
        one, two = (measure_step(job, job.model, noise(job, count))[1] for count in (1, 2))
        needed = weight_bytes(job, None) + one + (size - 1) * max(0, two - one)
        return needed <= _SHARE * free


def _runs(job: Job, size: int) -> bool:
    try:
        measure_step(job, job.model, noise(job, size))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        empty_cache(job.device)
        return False
    return True


def free_memory() -> int | None:
    """Return the bytes that this process may still take; None where the system does not say.

    It is what the kernel calls available, or less where a container has a limit of its own.
    """
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        (line,) = (line for line in lines if line.startswith("MemAvailable:"))
        found.append(1024 * int(line.split()[1]))
    except (OSError, ValueError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        found.append(limit - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):  # "max" is no number: there is no limit.
        pass
    return min(found) if found else None
