"""The engine that runs a network in PyTorch itself."""

from __future__ import annotations

import copy
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from transferkit.data.workers import start_threads
from transferkit.models.engine_facts import (
    cores_of_a_lane,
    describe_float32,
    describe_processor,
    one_tensor,
)
from transferkit.models.folding import count_batch_norms, fold_batch_norms
from transferkit.models.fusing import fuse_convolutions
from transferkit.models.tracing import copy_modules


class PyTorchEngine:
    """Run a copy of a network in PyTorch, channels-last, BatchNorm folded where it can be.

    Args:
        prefix: The network, from images `(N, C, H, W)` to `(N, ...)`; it is not changed.
        precision: What is computed in, "float32" or "bfloat16".
        device: Where it runs.
        num_lanes: How many threads may call it at a time. Where there are several, each call
            computes on its share of the cores that PyTorch has now, so that it waits for no
            other; a thread with more hands its call to one with so many, for the same bits.
    """

    def __init__(
        self, prefix: nn.Module, *, precision: str, device: torch.device, num_lanes: int = 1
    ) -> None:
        network = copy.deepcopy(prefix).eval().requires_grad_(False).to(device)
        self._precision = precision
        self._device = device
        self.num_lanes: int = num_lanes
        self._num_cores = cores_of_a_lane(num_lanes)
        count = count_batch_norms(network)
        self._num_folded = fold_batch_norms(network)
        self._num_kept = count - self._num_folded
        can_fuse = device.type == "cpu" and precision == "float32"
        self._num_fused = fuse_convolutions(network) if can_fuse else 0
        for parameter in network.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        # Each lane has modules of its own, since forward passes may keep state in them; the
        # weights are shared.
        self._networks: SimpleQueue[nn.Module] = SimpleQueue()
        for each in (network, *(copy_modules(network) for _ in range(num_lanes - 1))):
            self._networks.put(each)

    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 `(N, ...)`, on the device, for images float32 `(N, C, H, W)`.

        Raises:
            BackboneError: The network does not give one tensor with a row for each image.
        """
        if self.num_lanes > 1 and torch.get_num_threads() != self._num_cores:
            with start_threads(1, cores_each=self._num_cores) as pool:
                return pool.submit(self._run, images).result()
        return self._run(images)

    def _run(self, images: Tensor) -> Tensor:
        ready = images.to(self._device, torch.float32, memory_format=torch.channels_last)
        lowered = torch.autocast(
            self._device.type, torch.bfloat16, enabled=self._precision == "bfloat16"
        )
        # Not `inference_mode`, whose tensors no graph of gradients takes: it is no faster.
        network = self._networks.get()
        try:
            with torch.no_grad(), lowered:
                return one_tensor(network(ready), len(images)).float()
        finally:
            self._networks.put(network)

    def describe(self) -> dict[str, Any]:
        """Return all that can change the bits of its results, as plain JSON data.

        `num_kept` counts the BatchNorm layers that run as they are: those that no
        convolution precedes, or whose network's forward pass cannot be traced.
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
