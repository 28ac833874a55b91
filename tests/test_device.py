from __future__ import annotations

import platform
from typing import Any

import pytest
import torch

from transferkit._device import (
    describe_device,
    empty_cache,
    free_device_memory,
    has_streams,
    resolve_device,
)
from transferkit.errors import ConfigError


def pretend(monkeypatch: pytest.MonkeyPatch, accelerator: str | None, count: int = 0) -> None:
    """Let PyTorch find this accelerator, whatever the machine has."""
    device = None if accelerator is None else torch.device(accelerator)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: device
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


def test_auto_takes_the_cpu_where_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None)
    assert resolve_device() == torch.device("cpu")


@pytest.mark.parametrize("accelerator", ["cuda", "mps", "xpu", "mtia"])
def test_auto_takes_the_accelerator(monkeypatch: pytest.MonkeyPatch, accelerator: str) -> None:
    pretend(monkeypatch, accelerator, 1)
    assert resolve_device("auto") == torch.device(accelerator)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_devices_without_hardware_are_always_there(
    monkeypatch: pytest.MonkeyPatch, device: str | torch.device
) -> None:
    pretend(monkeypatch, None)
    assert resolve_device(device) == torch.device(device)


def test_a_number_within_range_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cuda", 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device("cuda") == torch.device("cuda")


def test_a_number_out_of_range_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cuda", 2)
    with pytest.raises(ConfigError) as error:
        resolve_device("cuda:2")
    assert str(error.value) == (
        "Device `cuda:2` is not available: this machine has 2 of that type, numbered from 0."
    )


@pytest.mark.parametrize(("accelerator", "found"), [(None, "no accelerator"), ("mps", "mps")])
def test_another_accelerator_is_an_error(
    monkeypatch: pytest.MonkeyPatch, accelerator: str | None, found: str
) -> None:
    pretend(monkeypatch, accelerator, 1)
    with pytest.raises(ConfigError) as error:
        resolve_device("cuda:0")
    assert str(error.value) == (
        f"Device `cuda:0` is not available: PyTorch finds {found} on this machine. "
        f'Use `device="auto"` or `device="cpu"`.'
    )


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", None, 1.5])
def test_what_is_no_device_is_an_error(monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    pretend(monkeypatch, None)
    with pytest.raises(ConfigError) as error:
        resolve_device(device)
    assert str(error.value) == (
        '`device` should be "auto", "cpu" or the name of an accelerator such as "cuda:0", '
        f"found {device!r}."
    )


@pytest.mark.parametrize(("threads", "words"), [(1, "1 thread"), (6, "6 threads")])
def test_cpu_is_described_with_its_threads(
    monkeypatch: pytest.MonkeyPatch, threads: int, words: str
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert describe_device(torch.device("cpu")) == f"cpu ({platform.machine()}, {words})"


def test_cuda_is_described_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    assert describe_device(torch.device("cuda:1")) == "cuda:1 (Card 1)"


def test_other_accelerators_are_described_by_their_name() -> None:
    assert describe_device(torch.device("mps:0")) == "mps:0"


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cuda", True), ("cuda:1", True), ("xpu", True), ("mps", False), ("cpu", False)],
)
def test_which_devices_copy_while_they_compute(device: str, expected: bool) -> None:
    assert has_streams(torch.device(device)) is expected


def test_free_memory_is_asked_of_each_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def tell(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return 70, 100

    monkeypatch.setattr(torch.cuda, "mem_get_info", tell)
    monkeypatch.setattr(torch.xpu, "mem_get_info", tell)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 100)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 40)
    devices = [torch.device(name) for name in ("cuda:1", "xpu", "mps", "mtia", "cpu")]
    assert [free_device_memory(device) for device in devices] == [70, 70, 60, 0, 0]
    assert asked == devices[:2]


def test_memory_is_given_back_by_each_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: called.append("mps"))
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: called.append("any"))
    for name in ("cpu", "mps", "cuda:1", "xpu"):
        empty_cache(torch.device(name))
    assert called == ["mps", "any", "any"]


@pytest.mark.gpu
def test_free_memory_of_an_accelerator() -> None:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        pytest.skip("PyTorch finds no accelerator")
    assert free_device_memory(device) > 0
