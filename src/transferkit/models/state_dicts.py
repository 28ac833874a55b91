"""State dicts as they are found in files: within checkpoints, and under prefixed names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import TypeGuard

from torch import Tensor

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What `DataParallel`, `torch.compile` and Lightning put before the names of a network."""


def is_state_dict(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    """Tell whether a value is names to tensors.

    Example:
        >>> is_state_dict({"weight": 1.0})
        False
    """
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(each, Tensor) for name, each in value.items()
    )


def find_state_dicts(content: object) -> dict[str, Mapping[str, Tensor]]:
    """Find the state dicts that a checkpoint holds beside other things.

    Args:
        content: What a file holds.

    Returns:
        The key of each to the state dict; those of optimizers and empty ones are none.

    Example:
        >>> import torch
        >>> list(find_state_dicts({"epoch": 3, "model": {"weight": torch.ones(1)}}))
        ['model']
    """
    items = content.items() if isinstance(content, Mapping) else ()
    return {str(key): value for key, value in items if is_state_dict(value) and value}


def strip_prefixes(state: Mapping[str, Tensor], own: Collection[str]) -> Mapping[str, Tensor]:
    """Take off what wrappers put before all names of a network.

    Args:
        state: Names to tensors.
        own: The names that the network has itself; a prefix that is among theirs stays.

    Returns:
        The same tensors, under the names without it.

    Example:
        >>> import torch
        >>> list(strip_prefixes({"module.fc.weight": torch.ones(1)}, ["fc.weight"]))
        ['fc.weight']
    """
    for prefix in PREFIXES:
        is_own = any(name.startswith(prefix) for name in own)
        if state and not is_own and all(name.startswith(prefix) for name in state):
            state = _strip(state, prefix)
    return state


def _strip(state: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
    stripped: OrderedDict[str, Tensor] = OrderedDict(
        (name.removeprefix(prefix), value) for name, value in state.items()
    )
    # PyTorch hangs the version of each module there, under the names of modules.
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        stripped._metadata = {  # type: ignore[attr-defined]
            f"{name}.".removeprefix(prefix).removesuffix("."): value
            for name, value in versions.items()
            if f"{name}.".startswith(prefix)
        }
    return stripped
