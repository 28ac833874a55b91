"""State as plain data: what a checkpoint keeps of an optimizer, a schedule or a callback.

Tensors go into the file as tensors, and all else into its JSON text, to the bit. Nothing is
pickled: what is none of the types below is an error when it is saved, not when it is loaded.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transferkit.errors import CheckpointError

_MARK = "$"
"""The key that tells a marked value, such as a tuple, from a plain dict."""


def pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Turn a state into JSON data and tensors.

    Args:
        value: None, booleans, numbers, texts, tensors, NumPy's arrays, and lists, tuples,
            dicts, sets, counters and deques of them.
        tensors: Takes the tensors, under names that begin with `name`.
        name: Where the value stands, for the tensors' names and the error text.

    Returns:
        What `unpack` takes.

    Raises:
        CheckpointError: Something in it is of another type.

    Example:
        >>> tensors = {}
        >>> packed = pack({"betas": (0.9, 0.99), "step": torch.tensor(3.0)}, tensors, "adam")
        >>> packed["betas"], packed["step"]
        ({'$': 'tuple', 'items': [0.9, 0.99]}, {'$': 'tensor', 'name': 'adam.step'})
        >>> unpack(packed, tensors)
        {'betas': (0.9, 0.99), 'step': tensor(3.)}
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, (float, np.floating)):
        number = float(value)
        return number if math.isfinite(number) else {_MARK: "float", "value": repr(number)}
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, Tensor):
        return {_MARK: "tensor", "name": _keep(value, tensors, name)}
    if isinstance(value, np.ndarray) and value.dtype != object:
        tensor = torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape)
        return {_MARK: "array", "name": _keep(tensor, tensors, name)}
    return _pack_container(value, tensors, name)


def _keep(tensor: Tensor, tensors: dict[str, Tensor], name: str) -> str:
    """Put a tensor beside the others, and return the name that it has there."""
    unique, number = name, 1
    while unique in tensors:  # The keys of dicts may have dots in them.
        number += 1
        unique = f"{name}#{number}"
    tensors[unique] = tensor
    return unique


def _pack_container(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    kind = type(value)
    if kind in (dict, OrderedDict, Counter):
        if kind is dict and all(type(key) is str and key != _MARK for key in value):
            return {key: pack(each, tensors, f"{name}.{key}") for key, each in value.items()}
        pairs = [
            [pack(key, tensors, f"{name}.key{n}"), pack(each, tensors, f"{name}.{key}")]
            for n, (key, each) in enumerate(value.items())
        ]
        return {_MARK: kind.__name__, "items": pairs}
    if kind in (list, tuple, deque, set, frozenset):
        items = [pack(each, tensors, f"{name}.{n}") for n, each in enumerate(value)]
        if kind is list:
            return items
        more = {"maxlen": value.maxlen} if isinstance(value, deque) else {}
        return {_MARK: kind.__name__, "items": items, **more}
    raise CheckpointError(
        f"A checkpoint cannot keep `{name}`, which is a {kind.__module__}.{kind.__qualname__}. "
        f"It should hold numbers, texts, tensors, and lists, tuples and dicts of them alone."
    )


def unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    """Turn back what `pack` gave.

    Args:
        packed: The JSON data.
        tensors: The tensors by their names.

    Returns:
        A state equal to the one that was packed.

    Raises:
        CheckpointError: The data is not of that form.
    """
    if isinstance(packed, list):
        return [unpack(each, tensors) for each in packed]
    if not isinstance(packed, dict):
        return packed
    if _MARK not in packed:
        return {key: unpack(each, tensors) for key, each in packed.items()}
    try:
        return _unpack_marked(packed, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"This is no state of a checkpoint: {packed!r:.200}.") from error


def _unpack_marked(packed: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    mark = packed[_MARK]
    if mark == "float":
        return float(packed["value"])
    if mark == "tensor":
        return tensors[packed["name"]]
    if mark == "array":
        return tensors[packed["name"]].numpy()
    items = [unpack(each, tensors) for each in packed["items"]]
    if mark == "deque":
        return deque(items, maxlen=packed["maxlen"])
    if mark == "Counter":
        return Counter(dict(items))
    kinds: dict[str, Any] = {
        "dict": dict,
        "OrderedDict": OrderedDict,
        "tuple": tuple,
        "set": set,
        "frozenset": frozenset,
    }
    return kinds[mark](items)
