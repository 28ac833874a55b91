from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from transferkit.data import Batch, ImageLoader, ImageSplits
from transferkit.images import Preprocess
from transferkit.training import resident
from transferkit.training.resident import KeptBatches, ResidentTensors, room_on

CPU = torch.device("cpu")
PREPROCESS = Preprocess(crop_size=8, resize_size=8)
PICTURE = 3 * 8 * 8
"""Bytes of a picture's pixels."""


def loader_of(splits: ImageSplits, **options: object) -> ImageLoader:
    transform = PREPROCESS.eval(normalize=False)
    return ImageLoader(splits.val, transform, batch_size=3, **options)  # type: ignore[arg-type]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The places of the pictures that are read, as they are read."""
    found: list[int] = []
    plain = ImageLoader.numbered_batches

    def note(self: ImageLoader, **options: int) -> Iterator[tuple[int, Batch]]:
        for number, batch in plain(self, **options):
            found.extend(batch.indices.tolist())
            yield number, batch

    monkeypatch.setattr(ImageLoader, "numbered_batches", note)
    return found


def assert_same(found: list[tuple[int, Batch]], expected: list[tuple[int, Batch]]) -> None:
    assert [number for number, _ in found] == [number for number, _ in expected]
    for (_, one), (_, other) in zip(found, expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("num_fitting", "num_read"),
    [(8, 8), (7, 10), (6, 10), (5, 13), (3, 13), (2, 16), (0, 16)],
)
def test_later_passes_load_what_did_not_fit(
    tiny_splits: ImageSplits, reads: list[int], num_fitting: int, num_read: int
) -> None:
    expected = list(loader_of(tiny_splits).numbered_batches())
    reads.clear()
    kept = KeptBatches(loader_of(tiny_splits), CPU, budget=num_fitting * PICTURE)
    for _ in range(2):
        assert_same(list(kept.batches()), expected)
    assert len(reads) == num_read
    assert kept.num_bytes <= num_fitting * PICTURE


def test_a_pass_that_was_cut_off_is_gone_on_with(
    tiny_splits: ImageSplits, reads: list[int]
) -> None:
    expected = list(loader_of(tiny_splits).numbered_batches())
    reads.clear()
    kept = KeptBatches(loader_of(tiny_splits), CPU, budget=2**20)
    first, second = kept.batches(), kept.batches()
    assert [next(first)[0], next(second)[0], next(second)[0]] == [0, 0, 1]
    assert_same(list(first), expected[1:])
    assert_same(list(second), expected[2:])
    reads.clear()
    assert_same(list(kept.batches()), expected)
    assert reads == []
    assert kept.num_bytes == 8 * PICTURE


def test_closing_forgets(tiny_splits: ImageSplits, reads: list[int]) -> None:
    kept = KeptBatches(loader_of(tiny_splits), CPU, budget=2**20)
    list(kept.batches())
    kept.close()
    assert kept.num_bytes == 0
    list(kept.batches())
    assert reads == [*range(8), *range(8)]


def test_pictures_that_were_skipped_stay_skipped(tiny_splits: ImageSplits) -> None:
    for place in (0, 1, 2, 4):
        tiny_splits.val.paths[place].write_bytes(b"no picture")
    loader = loader_of(tiny_splits, on_error="skip", max_skipped=0.5)
    kept = KeptBatches(loader, CPU, budget=2**20)
    for _ in range(3):
        numbers, places = zip(
            *((number, batch.indices.tolist()) for number, batch in kept.batches()), strict=True
        )
        assert numbers == (1, 2)
        assert places == ([3, 5], [6, 7])
        assert len(loader.skipped) == 4


def test_a_criterion_that_changes_targets_does_not_reach_the_next_pass(
    tiny_splits: ImageSplits,
) -> None:
    kept = KeptBatches(loader_of(tiny_splits), CPU, budget=2**20)
    for _ in range(2):
        for _, batch in kept.batches():
            assert int(batch.targets.min()) >= 0
            batch.targets.fill_(-1)


@pytest.mark.parametrize("worker_type", ["thread", "fork"])
def test_workers_give_the_same_and_end_when_all_is_kept(
    tiny_splits: ImageSplits, worker_type: str
) -> None:
    expected = list(loader_of(tiny_splits).numbered_batches())
    loader = loader_of(tiny_splits, num_workers=1, worker_type=worker_type)
    kept = KeptBatches(loader, CPU, budget=2**20)
    for _ in range(2):
        found = list(kept.batches())
        assert_same(found, expected)
        assert loader._workers is None
    # Memory of worker processes would take up an open file for each tensor.
    assert not any(each.is_shared() for _, batch in found for each in batch)  # type: ignore[no-untyped-call]


# On an accelerator


def test_a_share_of_free_memory_may_be_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "free_device_memory", lambda device: 1000)
    assert room_on(torch.device("cuda")) == 250
    assert room_on(CPU) == 0


def test_room_on_a_device_is_asked_for_once(
    tiny_splits: ImageSplits, monkeypatch: pytest.MonkeyPatch, reads: list[int]
) -> None:
    asked: list[torch.device] = []

    def room(device: torch.device) -> int:
        asked.append(device)
        return 6 * PICTURE

    monkeypatch.setattr(resident, "room_on", room)
    meta = torch.device("meta")  # In the place of an accelerator: it has no pixels, but shapes.
    kept = KeptBatches(loader_of(tiny_splits), meta, budget=1)
    for _ in range(2):
        assert [batch.images.device for _, batch in kept.batches()] == [meta] * 3
    assert asked == [meta]
    assert reads == [*range(8), 6, 7]


def test_who_wants_nothing_kept_has_nothing_on_a_device_either(
    tiny_splits: ImageSplits, monkeypatch: pytest.MonkeyPatch, reads: list[int]
) -> None:
    monkeypatch.setattr(resident, "room_on", lambda device: 2**20)
    kept = KeptBatches(loader_of(tiny_splits), torch.device("meta"), budget=0)
    for _ in range(2):
        assert len(list(kept.batches())) == 3
    assert reads == [*range(8), *range(8)]


def test_tensors_are_copied_once_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = iter([40, 39])
    monkeypatch.setattr(resident, "room_on", lambda device: next(rooms))
    tensors = ResidentTensors(torch.device("meta"))
    values = torch.zeros(10)
    first = tensors.get("small", values)
    assert first.device.type == "meta"
    assert tensors.get("small", values) is first
    assert tensors.get("large", values) is values
    assert tensors.get("large", values) is values
    tensors.clear()
    rooms = iter([40])
    assert tensors.get("large", values).device.type == "meta"
    assert ResidentTensors(CPU).get("small", values) is values


@pytest.mark.gpu
def test_batches_stay_on_an_accelerator(tiny_splits: ImageSplits, reads: list[int]) -> None:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        pytest.skip("PyTorch finds no accelerator")
    expected = list(loader_of(tiny_splits).numbered_batches())
    reads.clear()
    kept = KeptBatches(loader_of(tiny_splits, pin_memory=True), device, budget=1)
    for _ in range(2):
        found = [
            (number, Batch(*(each.cpu() for each in batch))) for number, batch in kept.batches()
        ]
        assert_same(found, expected)
    assert reads == list(range(8))
