from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from transferkit.data import Batch
from transferkit.data.prefetch import NUM_AHEAD, Numbered, normalized, prefetch, to_images, upload
from transferkit.images import Preprocess

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
PREPROCESS = Preprocess(crop_size=4, resize_size=4)


def batch_of(number: int) -> Batch:
    images = torch.full((2, 3, 4, 4), number, dtype=torch.uint8)
    return Batch(images, torch.tensor([number, 0]), torch.tensor([2 * number, 2 * number + 1]))


class Pretended:
    """In the place of an accelerator: notes what is asked of it, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        monkeypatch.setattr(torch, "Stream", lambda device: Stream(self.events, "side"))
        monkeypatch.setattr(
            torch.accelerator, "current_stream", lambda device: Stream(self.events, "main")
        )

    def source(self, count: int, failure: Exception | None = None) -> Iterator[Any]:
        """Yield batches with numbers, and then fail."""
        try:
            for number in range(count):
                self.events.append(f"load {number}")
                images, targets = (Tensor(self.events, f"{name}{number}") for name in "xy")
                yield number, Batch(images, targets, torch.tensor([number]))  # type: ignore[arg-type]
            if failure is not None:
                raise failure
        finally:
            self.events.append("closed")


class Stream:
    def __init__(self, events: list[str], name: str) -> None:
        self.events, self.name = events, name

    def __enter__(self) -> None:
        self.events.append(f"enter {self.name}")

    def __exit__(self, *_: object) -> None:
        self.events.append(f"exit {self.name}")

    def record_event(self) -> str:
        self.events.append(f"record on {self.name}")
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.events.append(f"{self.name} waits for {event}")


class Tensor:
    def __init__(self, events: list[str], name: str, device: torch.device = CPU) -> None:
        self.events, self.name, self.device = events, name, device
        self.pinned = False

    def is_pinned(self) -> bool:
        return self.pinned

    def pin_memory(self) -> Tensor:
        self.events.append(f"pin {self.name}")
        self.pinned = True
        return self

    def to(self, device: torch.device, *, non_blocking: bool) -> Tensor:
        assert non_blocking
        assert self.pinned
        self.events.append(f"copy {self.name}")
        return Tensor(self.events, self.name, device)

    def record_stream(self, stream: Stream) -> None:
        assert self.device == CUDA
        self.events.append(f"{stream.name} uses {self.name}")


# Without streams


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_without_streams_batches_are_moved_one_by_one(device: str) -> None:
    loaded: list[int] = []

    def source() -> Iterator[Numbered]:
        for number in (0, 2, 3):
            loaded.append(number)
            yield number, batch_of(number)

    batches = prefetch(source(), torch.device(device))
    number, batch = next(batches)
    assert loaded == [0]
    assert (number, batch.images.device.type, batch.targets.device.type) == (0, device, device)
    assert batch.indices.tolist() == [0, 1]
    assert [number for number, _ in batches] == [2, 3]


def test_on_the_cpu_nothing_is_copied() -> None:
    batch = batch_of(1)
    ((_, found),) = prefetch([(0, batch)], CPU)
    assert found.images.data_ptr() == batch.images.data_ptr()


# On a device with streams, as far as one that is pretended can tell


def test_the_next_batch_is_copied_before_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Pretended(monkeypatch)
    batches = prefetch(device.source(3), CUDA)
    assert device.events == []
    number, batch = next(batches)
    copies = [
        [f"load {each}", "enter side", f"pin x{each}", f"copy x{each}", f"pin y{each}",
         f"copy y{each}", "exit side", "record on side"]
        for each in range(3)
    ]  # fmt: skip
    uses = [
        ["main waits for event of side", f"main uses x{each}", f"main uses y{each}"]
        for each in range(3)
    ]
    assert NUM_AHEAD == 1
    assert device.events == [*copies[0], *copies[1], *uses[0]]
    assert (number, batch.images.device, batch.indices.device) == (0, CUDA, CPU)
    assert [number for number, _ in batches] == [1, 2]
    expected = [*copies[0], *copies[1], *uses[0], *copies[2], *uses[1], "closed", *uses[2]]
    assert sorted(device.events) == sorted(expected)
    assert device.events[: len(expected) - 4] == expected[: len(expected) - 4]


def test_what_is_pinned_already_is_not_pinned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Pretended(monkeypatch)
    tensor = Tensor(device.events, "x")
    tensor.pinned = True
    assert upload(tensor, CUDA).device == CUDA  # type: ignore[arg-type]
    assert device.events == ["copy x"]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_an_error_comes_behind_the_batches_before_it(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    device, failure = Pretended(monkeypatch), ValueError("no picture")
    found: list[int] = []
    with pytest.raises(ValueError, match=r"^no picture$") as error:
        found.extend(number for number, _ in prefetch(device.source(count, failure), CUDA))
    assert error.value is failure
    seen = [event for event in device.events if event.startswith("main waits")]
    assert len(seen) == count
    assert device.events.count("closed") == 1


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_closing_early_closes_the_source(monkeypatch: pytest.MonkeyPatch, device_type: str) -> None:
    pretended = Pretended(monkeypatch)
    closed: list[bool] = []

    def source() -> Iterator[Numbered]:
        try:
            for number in range(9):
                yield number, batch_of(number)
        finally:
            closed.append(True)

    batches: Any
    if device_type == "cpu":
        batches = to_images(prefetch(source(), CPU), PREPROCESS)
    else:
        batches = prefetch(pretended.source(9), CUDA)
    next(batches)
    batches.close()
    assert closed == [True] if device_type == "cpu" else pretended.events[-1] == "closed"
    assert pretended.events.count("load 2") == 0


# Images of pixels


def test_pixels_become_images_and_images_stay() -> None:
    pixels = batch_of(7)
    images = normalized(pixels, PREPROCESS)
    assert torch.equal(images.images, PREPROCESS.normalize(pixels.images))
    assert images.targets is pixels.targets
    assert normalized(images, PREPROCESS) is images
    assert [number for number, _ in to_images([(3, pixels), (5, images)], PREPROCESS)] == [3, 5]


@pytest.mark.gpu
def test_batches_arrive_on_an_accelerator() -> None:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        pytest.skip("PyTorch finds no accelerator")
    sums = []
    for number, batch in prefetch(((number, batch_of(number)) for number in range(50)), device):
        assert batch.images.device.type == device.type
        sums.append((number, batch.images.float().mean()))
    assert [(number, each.item()) for number, each in sums] == [(n, float(n)) for n in range(50)]
