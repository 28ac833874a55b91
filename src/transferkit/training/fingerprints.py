"""Fingerprints of what a network and a callable compute: their structure, options and code."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from enum import Enum
from functools import partial
from types import CellType, CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

_VERSIONED = frozenset({"builtins", "torch", "torchvision"})
"""Packages whose code their version tells, which belongs into a key beside fingerprints."""

_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")

_PLAIN = (bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device)


def structure_digest(module: nn.Module) -> str:
    """Return the SHA-256 over what a network computes with its weights, in eval mode.

    It sees the modules and their order, their options, and the code of classes that are not
    PyTorch's own; not functions elsewhere that this code calls. It is the same in every
    process.

    Args:
        module: The network. Its weights make no difference.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> one, other = (nn.Sequential(nn.Flatten(), nn.LeakyReLU(slope)) for slope in (0.1, 0.2))
        >>> structure_digest(one) == structure_digest(other)
        False
    """
    digest = hashlib.sha256(_ADDRESS.sub("", repr(module)).encode())
    kinds: dict[type, None] = {}
    for path, each in module.named_modules():
        kinds[type(each)] = None
        digest.update(f"\0{path}\0{sorted(_options(each))}".encode())
        if isinstance(each, fx.GraphModule):
            digest.update(f"\0{_ADDRESS.sub('', each.code)}".encode())
    for kind in kinds:
        digest.update(f"\0{code_of(kind)}".encode())
    return digest.hexdigest()


def tensors_digest(module: nn.Module) -> str:
    """Return the SHA-256 over the names, types, shapes and bytes of parameters and buffers.

    Args:
        module: The network; buffers that are in no state dict count, too.

    Returns:
        64 hexadecimal digits. The layout in memory and the device make no difference.
    """
    tensors: dict[str, Tensor] = dict(module.named_buffers(remove_duplicate=False))
    tensors |= dict(module.named_parameters(remove_duplicate=False))
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        plain = value.detach().cpu().contiguous()
        digest.update(f"\0{name}\0{plain.dtype}\0{tuple(plain.shape)}\0".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def code_of(kind: type) -> str:
    """Return a text that changes with the code and the constants of a class and its bases.

    Args:
        kind: The class. Bases of PyTorch and of Python itself count by their name only.
    """
    parts = [f"{kind.__module__}.{kind.__qualname__}"]
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in _VERSIONED:
            continue
        for name, value in sorted(vars(base).items()):
            value = getattr(value, "__func__", getattr(value, "fget", value))
            is_constant = not name.startswith("__")
            if isinstance(value, FunctionType) or is_constant:
                text = describe(value)
                parts += [f"{name}={text}"] if text is not None else []
    return "\n".join(parts)


def describe(value: Any, *, within: tuple[Any, ...] = ()) -> str | None:
    """Return a text for a value that is the same in every process, or None where there is none.

    Args:
        value: A number, text, member of an enumeration, dtype, device, None, tuple or list of
            these; or a function, told by its code, defaults and what it has enclosed.
        within: The functions that enclose the value.

    Example:
        >>> describe((0.5, "bicubic")), describe(object())
        ("(0.5,'bicubic',)", None)
    """
    if value is None or isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, (tuple, list)):
        parts = [describe(each, within=within) for each in value]
        return None if None in parts else f"({''.join(f'{part},' for part in parts)})"
    if isinstance(value, partial):
        called = (value.func, value.args, *sorted(value.keywords.items()))
        return describe(called, within=within)
    value = getattr(value, "__func__", value)  # A method's function.
    if isinstance(value, FunctionType) and value not in within:
        return _describe_function(value, (*within, value))
    if callable(value) and hasattr(value, "__qualname__"):  # Built in, a class, or a recursion.
        return f"{value.__module__}.{value.__qualname__}"
    return None


def _describe_function(function: FunctionType, within: tuple[Any, ...]) -> str:
    cells = [_content(cell) for cell in function.__closure__ or ()]
    values = (function.__defaults__, *(function.__kwdefaults__ or {}).items(), *cells)
    options = [describe(each, within=within) for each in values]
    code = "\n".join(_describe_code(function.__code__))
    return f"{function.__module__}.{function.__qualname__}({options}): {code}"


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # A name that has no value yet.
        return None


def _describe_code(code: CodeType) -> Iterator[str]:
    """Describe compiled code without the file and the lines that it comes from."""
    yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _describe_code(constant)
        elif isinstance(constant, frozenset):
            yield str(sorted(map(repr, constant)))  # Their order differs between processes.
        else:
            yield repr(constant)


def _options(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Iterate over what a module has been told, as far as it is plain."""
    for name, value in vars(module).items():
        if not name.startswith("_") and name != "training":
            text = describe(value)
            if text is not None:
                yield name, text
