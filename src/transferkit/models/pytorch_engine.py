"""The engine that runs a network in PyTorch itself."""

from __future__ import annotations

import copy
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from transferkit.data.workers import start_threads
from transferkit.models.conversion import TOLERANCES, relative_difference
from transferkit.models.engine_facts import describe_float32, describe_processor, one_tensor
from transferkit.models.folding import count_batch_norms, fold_batch_norms
from transferkit.models.fusing import fuse_convolutions
from transferkit.models.tracing import copy_modules

_ACCELERATED = 0.02
"""The tolerance in float32 on accelerators, which may multiply with fewer bits."""
_NUM_COMPARED = 2


class PyTorchEngine:
    """Run a copy of a network in PyTorch, channels-last, with fewer layers where that can be.

    BatchNorm is folded into convolutions, which on the CPU also apply activations. The first
    call compares what that gives with what the network gives, on its first images, and the network
    runs as it is where they differ: its forward pass may ask for more of its layers than for
    what they compute.

    Args:
        prefix: The network, from images `(N, C, H, W)` to `(N, ...)`; it is not changed.
        precision: What is computed in, "float32" or "bfloat16".
        device: Where it runs.
        num_lanes: How many threads may call it at a time. Where there are several, each call
            computes on `cores_each`, its share of the cores that PyTorch has now, so that it
            waits for no other; a thread with another number hands its call to one with this.
    """

    def __init__(
        self, prefix: nn.Module, *, precision: str, device: torch.device, num_lanes: int = 1
    ) -> None:
        network = copy.deepcopy(prefix).eval().requires_grad_(False).to(device)
        self._precision = precision
        self._device = device
        self.num_lanes: int = num_lanes
        self.cores_each: int = max(1, torch.get_num_threads() // num_lanes)
        self._original: nn.Module | None = copy_modules(network)
        count = count_batch_norms(network)
        self._num_folded = fold_batch_norms(network)
        self._num_kept = count - self._num_folded
        can_fuse = device.type == "cpu" and precision == "float32"
        self._num_fused = fuse_convolutions(network) if can_fuse else 0
        self._networks: SimpleQueue[nn.Module] = self._make_lanes(network)
        self._lock = threading.Lock()
        self._caller: tuple[int, ThreadPoolExecutor] | None = None

    def _make_lanes(self, network: nn.Module) -> SimpleQueue[nn.Module]:
        """Lay a network out with the channels last, and return it and its copies for the lanes."""
        for parameter in network.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        # Each lane has modules of its own, since forward passes may keep state in them; the
        # weights are shared.
        lanes: SimpleQueue[nn.Module] = SimpleQueue()
        for each in (network, *(copy_modules(network) for _ in range(self.num_lanes - 1))):
            lanes.put(each)
        return lanes

    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 `(N, ...)`, on the device, for images float32 `(N, C, H, W)`.

        Raises:
            BackboneError: The network does not give one tensor with a row for each image.
        """
        if self.num_lanes > 1 and torch.get_num_threads() != self.cores_each:
            return self._find_thread().submit(self._call, images).result()
        return self._call(images)

    def _find_thread(self) -> ThreadPoolExecutor:
        """Return a thread that computes as a lane does; it ends with the engine."""
        with self._lock:
            process = os.getpid()  # After a fork the thread is not there.
            if self._caller is None or self._caller[0] != process:
                self._caller = process, start_threads(1, cores_each=self.cores_each)
            return self._caller[1]

    def _call(self, images: Tensor) -> Tensor:
        ready = images.to(self._device, torch.float32, memory_format=torch.channels_last)
        if self._original is not None:
            self._compare(ready[:_NUM_COMPARED])
        return self._run_free(ready)

    def _compare(self, images: Tensor) -> None:
        """Let the network run as it is, unless with fewer layers it gives the same."""
        with self._lock:
            if self._original is None:  # Another thread was here first.
                return
            original = self._original
            expected = self._run(original, images)
            found = self._try_run(images)
            allowed = TOLERANCES[self._precision]
            if self._device.type != "cpu":
                allowed = max(allowed, _ACCELERATED)
            if found is None or not relative_difference(found, expected) <= allowed:
                self._networks = self._make_lanes(original)  # Nobody has taken one yet.
            self._original = None

    def _try_run(self, images: Tensor) -> Tensor | None:
        try:
            return self._run_free(images)
        except Exception:  # Layers that are not there any more, in a forward pass of any kind.
            return None

    def _run_free(self, images: Tensor) -> Tensor:
        """Run the network of a lane that is free."""
        network = self._networks.get()
        try:
            return self._run(network, images)
        finally:
            self._networks.put(network)

    def _run(self, network: nn.Module, images: Tensor) -> Tensor:
        lowered = torch.autocast(
            self._device.type, torch.bfloat16, enabled=self._precision == "bfloat16"
        )
        # Not `inference_mode`, whose tensors no graph of gradients takes: it is no faster.
        with torch.no_grad(), lowered:
            return one_tensor(network(images), len(images)).float()

    def describe(self) -> dict[str, Any]:
        """Return all that can change the bits of its results, as plain JSON data.

        `num_kept` counts the BatchNorm layers that run as they are: those that no convolution
        precedes, or whose network's forward pass cannot be traced. Where the comparison of the
        first call fails, all of them run so, always for the same network.
        """
        return {
            "engine": "pytorch",
            "engine_version": str(torch.__version__),
            "precision": self._precision,
            "memory_format": "channels_last",
            "num_folded": self._num_folded,
            "num_kept": self._num_kept,
            "num_fused": self._num_fused,
            "float32": describe_float32(self._device),
            "processor": describe_processor(self._device),
        }
