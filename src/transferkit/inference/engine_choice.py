"""Which engine runs the network: the one that was named, or the fastest that agrees."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from transferkit._checks import check_choice
from transferkit._seeding import generator_for
from transferkit.errors import BackboneError
from transferkit.images import Preprocess
from transferkit.inference.lanes import run_in_lanes
from transferkit.models.conversion import TOLERANCES, relative_difference
from transferkit.models.engines import (
    Engine,
    EngineName,
    check_engine,
    choose_batch_size,
    count_cores,
    count_lanes,
    make_engine,
)
from transferkit.models.engines import Precision as EnginePrecision
from transferkit.models.modes import evaluating

EngineChoice: TypeAlias = Literal["auto", "pytorch", "openvino", "onnxruntime"]
InferencePrecision: TypeAlias = Literal["fp32", "bf16"]

MAX_LANES = 16
"""At most so many batches go through an engine at a time."""

_PRECISIONS: dict[str, EnginePrecision] = {"fp32": "float32", "bf16": "bfloat16"}
_NUM_RUNS = 2


@dataclass(frozen=True)
class EngineTrial:
    """What came of trying an engine.

    Args:
        name: The engine's name.
        images_per_second: Images through the network in a second; None where it did not run.
        difference: The largest difference of its logits to PyTorch's in float32, relative to
            the largest of them; None likewise.
        reason: Why it cannot be taken; None where it can.
    """

    name: str
    images_per_second: float | None = None
    difference: float | None = None
    reason: str | None = None


def check_choice_of_engine(engine: str, precision: str, device: torch.device) -> None:
    """Pass over an engine and a precision that can be had on a device.

    Raises:
        ConfigError: There is no such engine or precision, or not on this device.
        MissingDependencyError: What the engine needs is not installed.
    """
    check_choice("engine", engine, get_args(EngineChoice))
    check_choice("precision", precision, get_args(InferencePrecision))
    name: EngineName = "pytorch" if engine == "auto" else engine  # type: ignore[assignment]
    check_engine(name, _PRECISIONS[precision], device, spelled=get_args(InferencePrecision))


def make_named_engine(
    network: nn.Module, name: EngineName, *, precision: InferencePrecision, device: torch.device
) -> Engine:
    """Make the engine of a name, with the weights that the network has now."""
    # What runs in one thread each never waits for another one that has to give way to readers.
    # Of many cores each lane has as many as the others.
    num_cores = torch.get_num_threads()
    return make_engine(
        network,
        engine=name,
        precision=_PRECISIONS[precision],
        device=device,
        num_lanes=num_cores // -(-num_cores // MAX_LANES),
    )


def choose_engine(
    network: nn.Module,
    preprocess: Preprocess,
    *,
    precision: InferencePrecision,
    device: torch.device,
) -> tuple[EngineName, Engine, tuple[EngineTrial, ...]]:
    """Try all engines that are installed, and take the fastest whose logits agree.

    Each runs made-up images at the network's size, in the batch that suits it, after a first
    run that sets it up. Its logits are compared with those of PyTorch in float32.

    Args:
        network: The network, a classifier or what gives features; it is not changed.
        preprocess: How images become its input.
        precision: What is computed in.
        device: Where it runs.

    Returns:
        The engine's name, the engine, and what came of each.
    """
    if device.type != "cpu":
        engine = make_named_engine(network, "pytorch", precision=precision, device=device)
        return "pytorch", engine, (EngineTrial("pytorch"),)
    tried = {
        name: _try_engine(network, preprocess, name, precision) for name in get_args(EngineName)
    }
    found: list[tuple[float, EngineName, Engine]] = [
        (trial.images_per_second or 0.0, name, engine)
        for name, (trial, engine) in tried.items()
        if engine is not None
    ]
    if not found:
        reasons = "; ".join(f"{name}: {trial.reason}" for name, (trial, _) in tried.items())
        raise BackboneError(f"No engine can run the model. {reasons}")
    _, best, engine = max(found, key=lambda each: each[0])
    return best, engine, tuple(trial for trial, _ in tried.values())


def _try_engine(
    network: nn.Module, preprocess: Preprocess, name: EngineName, precision: InferencePrecision
) -> tuple[EngineTrial, Engine | None]:
    """Try an engine on the CPU; there is none where it cannot be taken."""
    spec = preprocess
    shape = (spec.num_channels, spec.crop_size, spec.crop_size)
    device = torch.device("cpu")
    try:
        check_engine(name, _PRECISIONS[precision], device, spelled=get_args(InferencePrecision))
        engine = make_named_engine(network, name, precision=precision, device=device)
        size = choose_batch_size(engine, shape, num_images=0, device=device)
        images = torch.randn(size, *shape, generator=generator_for(0))
        difference = relative_difference(engine(images), _reference(network, images))
        allowed = TOLERANCES[_PRECISIONS[precision]]
        if not difference <= allowed:
            reason = (
                f"its logits differ by {difference:.3g} from PyTorch's, allowed are {allowed:g}"
            )
            return EngineTrial(name, difference=difference, reason=reason), None
        seconds = min(_seconds(engine, images) for _ in range(_NUM_RUNS))
    except Exception as error:  # Libraries raise many classes; PyTorch's own end the choice.
        if name == "pytorch":
            raise
        return EngineTrial(name, reason=str(error)), None
    return EngineTrial(name, count_lanes(engine) * size / seconds, difference), engine


@torch.no_grad()
def _reference(network: nn.Module, images: Tensor) -> Tensor:
    """Return the logits of the network as it is."""
    with evaluating(network):
        logits: Tensor = network(images)
    return logits.float()


def _seconds(engine: Engine, images: Tensor) -> float:
    """Return how long a batch takes in each lane, all of them at work."""
    num_lanes = count_lanes(engine)
    started = time.perf_counter()
    batches = iter([images] * num_lanes)
    for outputs in run_in_lanes(
        batches, engine, num_lanes=num_lanes, cores_each=count_cores(engine)
    ):
        outputs.cpu()  # A device has computed what lies on the CPU.
    return time.perf_counter() - started
