"""The engine that runs a network in OpenVINO, on the CPU."""

from __future__ import annotations

import copy
import functools
import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from transferkit._seeding import generator_for
from transferkit.errors import BackboneError, missing_dependency
from transferkit.models.engine_facts import describe_processor, one_tensor

_NUM_TRACED, _NUM_COMPARED = 2, 3
_HINTS = {"float32": "f32", "bfloat16": "bf16"}
_TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}


@functools.cache
def _core() -> Any:
    """Return the one core of this process, which stays.

    A core takes the alternate stack of the thread's signal handlers, and frees it at its end.
    Of two that end in the order in which they began, the last leaves the thread with a stack
    that is not there any more, and the next signal ends the process.
    """
    return import_openvino().Core()


class OpenVINOEngine:
    """Run a copy of a network in OpenVINO, converted once for each size of images.

    A conversion fixes what the network's Python does, for any number of images. So each is
    compared with PyTorch on a few images of noise, more than it was traced with.

    Args:
        prefix: The network, from images `(N, C, H, W)` to `(N, ...)`; it is not changed.
        precision: What is computed in, "float32" or "bfloat16".

    Raises:
        MissingDependencyError: OpenVINO is not installed.
    """

    def __init__(self, prefix: nn.Module, *, precision: str) -> None:
        self._openvino = import_openvino()
        self._network = copy.deepcopy(prefix).eval().requires_grad_(False)
        self._precision = precision
        self._compiled: dict[tuple[int, ...], Any] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 `(N, ...)` for images float32 `(N, C, H, W)`.

        Raises:
            BackboneError: The network cannot be converted, or gives other values after it.
        """
        shape = tuple(images.shape[1:])
        if shape not in self._compiled:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                self._compiled[shape] = self._compile(shape)
        return _run(self._compiled[shape], images)

    def describe(self) -> dict[str, Any]:
        """Return all that can change the bits of its results, as plain JSON data."""
        return {
            "engine": "openvino",
            "engine_version": str(self._openvino.__version__),
            "precision": self._precision,
            "processor": describe_processor(torch.device("cpu")),
        }

    def _compile(self, shape: tuple[int, ...]) -> Any:
        """Convert the network for any number of images of one shape, and compare."""
        example = torch.zeros(_NUM_TRACED, *shape)
        one_tensor(self._network(example), _NUM_TRACED)
        try:
            converted = self._convert(example)
            converted.reshape(self._openvino.PartialShape([-1, *shape]))
            options = {
                "INFERENCE_PRECISION_HINT": _HINTS[self._precision],
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY",  # All threads at one batch.
            }
            compiled = _core().compile_model(converted, "CPU", options)
        except Exception as error:  # Its parts raise many classes.
            lines = str(error).splitlines() or [type(error).__name__]
            raise BackboneError(
                f"OpenVINO cannot convert the network for images of the shape {shape}: "
                f'{lines[-1].strip(" -.")}. Take engine="pytorch".'
            ) from error
        self._compare(compiled, shape)
        return compiled

    def _convert(self, example: Tensor) -> Any:
        """Take the steps of `openvino.convert_model`, which reports its use over the network."""
        frontend = importlib.import_module("openvino.frontend")
        decoders = importlib.import_module("openvino.frontend.pytorch.ts_decoder")
        with warnings.catch_warnings():
            # PyTorch warns of `trace` itself, and of what it may fix: `_compare` looks at that.
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(self._network, example, check_trace=False)  # type: ignore[no-untyped-call]
        decoder = decoders.TorchScriptPythonDecoder(traced)  # Held until all is converted.
        reader = frontend.FrontEndManager().load_by_framework("pytorch")
        return reader.convert(reader.load(decoder))

    def _compare(self, compiled: Any, shape: tuple[int, ...]) -> None:
        noise = torch.randn(_NUM_COMPARED, *shape, generator=generator_for(0))
        expected, found = self._network(noise), _run(compiled, noise)
        difference = float("inf")
        if found.shape == expected.shape:
            largest = max(float(expected.abs().max()), 1e-12)
            difference = float((found - expected).abs().max()) / largest
        allowed = _TOLERANCES[self._precision]
        if not difference <= allowed:
            raise BackboneError(
                f"The network gives other values in OpenVINO than in PyTorch: relative to the "
                f"largest they differ by {difference:.3g}, allowed are {allowed:g}. Its forward "
                f"pass may depend on the values or the number of images. Take "
                f'engine="pytorch".'
            )


def _run(compiled: Any, images: Tensor) -> Tensor:
    ready = images.detach().to("cpu", torch.float32).contiguous()
    outputs = compiled([ready.numpy()], share_inputs=True)[0]
    return torch.from_numpy(outputs.copy())  # OpenVINO writes the next ones to its place.


def import_openvino() -> Any:
    """Return the module `openvino`.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        return importlib.import_module("openvino")
    except ModuleNotFoundError as error:
        raise missing_dependency(
            "openvino", purpose='engine="openvino"', extra="openvino"
        ) from error
