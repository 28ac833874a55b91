"""Keeping freed memory in the process, where the C library would give it back each time."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

VARIABLE = "TRANSFERKIT_KEEP_BUFFERS"
"""Set to 0 in the environment it leaves the allocator alone."""

# glibc's names for what can be set, from its `malloc.h`.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_MMAP_MAX = -4

_MIB = 2**20
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
# The first call of `mallopt` ends glibc's own adjustment of the thresholds for good, and they
# cannot be read. These are what it comes to in a process that has freed a large buffer; with
# the 128 KiB it begins with, the rest of the program would be slower than it was before.
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 * _MIB, _TRIM_THRESHOLD: 64 * _MIB}

_OWN_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

_lock = threading.Lock()
_num_open = 0


@contextmanager
def buffers_kept() -> Iterator[bool]:
    """Run a block in which the memory of freed buffers stays with the process.

    glibc takes each buffer of more than 32 MiB from the kernel and gives it back when it is
    freed, so that the next one is cleared and mapped anew, page by page. The activations of
    a batch are such buffers, and the kernel's work can take longer than the network's. In
    this block they come from memory that the process keeps. In return, its resident memory
    does not shrink while the block runs, and grows to the most that it ever held at once,
    and by what lies scattered between buffers still in use. Memory that is free at the end
    goes back to the system then.

    The setting is the process's: blocks within one another and in several threads count,
    and the last one to end takes it back. Nothing happens where the C library is not glibc,
    another allocator takes its place, the environment sets the thresholds by glibc's own
    variables, or sets TRANSFERKIT_KEEP_BUFFERS to 0.

    Yields:
        Whether it is in effect.

    Example:
        >>> with buffers_kept() as kept:
        ...     isinstance(kept, bool)
        True
    """
    library = None if _is_left_alone(os.environ) else _find_glibc()
    if library is None:
        yield False
        return
    _count(library, 1)
    try:
        yield True
    finally:
        _count(library, -1)


def _count(library: Any, change: int) -> None:
    """Note that a block begins or ends; the first and the last one set the allocator."""
    global _num_open
    with _lock:
        was_open = _num_open > 0
        _num_open += change
        is_open = _num_open > 0
        if is_open == was_open:
            return
        for name, value in (_KEEPING if is_open else _USUAL).items():
            library.mallopt(name, value)
        if not is_open:
            library.malloc_trim(0)


def _is_left_alone(environment: Mapping[str, str]) -> bool:
    return (
        environment.get(VARIABLE) == "0"
        or any(name in environment for name in _OWN_SETTINGS)
        or "glibc.malloc." in environment.get("GLIBC_TUNABLES", "")
    )


class _SymbolInfo(ctypes.Structure):
    """What `dladdr` tells of an address: `Dl_info` of `dlfcn.h`."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _find_glibc() -> Any:
    """Return the C library where it is glibc and its allocator is in use, else None."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return None
    # An allocator that is loaded before glibc, such as jemalloc, has a `malloc` of its own.
    homes = {_home_of(library, name) for name in ("malloc", "mallopt", "gnu_get_libc_version")}
    return library if len(homes) == 1 else None


def _home_of(library: Any, name: str) -> int | None:
    """Return the address at which the file that holds a function is loaded."""
    info = _SymbolInfo()
    library.dladdr(ctypes.cast(getattr(library, name), ctypes.c_void_p), ctypes.byref(info))
    base: int | None = info.base
    return base
