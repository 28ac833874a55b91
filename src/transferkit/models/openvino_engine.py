"""The engine that runs a network in OpenVINO, on the CPU."""

from __future__ import annotations

import functools
import importlib
import warnings
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from transferkit.errors import missing_dependency
from transferkit.models.conversion import NUM_TRACED, ConvertedEngine, Run
from transferkit.models.engine_facts import describe_processor

_HINTS = {"float32": "f32", "bfloat16": "bf16"}


@functools.cache
def _core() -> Any:
    """Return the one core of this process, which stays.

    A core takes the alternate stack of the thread's signal handlers, and frees it at its end.
    Of two that end in the order in which they began, the last leaves the thread with a stack
    that is not there any more, and the next signal ends the process.
    """
    return import_openvino().Core()


class OpenVINOEngine(ConvertedEngine):
    """Run a copy of a network in OpenVINO, converted once for each size of images.

    Args:
        prefix: The network, from images `(N, C, H, W)` to `(N, ...)`; it is not changed.
        precision: What is computed in, "float32" or "bfloat16".
        num_lanes: How many threads it computes for side by side.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
    """

    library = "OpenVINO"

    def __init__(self, prefix: nn.Module, *, precision: str, num_lanes: int = 1) -> None:
        self._openvino = import_openvino()
        super().__init__(prefix, precision=precision, num_lanes=num_lanes)

    def describe(self) -> dict[str, Any]:
        """Return all that can change the bits of its results, as plain JSON data."""
        return {
            "engine": "openvino",
            "engine_version": str(self._openvino.__version__),
            "precision": self._precision,
            "processor": describe_processor(torch.device("cpu")),
        }

    def _compile(self, shape: tuple[int, ...]) -> Run:
        model = convert_to_openvino(self._network, shape)
        return compile_openvino(
            model, self._precision, num_lanes=self.num_lanes, num_threads=self.num_cores
        )


def convert_to_openvino(network: nn.Module, shape: tuple[int, ...]) -> Any:
    """Convert a network for any number of images, without the report of `convert_model`.

    Args:
        network: The network, in eval mode, from images `(N, C, H, W)` to one tensor `(N, ...)`.
        shape: (C, H, W) of the images.

    Returns:
        An `openvino.Model`. Whatever class its parts raise is passed on.
    """
    frontend = importlib.import_module("openvino.frontend")
    decoders = importlib.import_module("openvino.frontend.pytorch.ts_decoder")
    with warnings.catch_warnings():
        # PyTorch warns of `trace` itself, and of what it may fix: a comparison looks at that.
        warnings.simplefilter("ignore")
        example = torch.zeros(NUM_TRACED, *shape)
        traced = torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]
    decoder = decoders.TorchScriptPythonDecoder(traced)  # Held until all is converted.
    # The steps of `openvino.convert_model`, which reports its use over the network.
    reader = frontend.FrontEndManager().load_by_framework("pytorch")
    model = reader.convert(reader.load(decoder))
    model.reshape(import_openvino().PartialShape([-1, *shape]))
    return model


def read_openvino(graph: Path, weights: Path) -> Any:
    """Read an `openvino.Model` into memory, so that its files are free again."""
    return _core().read_model(graph.read_bytes(), weights.read_bytes())


def compile_openvino(
    model: Any, precision: str = "float32", *, num_lanes: int = 1, num_threads: int | None = None
) -> Run:
    """Compile an `openvino.Model` for the CPU.

    Args:
        model: The model.
        precision: "float32" or "bfloat16".
        num_lanes: How many calls compute side by side, each with its share of the threads.
        num_threads: The threads of all of them; None takes as many as PyTorch has now.

    Returns:
        What runs it; several threads may call it, and wait where no lane is free.
    """
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "INFERENCE_NUM_THREADS": num_threads or max(torch.get_num_threads(), num_lanes),
    }
    if num_lanes == 1:
        options["PERFORMANCE_HINT"] = "LATENCY"  # All threads at one batch.
    else:
        options["NUM_STREAMS"] = num_lanes
    compiled = _core().compile_model(model, "CPU", options)
    requests: SimpleQueue[Any] = SimpleQueue()
    for _ in range(num_lanes):
        requests.put(compiled.create_infer_request())
    return functools.partial(_run, requests)


def _run(requests: SimpleQueue[Any], images: Tensor) -> Tensor:
    ready = images.detach().to("cpu", torch.float32).contiguous()
    request = requests.get()
    try:
        outputs = request.infer([ready.numpy()], share_inputs=True)[0]
        return torch.from_numpy(outputs.copy())  # The request writes the next ones to its place.
    finally:
        requests.put(request)


def import_openvino(purpose: str = 'engine="openvino"') -> Any:
    """Return the module `openvino`.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        return importlib.import_module("openvino")
    except ModuleNotFoundError as error:
        raise missing_dependency("openvino", purpose=purpose, extra="openvino") from error
