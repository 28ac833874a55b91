"""Randomness that a seed rules, without touching the caller's random state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from transferkit.errors import ConfigError

MAX_SEED = 2**32 - 1


def check_seed(seed: int) -> int:
    """Return `seed` as an int when it is an integer, NumPy's too, in [0, 2**32 - 1].

    Raises:
        ConfigError: It is something else.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"`seed` should be an integer from 0 to {MAX_SEED}, found {seed!r}.")
    return int(seed)


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Run a block with the CPU generators seeded from `entropy`, then put them back.

    Python's, NumPy's and PyTorch's global generators are all seeded, since a user's
    augmentation may draw from any of them.

    Args:
        *entropy: Non-negative integers, such as (seed, epoch, index).

    Example:
        >>> with seeded(0, 1, 2):
        ...     first = torch.rand(1)
        >>> with seeded(0, 1, 2):
        ...     second = torch.rand(1)
        >>> bool(first == second)
        True
    """
    words = _words(entropy)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.get_rng_state()
    try:
        random.seed(int(words[0]))
        np.random.seed(int(words[1]))
        torch.default_generator.manual_seed(int(words[2]))
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def generator_for(*entropy: int) -> torch.Generator:
    """Return a CPU generator of PyTorch's, seeded from `entropy`.

    It draws what PyTorch's global generator draws within `seeded(*entropy)`, and may be used
    in a thread beside others.

    Args:
        *entropy: Non-negative integers, such as (seed, epoch, index).

    Example:
        >>> with seeded(0, 1, 2):
        ...     expected = torch.rand(1)
        >>> bool(torch.rand(1, generator=generator_for(0, 1, 2)) == expected)
        True
    """
    return torch.Generator().manual_seed(int(_words(entropy)[2]))


def _words(entropy: tuple[int, ...]) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Return a seed each for Python, NumPy and PyTorch."""
    return np.random.SeedSequence(entropy).generate_state(3)


@contextmanager
def seeded_torch(seed: int, device: torch.device) -> Iterator[None]:
    """Run a block with PyTorch seeded on the CPU and on `device`, then put both back.

    Args:
        seed: The seed, in [0, 2**32 - 1].
        device: The device whose generator is seeded beside the CPU's.
    """
    if device.type == "mps":  # Its one generator has calls of its own.
        state = torch.mps.get_rng_state()
        try:
            with torch.random.fork_rng(devices=[]):
                _seed(device, seed)
                yield
        finally:
            torch.mps.set_rng_state(state)
        return
    accelerated = device.type not in ("cpu", "meta")
    with torch.random.fork_rng(
        devices=[device] if accelerated else [],
        device_type=device.type if accelerated else "cuda",
    ):
        _seed(device, seed)
        yield


def seed_torch(device: torch.device, *entropy: int) -> None:
    """Seed PyTorch's generators of the CPU and of one device, within `seeded_torch`.

    Args:
        device: The device.
        *entropy: Non-negative integers, such as (seed, epoch, batch).
    """
    _seed(device, int(_words(entropy)[2]))


def _seed(device: torch.device, seed: int) -> None:
    """Seed the generators of the CPU and of one device; `torch.manual_seed` seeds all there are."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    elif device.type not in ("cpu", "meta"):
        getattr(torch, device.type).manual_seed(seed)
