"""The engine that runs a network in ONNX Runtime, on the CPU."""

from __future__ import annotations

import copy
import functools
import importlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from transferkit.errors import missing_dependency
from transferkit.models.conversion import NUM_TRACED, ConvertedEngine, Run
from transferkit.models.engine_facts import describe_processor

ONNX_OPSET = 18
"""The version of ONNX's operators, of which PyTorch's newer exporter writes none below.

ONNX Runtime reads it from 1.14 on. A later one would shut out older runtimes for nothing.
"""

_PACKAGES = ("onnx", "onnxruntime")
_QUIET = 3  # Errors alone, of the levels of ONNX Runtime's log.


class ONNXRuntimeEngine(ConvertedEngine):
    """Run a copy of a network in ONNX Runtime, converted once for each size of images.

    It computes in float32.

    Args:
        prefix: The network, from images `(N, C, H, W)` to `(N, ...)`; it is not changed.
        num_lanes: How many threads it computes for side by side.

    Raises:
        MissingDependencyError: ONNX or ONNX Runtime is not installed.
    """

    library = "ONNX Runtime"

    def __init__(self, prefix: nn.Module, *, num_lanes: int = 1) -> None:
        self._onnxruntime = import_onnx()[1]
        super().__init__(prefix, precision="float32", num_lanes=num_lanes)

    def describe(self) -> dict[str, Any]:
        """Return all that can change the bits of its results, as plain JSON data."""
        return {
            "engine": "onnxruntime",
            "engine_version": str(self._onnxruntime.__version__),
            "precision": self._precision,
            "opset": ONNX_OPSET,
            "torch_version": str(torch.__version__),  # Whose exporter writes the graph.
            "processor": describe_processor(torch.device("cpu")),
        }

    def _compile(self, shape: tuple[int, ...]) -> Run:
        return open_onnx(convert_to_onnx(self._network, shape), num_threads=self.cores_each)


def convert_to_onnx(
    network: nn.Module, shape: tuple[int, ...], *, output_name: str = "outputs"
) -> bytes:
    """Convert a network for any number of images, in memory.

    PyTorch's older exporter is asked for: the newer one needs a further package, and took 3 to
    25 seconds for a network of torchvision where this one took 0.1 to 3.

    Args:
        network: The network, in eval mode, from images `(N, C, H, W)` to one tensor `(N, ...)`.
        shape: (C, H, W) of the images.
        output_name: What the output is called; the input is `images`.

    Returns:
        An ONNX model. Whatever class the exporter raises is passed on.
    """
    # Attention layers have a fast path where nothing has gradients, which ONNX does not know.
    network = copy.deepcopy(network)
    for parameter in network.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_()
    file = io.BytesIO()
    with warnings.catch_warnings(), _no_graphs_printed(), torch.enable_grad():
        # It warns of its age, and of what it may fix: a comparison looks at that.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.zeros(NUM_TRACED, *shape),),
            file,  # type: ignore[arg-type] # It writes to files in memory too.
            dynamo=False,
            opset_version=ONNX_OPSET,
            input_names=["images"],
            output_names=[output_name],
            dynamic_axes={"images": {0: "batch"}, output_name: {0: "batch"}},
        )
    return file.getvalue()


@contextmanager
def _no_graphs_printed() -> Iterator[None]:
    """Keep PyTorch from printing the whole graph of a network that it cannot export.

    It does so on the standard output, whatever its `verbose` is.
    """
    name = "_jit_onnx_log"
    original = getattr(torch._C, name, None)
    setattr(torch._C, name, lambda *_: None)
    try:
        yield
    finally:
        setattr(torch._C, name, original)


def open_onnx(model: bytes | str, *, num_threads: int | None = None) -> Run:
    """Open an ONNX model on the CPU.

    Args:
        model: The model, or the path of a file that holds one.
        num_threads: The threads that compute for a call; None takes as many as PyTorch has now.

    Returns:
        What runs it; several threads may call it.
    """
    runtime = import_onnx()[1]
    options = runtime.SessionOptions()
    options.intra_op_num_threads = num_threads or torch.get_num_threads()
    options.log_severity_level = _QUIET
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return functools.partial(_run, session)


def _run(session: Any, images: Tensor) -> Tensor:
    ready = images.detach().to("cpu", torch.float32).contiguous()
    outputs = session.run(None, {session.get_inputs()[0].name: ready.numpy()})[0]
    return torch.from_numpy(outputs)


def import_onnx(purpose: str = 'engine="onnxruntime"') -> tuple[ModuleType, ModuleType]:
    """Return the modules `onnx` and `onnxruntime`.

    Raises:
        MissingDependencyError: One of them is not installed.
    """
    modules = []
    for package in _PACKAGES:
        try:
            modules.append(importlib.import_module(package))
        except ModuleNotFoundError as error:
            raise missing_dependency(package, purpose=purpose, extra="onnx") from error
    return modules[0], modules[1]
