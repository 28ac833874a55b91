"""Choosing the device, saying in words which one it is, and what it can do."""

from __future__ import annotations

import platform

import torch

from transferkit.errors import ConfigError


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Turn a device choice into a `torch.device` that this machine has.

    Args:
        device: "auto" takes the accelerator that PyTorch finds (CUDA, MPS, XPU, MTIA),
            else the CPU. Any other value names a device: "cpu", "cuda:1".

    Returns:
        The device.

    Raises:
        ConfigError: The name is no device, or this machine does not have it.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if isinstance(device, str) and device == "auto":
        return accelerator or torch.device("cpu")
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f'`device` should be "auto", "cpu" or the name of an accelerator such as '
            f'"cuda:0", found {device!r}.'
        ) from error
    if wanted.type == "cpu":
        return wanted
    if accelerator is None or wanted.type != accelerator.type:
        found = accelerator.type if accelerator else "no accelerator"
        raise ConfigError(
            f"Device `{wanted}` is not available: PyTorch finds {found} on this machine. "
            f'Use `device="auto"` or `device="cpu"`.'
        )
    count = torch.accelerator.device_count()
    if wanted.index is not None and wanted.index >= count:
        raise ConfigError(
            f"Device `{wanted}` is not available: this machine has {count} of that type, "
            f"numbered from 0."
        )
    return wanted


def describe_device(device: torch.device) -> str:
    """Say in words what `device` is: its name, and for a CPU the number of threads.

    Example:
        >>> describe_device(torch.device("cpu")).startswith("cpu (")
        True
    """
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({platform.machine()}, {threads} thread{'s' if threads != 1 else ''})"
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def has_streams(device: torch.device) -> bool:
    """Tell whether a device copies from page-locked memory while it computes.

    Those of CUDA, ROCm and XPU do. On MPS the memory is that of the CPU.

    Example:
        >>> has_streams(torch.device("cuda")), has_streams(torch.device("cpu"))
        (True, False)
    """
    return device.type in ("cuda", "xpu")


def empty_cache(device: torch.device) -> None:
    """Give back what PyTorch keeps of an accelerator's memory; nothing on the CPU.

    Example:
        >>> empty_cache(torch.device("cpu"))
    """
    if device.type == "mps":
        torch.mps.empty_cache()  # The general call does not know MPS in all versions.
    elif device.type != "cpu":
        torch.accelerator.empty_cache()


def free_device_memory(device: torch.device) -> int:
    """Return the bytes that are free on an accelerator; 0 where PyTorch cannot tell."""
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type in ("cuda", "xpu"):
        free: int = getattr(torch, device.type).mem_get_info(device)[0]
        return free
    return 0
