"""Networks that were converted for another library: one engine for all, and the comparison."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from transferkit._seeding import generator_for
from transferkit.errors import BackboneError, TransferkitError
from transferkit.models.engine_facts import one_tensor

Run: TypeAlias = "Callable[[Tensor], Tensor]"
"""A callable from images float32 (N, C, H, W) to what a converted network makes of them."""

TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}
"""How far the values may differ from PyTorch's, relative to the largest of them."""

NUM_TRACED, NUM_COMPARED = 2, 3
"""Images that a conversion sees, and those of the comparison: more, so that N is not fixed."""


class ConvertedEngine:
    """Run a copy of a network in another library, converted once for each size of images.

    A conversion fixes what the network's Python does, for any number of images. So each is
    compared with PyTorch on a few images of noise, more than it was traced with.

    Args:
        prefix: The network, from images `(N, C, H, W)` to `(N, ...)`; it is not changed.
        precision: What is computed in, "float32" or "bfloat16".
        num_lanes: How many threads may call it at a time and are computed for side by side,
            each by `cores_each`, its share of the cores that PyTorch has now.
    """

    library: ClassVar[str]
    """The name of the library, as messages spell it."""

    def __init__(self, prefix: nn.Module, *, precision: str, num_lanes: int = 1) -> None:
        self._network = copy.deepcopy(prefix).eval().requires_grad_(False)
        self._precision = precision
        self.num_lanes: int = num_lanes
        self.num_cores: int = max(torch.get_num_threads(), num_lanes)
        self.cores_each: int = self.num_cores // num_lanes
        self._lock = threading.Lock()
        self._runs: dict[tuple[int, ...], Run] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 `(N, ...)` for images float32 `(N, C, H, W)`.

        Raises:
            BackboneError: The network cannot be converted, or gives other values after it.
        """
        shape = tuple(images.shape[1:])
        self.prepare(shape)
        return self._runs[shape](images)

    def prepare(self, shape: tuple[int, ...]) -> None:
        """Convert the network for images of a shape, if that has not been done.

        Args:
            shape: (C, H, W).

        Raises:
            BackboneError: As for a call.
        """
        if shape not in self._runs:
            with self._lock, torch.no_grad(), torch.autocast("cpu", enabled=False):
                if shape not in self._runs:  # Else another thread was here first.
                    self._runs[shape] = self._prepare(shape)

    def describe(self) -> dict[str, Any]:
        """Return all that can change the bits of its results, as plain JSON data."""
        raise NotImplementedError

    def _compile(self, shape: tuple[int, ...]) -> Run:
        """Convert the network for any number of images of one shape, and make it ready."""
        raise NotImplementedError

    def _prepare(self, shape: tuple[int, ...]) -> Run:
        one_tensor(self._network(torch.zeros(NUM_TRACED, *shape)), NUM_TRACED)
        try:
            run = self._compile(shape)
        except TransferkitError:
            raise
        except Exception as error:  # Their parts raise many classes.
            raise BackboneError(
                f"{self.library} cannot convert the network for images of the shape {shape}: "
                f'{last_line(error)}. Take engine="pytorch".'
            ) from error
        noise = torch.randn(NUM_COMPARED, *shape, generator=generator_for(0))
        difference = relative_difference(run(noise), self._network(noise))
        allowed = TOLERANCES[self._precision]
        if not difference <= allowed:
            raise BackboneError(
                f"The network gives other values in {self.library} than in PyTorch: relative to "
                f"the largest they differ by {difference:.3g}, allowed are {allowed:g}. Its "
                f"forward pass may depend on the values or the number of images. Take "
                f'engine="pytorch".'
            )
        return run


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected value.

    Args:
        found: float `(N, ...)`.
        expected: float `(N, ...)`.

    Returns:
        A number from 0 on; infinity where the shapes differ, NaN where a value is NaN.

    Example:
        >>> round(relative_difference(torch.tensor([1.0, 3.9]), torch.tensor([1.0, 4.0])), 3)
        0.025
    """
    if found.shape != expected.shape:
        return float("inf")
    largest = max(float(expected.abs().max()), 1e-12)
    return float((found - expected).abs().max()) / largest


def last_line(error: Exception) -> str:
    r"""Return what the last line of an error's message says, or its class where it is silent.

    Example:
        >>> last_line(ValueError("Many words.\n - It is too large."))
        'It is too large'
    """
    lines = str(error).splitlines() or [""]
    return lines[-1].strip(" -.") or type(error).__name__
