"""Engines: what runs a frozen network over many images, as fast as this machine can."""

from __future__ import annotations

import time
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor, nn

from transferkit._checks import check_choice
from transferkit._seeding import generator_for
from transferkit.errors import ConfigError
from transferkit.models.conversion import ConvertedEngine
from transferkit.models.engine_facts import has_bfloat16
from transferkit.models.onnx_engine import ONNXRuntimeEngine, import_onnx
from transferkit.models.openvino_engine import OpenVINOEngine, import_openvino
from transferkit.models.pytorch_engine import PyTorchEngine

EngineName: TypeAlias = Literal["pytorch", "openvino", "onnxruntime"]
Precision: TypeAlias = Literal["float32", "bfloat16"]

BATCH_SIZES = (8, 16, 32, 64)
DEFAULT_BATCH_SIZE, OPENVINO_BATCH_SIZE, ONNX_BATCH_SIZE = 32, 8, 16
"""Where none is tried: on CPUs these are about the fastest."""

LANE_BATCH_SIZE = 4
"""For an engine with several lanes: what one thread computes stays in the cache of its core."""

NUM_WORTH_TUNING = 2000
"""From so many images on it pays to try which batch size is fastest."""

MAX_SECONDS = 2.0
"""After so long no further batch size is tried."""

_MIN_GAIN = 1.02
_NUM_RUNS = 2


class Engine(Protocol):
    """Runs a network in eval mode, without gradients."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return what the network makes of images.

        Args:
            images: float32 `(N, C, H, W)`, preprocessed, on any device.

        Returns:
            float32 `(N, ...)`, on the engine's device; a graph of gradients may take it.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Return all that can change the bits of its results, as plain JSON data."""
        ...


def make_engine(
    prefix: nn.Module,
    *,
    engine: EngineName = "pytorch",
    precision: Precision = "float32",
    device: torch.device,
    num_lanes: int = 1,
) -> Engine:
    """Make an engine that runs a network with the weights that it has now.

    Args:
        prefix: The network, from images `(N, C, H, W)` to `(N, ...)`, in any mode; it is not
            changed, and what changes in it later has no effect.
        engine: "pytorch"; "openvino" or "onnxruntime" where the extra `openvino` or `onnx` is
            installed, on the CPU.
        precision: What is computed in: "float32", or "bfloat16" where the processor has it;
            "onnxruntime" computes in float32 alone.
        device: Where it runs.
        num_lanes: How many threads will call it at a time; on the CPU it computes for so many
            side by side, each on its share of the cores.

    Returns:
        The engine.

    Raises:
        ConfigError: There is no such engine or precision, or not on this device.
        MissingDependencyError: OpenVINO or ONNX Runtime is not installed.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        >>> engine = make_engine(network, device=torch.device("cpu"))
        >>> engine(torch.zeros(2, 3, 5, 5)).shape, engine.describe()["num_folded"]
        (torch.Size([2, 4, 5, 5]), 1)
    """
    check_engine(engine, precision, device)
    if engine == "openvino":
        return OpenVINOEngine(prefix, precision=precision, num_lanes=num_lanes)
    if engine == "onnxruntime":
        return ONNXRuntimeEngine(prefix, num_lanes=num_lanes)
    return PyTorchEngine(
        prefix,
        precision=precision,
        device=device,
        num_lanes=num_lanes if device.type == "cpu" else 1,
    )


def count_lanes(engine: Engine | None) -> int:
    """Return how many threads may call an engine at a time; 1 for the model as it is."""
    return engine.num_lanes if isinstance(engine, (ConvertedEngine, PyTorchEngine)) else 1


def count_cores(engine: Engine | None) -> int:
    """Return with how many cores each of several lanes of an engine computes."""
    return engine.cores_each if isinstance(engine, (ConvertedEngine, PyTorchEngine)) else 1


def check_engine(
    engine: EngineName,
    precision: Precision,
    device: torch.device,
    *,
    spelled: tuple[str, str] = ("float32", "bfloat16"),
) -> None:
    """Pass over an engine and a precision that work on a device of this machine.

    Args:
        engine: The engine's name.
        precision: What it computes in.
        device: Where it runs.
        spelled: What the caller's caller writes for the two precisions.

    Raises:
        ConfigError: There is no such engine or precision, or not on this device.
        MissingDependencyError: OpenVINO or ONNX Runtime is not installed.
    """
    full, half = spelled
    for name, value, kind in (("engine", engine, EngineName), ("precision", precision, Precision)):
        check_choice(name, value, get_args(kind))
    if engine != "pytorch" and device.type != "cpu":
        raise ConfigError(
            f'engine="{engine}" runs on the CPU, the model is on `{device}`. Move it to the CPU, '
            f'or take engine="pytorch".'
        )
    if engine == "onnxruntime" and precision != "float32":
        raise ConfigError(
            f'engine="onnxruntime" computes in float32, found precision="{half}". Take '
            f'precision="{full}", or another engine.'
        )
    if engine == "openvino":
        import_openvino()
    if engine == "onnxruntime":
        import_onnx()
    if precision == "bfloat16" and not has_bfloat16(device):
        raise ConfigError(
            f'precision="{half}" needs a processor with instructions for it (AVX512-BF16, AMX '
            f"or Arm BF16; a GPU from compute capability 8.0 on), which `{device}` of this machine "
            f"lacks: imitating them would be up to hundreds of times slower. Take "
            f'precision="{full}".'
        )


def find_batch_size(engine: Engine, image_shape: tuple[int, int, int]) -> int:
    """Find the batch size in which an engine is fastest on this machine, by trying.

    Larger ones are tried as long as they are faster, for 2 seconds or the first of them.

    Args:
        engine: The engine.
        image_shape: (C, H, W) of its images.

    Returns:
        8, 16, 32 or 64.
    """
    started = time.perf_counter()
    few = torch.randn(BATCH_SIZES[0], *image_shape, generator=generator_for(0))
    engine(few)  # The first run also sets up what the later ones use.
    best, best_rate = BATCH_SIZES[0], 0.0
    for size in BATCH_SIZES:
        images = few.repeat(size // len(few), 1, 1, 1)
        rate = size / min(_seconds(engine, images) for _ in range(_NUM_RUNS))
        if rate < best_rate * _MIN_GAIN:
            break
        best, best_rate = size, rate
        if time.perf_counter() - started > MAX_SECONDS:
            break
    return best


def _seconds(engine: Engine, images: Tensor) -> float:
    started = time.perf_counter()
    engine(images).cpu()  # A device has computed what lies on the CPU.
    return time.perf_counter() - started


def choose_batch_size(
    engine: Engine, image_shape: tuple[int, int, int], *, num_images: int, device: torch.device
) -> int:
    """Choose a batch size for so many images, by trying where that pays.

    Few images on a CPU go through in batches of 32, of 8 in OpenVINO, of 16 in ONNX Runtime, and
    of 4 in an engine with several lanes, where none else is tried.

    Args:
        engine: The engine.
        image_shape: (C, H, W) of its images.
        num_images: How many of them it will see.
        device: Where it runs.

    Returns:
        4, 8, 16, 32 or 64.
    """
    if count_lanes(engine) > 1:
        return LANE_BATCH_SIZE
    if device.type == "cpu" and num_images < NUM_WORTH_TUNING:
        if isinstance(engine, OpenVINOEngine):
            return OPENVINO_BATCH_SIZE
        return ONNX_BATCH_SIZE if isinstance(engine, ONNXRuntimeEngine) else DEFAULT_BATCH_SIZE
    return find_batch_size(engine, image_shape)
