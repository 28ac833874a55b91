"""In which number format the network computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from transferkit.errors import ConfigError
from transferkit.models.engine_facts import has_bfloat16

_NAMES = {
    "fp32": "float32",
    "float32": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
}


class Precision:
    """Run forward passes in a number format, the weights staying float32.

    Matrix products and convolutions compute in it, sums and losses in float32, as PyTorch's
    autocast says. float16 has few exponents: gradients are scaled up so as not to vanish.

    Args:
        name: "fp32", "bf16", "fp16" or their long names; "auto" takes bfloat16 where the device
            has instructions for it, else float32.
        device: Where the network computes.

    Raises:
        ConfigError: There is no such precision, or the device cannot compute in it.

    Example:
        >>> Precision("fp32", torch.device("cpu")).name
        'float32'

    References:
        Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.device: torch.device = device
        self.name: str = _resolve(name, device)
        self.scaler: torch.amp.GradScaler | None = None
        if self.name == "float16":
            self.scaler = torch.amp.GradScaler(device.type)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Run a block in which networks compute in the precision."""
        if self.name == "float32":
            yield
            return
        with torch.autocast(self.device.type, dtype=getattr(torch, self.name)):
            yield


def _resolve(name: str, device: torch.device) -> str:
    if name == "auto":
        return "bfloat16" if has_bfloat16(device) else "float32"
    if not isinstance(name, str) or name not in _NAMES:
        raise ConfigError(
            f'`precision` should be "fp32", "bf16", "fp16" or "auto", found {name!r}.'
        )
    found = _NAMES[name]
    if found == "bfloat16" and not has_bfloat16(device):
        raise ConfigError(
            f'precision="{name}" needs instructions for bfloat16, which `{device}` does not have; '
            f'without them it takes many times as long. Pass precision="auto" or "fp32".'
        )
    if found == "float16" and device.type == "cpu":
        raise ConfigError(
            f'precision="{name}" needs an accelerator, found the device `{device}`. Pass '
            f'precision="auto" or "fp32".'
        )
    return found
