"""What engines ask of the machine and of the networks that they run."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transferkit.errors import BackboneError

_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
_CPU_FACTS = Path("/proc/cpuinfo")


def has_bfloat16(device: torch.device) -> bool:
    """Tell whether a device computes in bfloat16 by instructions of its own.

    Example:
        >>> isinstance(has_bfloat16(torch.device("cpu")), bool)
        True
    """
    if device.type == "cpu":
        return any(cpu_capabilities().get(name, False) for name in _BFLOAT16_INSTRUCTIONS)
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return True


def cpu_capabilities() -> Mapping[str, Any]:
    """Return what the processor can do, by the names of its instructions."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is not None:
        capabilities: Mapping[str, Any] = ask()
        return capabilities
    with suppress(OSError):  # Before PyTorch 2.11; only Linux has this file.
        return dict.fromkeys(_CPU_FACTS.read_text().split(), True)
    return {}


def describe_processor(device: torch.device) -> str:
    """Name what decides which kernels run on a device, and so the last bits of results.

    Example:
        >>> describe_processor(torch.device("cpu")).startswith(platform.machine())
        True
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{platform.machine()} {device.type}"


def describe_float32(device: torch.device) -> str:
    """Name the precision in which PyTorch is set to multiply float32 on a device."""
    all_backends: Any = torch.backends  # PyTorch's annotations lack these settings.
    if device.type == "cuda":
        backends = (all_backends.cudnn.conv, all_backends.cuda.matmul)
    else:
        backends = (all_backends.mkldnn.conv, all_backends.mkldnn.matmul)
    # Not `torch.get_float32_matmul_precision`, which raises once either of these was set.
    return " ".join(str(each.fp32_precision) for each in backends)


def one_tensor(outputs: Any, count: int) -> Tensor:
    """Return what a network made of images when it is one tensor with a row for each.

    Args:
        outputs: What it returned.
        count: The number of images.

    Raises:
        BackboneError: It is something else.
    """
    if isinstance(outputs, Tensor) and outputs.dim() > 0 and len(outputs) == count:
        return outputs
    is_tensor = isinstance(outputs, Tensor)
    found = f"the shape {tuple(outputs.shape)}" if is_tensor else type(outputs).__name__
    raise BackboneError(
        f"The network should give one tensor with a row for each of {count} images, found {found}."
    )
