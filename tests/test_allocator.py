from __future__ import annotations

import ctypes
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from transferkit import _allocator
from transferkit._allocator import buffers_kept

KEEPING = [("mmap_max", 0), ("trim_threshold", -1)]
USUAL = [("mmap_max", 65536), ("mmap_threshold", 2**25), ("trim_threshold", 2**26), ("trim", 0)]


class FakeLibrary:
    """A C library that notes what is set."""

    def __init__(self) -> None:
        self.names = {-1: "trim_threshold", -3: "mmap_threshold", -4: "mmap_max"}
        self.calls: list[tuple[str, int]] = []

    def mallopt(self, name: int, value: int) -> int:
        self.calls.append((self.names[name], value))
        return 1

    def malloc_trim(self, padding: int) -> int:
        self.calls.append(("trim", padding))
        return 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """What is found in place of glibc, in an environment that sets nothing."""
    fake = FakeLibrary()
    monkeypatch.setattr(_allocator, "_find_glibc", lambda: fake)
    for name in (_allocator.VARIABLE, "GLIBC_TUNABLES", *_allocator._OWN_SETTINGS):
        monkeypatch.delenv(name, raising=False)
    return fake


def test_kept_within_the_block_and_given_back_after_it(library: FakeLibrary) -> None:
    with buffers_kept() as kept:
        assert kept is True
        assert library.calls == KEEPING
    assert library.calls == KEEPING + USUAL


def test_given_back_after_an_error(library: FakeLibrary) -> None:
    with pytest.raises(RuntimeError, match="stop"), buffers_kept():
        raise RuntimeError("stop")
    assert library.calls == KEEPING + USUAL


def test_the_outermost_of_nested_blocks_counts(library: FakeLibrary) -> None:
    with buffers_kept():
        with buffers_kept() as kept:
            assert kept is True
        assert library.calls == KEEPING
    assert library.calls == KEEPING + USUAL
    with buffers_kept():
        assert library.calls == KEEPING + USUAL + KEEPING


def test_the_last_of_several_threads_gives_back(library: FakeLibrary) -> None:
    inside, outside = threading.Barrier(8), threading.Barrier(8)
    seen = []

    def work() -> None:
        with buffers_kept():
            inside.wait(timeout=60)
            seen.append(list(library.calls))
            outside.wait(timeout=60)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [KEEPING] * 8
    assert library.calls == KEEPING + USUAL


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TRANSFERKIT_KEEP_BUFFERS", "0"),
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("MALLOC_MMAP_THRESHOLD_", "131072"),
        ("MALLOC_MMAP_MAX_", "65536"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=128"),
    ],
)
def test_the_environment_decides(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with buffers_kept() as kept:
        assert kept is False
    assert library.calls == []


def test_other_settings_of_the_environment_do_not_matter(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSFERKIT_KEEP_BUFFERS", "1")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.cpu.x86_hle=0")
    with buffers_kept() as kept:
        assert kept is True


def test_nothing_happens_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_allocator.VARIABLE, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    with buffers_kept() as kept:
        assert kept is False


def test_nothing_happens_on_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: object) -> Any:
        raise AssertionError("There is no library to ask.")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with buffers_kept() as kept:
        assert kept is False


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is not glibc")
def test_nothing_happens_under_another_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    homes = {"malloc": 1, "mallopt": 2, "gnu_get_libc_version": 2}
    monkeypatch.setattr(_allocator, "_home_of", lambda library, name: homes[name])
    with buffers_kept() as kept:
        assert kept is False


@pytest.mark.skipif(_allocator._find_glibc() is None, reason="glibc's allocator is not in use")
def test_a_large_buffer_costs_no_page_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    def count_faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.ones(2**24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    monkeypatch.setattr(_allocator, "_is_left_alone", lambda environment: False)
    usual = count_faults()
    if not usual:
        pytest.skip("this system counts no page faults")
    with buffers_kept() as kept:
        # A small buffer may come to lie where a large one was: then one more is mapped.
        within = min(count_faults() for _ in range(4))
    assert kept is True
    assert within < usual / 10
    assert count_faults() > usual / 10
