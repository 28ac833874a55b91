from __future__ import annotations

import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from transferkit._seeding import seeded
from transferkit.data import Batch, ImageDataset, ImageLoader, ImageSplits, loader
from transferkit.data.loader import resolve_num_workers
from transferkit.errors import ConfigError, ImageError
from transferkit.images import Preprocess

PREPROCESS = Preprocess(crop_size=8, resize_size=8)


@pytest.fixture
def dataset(tiny_splits: ImageSplits) -> ImageDataset:
    """16 pictures."""
    return tiny_splits.train


def read(dataset: ImageDataset, *epochs: int, **options: Any) -> list[Batch]:
    """Load whole passes with one loader and close it."""
    transform = options.pop("transform", None) or PREPROCESS.train()
    with_loader = ImageLoader(dataset, transform, **options)
    try:
        return [batch for epoch in epochs for batch in with_loader.batches(epoch=epoch)]
    finally:
        with_loader.close()


def assert_equal(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def noisy(image: Tensor) -> Tensor:
    """Draw from every global generator."""
    values = [random.random(), np.random.rand(), float(torch.rand(()))]
    return torch.tensor(values, dtype=torch.float64) + image.double().mean()


# What a pass gives


def test_a_pass_in_order_agrees_with_a_plain_loop(dataset: ImageDataset) -> None:
    transform = PREPROCESS.eval()
    batches = read(dataset, 0, transform=transform, batch_size=5)
    assert [len(batch.images) for batch in batches] == [5, 5, 5, 1]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(16))
    expected = torch.stack([transform(dataset[index][0]) for index in range(16)])
    assert torch.equal(torch.cat([batch.images for batch in batches]), expected)
    targets = torch.cat([batch.targets for batch in batches])
    assert targets.tolist() == dataset.targets.tolist()
    assert targets.dtype == torch.int64
    assert batches[0].indices.dtype == torch.int64


@pytest.mark.parametrize(("batch_size", "expected"), [(1, 16), (5, 4), (8, 2), (16, 1), (99, 1)])
def test_length_is_the_number_of_batches(
    dataset: ImageDataset, batch_size: int, expected: int
) -> None:
    loader = ImageLoader(dataset, PREPROCESS.eval(), batch_size=batch_size)
    assert len(loader) == len(list(loader.batches())) == expected


def test_shuffled_pass_has_every_picture_once_with_its_target(dataset: ImageDataset) -> None:
    batches = read(dataset, 0, batch_size=5, shuffle=True)
    indices = torch.cat([batch.indices for batch in batches])
    targets = torch.cat([batch.targets for batch in batches])
    assert indices.tolist() != list(range(16))
    assert sorted(indices.tolist()) == list(range(16))
    assert targets.tolist() == dataset.targets[indices.numpy()].tolist()


def test_own_transform_of_the_data_set_is_not_applied(dataset: ImageDataset) -> None:
    changed = dataset.with_transform(lambda image: image * 0)
    assert_equal(
        read(changed, 0, transform=PREPROCESS.eval()), read(dataset, 0, transform=PREPROCESS.eval())
    )


def test_batch_moves_but_for_its_indices() -> None:
    batch = Batch(torch.rand(2, 3, 4, 4), torch.tensor([0, 1]), torch.tensor([7, 8]))
    moved = batch.to(torch.device("meta"), memory_format=torch.channels_last)
    assert moved.images.device.type == moved.targets.device.type == "meta"
    assert moved.images.is_contiguous(memory_format=torch.channels_last)
    assert moved.indices is batch.indices
    assert torch.equal(batch.to(torch.device("cpu")).images, batch.images)


# Purity in (seed, epoch, index)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_do_not_depend_on_the_workers(
    dataset: ImageDataset, num_workers: int, shuffle: bool
) -> None:
    options = {"batch_size": 3, "shuffle": shuffle, "seed": 5}
    expected = read(dataset, 0, 1, **options)
    assert_equal(read(dataset, 0, 1, num_workers=num_workers, **options), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_global_generators_are_seeded_by_seed_epoch_and_index(
    dataset: ImageDataset, num_workers: int
) -> None:
    batches = read(dataset, 3, transform=noisy, seed=9, shuffle=True, num_workers=num_workers)
    for batch in batches:
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            with seeded(9, 3, index):
                assert torch.equal(image, noisy(dataset[index][0]))


def test_a_pass_does_not_depend_on_earlier_passes(dataset: ImageDataset) -> None:
    options = {"batch_size": 4, "shuffle": True}
    assert_equal(read(dataset, 0, 1, 2, **options)[8:], read(dataset, 2, **options))


def test_augmentation_does_not_depend_on_order_and_batches(dataset: ImageDataset) -> None:
    expected = torch.cat([batch.images for batch in read(dataset, 1)])
    for batch in read(dataset, 1, shuffle=True, batch_size=3):
        assert torch.equal(batch.images, expected[batch.indices])


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (1, 0)])
def test_another_seed_or_epoch_gives_another_order_and_augmentation(
    dataset: ImageDataset, seed: int, epoch: int
) -> None:
    first, second = (
        read(dataset, 0, shuffle=True)[0],
        read(dataset, epoch, shuffle=True, seed=seed)[0],
    )
    assert first.indices.tolist() != second.indices.tolist()
    by_index = first.images[first.indices.argsort()], second.images[second.indices.argsort()]
    assert not any(torch.equal(*pair) for pair in zip(*by_index, strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_callers_random_state_is_untouched(dataset: ImageDataset, num_workers: int) -> None:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    read(dataset, 0, 1, transform=noisy, shuffle=True, num_workers=num_workers)
    assert random.getstate() == states[0]
    assert str(np.random.get_state()) == str(states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_pass_that_was_left_does_not_show_in_the_next(
    dataset: ImageDataset, num_workers: int
) -> None:
    loader = ImageLoader(dataset, PREPROCESS.train(), batch_size=2, num_workers=num_workers)
    next(loader.batches(epoch=0))
    found = list(loader.batches(epoch=1))
    loader.close()
    assert_equal(found, read(dataset, 1, batch_size=2))


# Errors in pictures


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_picture_gives_the_plain_sentence_and_no_traceback(
    dataset: ImageDataset, num_workers: int
) -> None:
    path = dataset.paths[9]
    path.write_text("text")
    loader = ImageLoader(dataset, PREPROCESS.eval(), batch_size=4, num_workers=num_workers)
    batches = loader.batches()
    assert [next(batches).indices.tolist() for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ImageError) as error:
        next(batches)
    loader.close()
    assert str(error.value) == (
        f"Cannot read the picture `{path}`: it is not a JPEG, PNG, WEBP, BMP, GIF or TIFF file, "
        f"whatever its name says."
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_pass_after_an_error_is_whole(dataset: ImageDataset, num_workers: int) -> None:
    path = dataset.paths[1]
    content = path.read_bytes()
    path.write_bytes(b"")
    loader = ImageLoader(dataset, PREPROCESS.eval(), batch_size=4, num_workers=num_workers)
    with pytest.raises(ImageError):
        list(loader.batches())
    path.write_bytes(content)
    found = list(loader.batches(epoch=1))
    loader.close()
    assert_equal(found, read(dataset, 1, batch_size=4, transform=PREPROCESS.eval()))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_other_errors_of_ours_pass_as_they_are(dataset: ImageDataset, num_workers: int) -> None:
    transform = PREPROCESS.train(lambda image: image)
    with pytest.raises(ConfigError) as error:
        read(dataset, 0, transform=transform, num_workers=num_workers)
    assert str(error.value) == (
        "An augmentation should return uint8 (3, 8, 8), found uint8 (3, 32, 40). "
        "Normalisation is done after it."
    )


# Workers


@pytest.fixture
def known_children() -> set[int | None]:
    return {child.pid for child in multiprocessing.active_children()}


def new_children(known: set[int | None]) -> int:
    return len({child.pid for child in multiprocessing.active_children()} - known)


def test_workers_stay_between_passes_and_end_with_close(
    dataset: ImageDataset, known_children: set[int | None]
) -> None:
    loader = ImageLoader(dataset, PREPROCESS.eval(), num_workers=2)
    assert new_children(known_children) == 0
    list(loader.batches())
    assert new_children(known_children) == 2
    list(loader.batches(epoch=1))
    assert new_children(known_children) == 2
    loader.close()
    assert new_children(known_children) == 0
    loader.close()
    assert len(list(loader.batches(epoch=2))) == len(loader)
    loader.close()
    assert new_children(known_children) == 0


def test_close_ends_the_workers_of_a_pass_that_is_not_over(
    dataset: ImageDataset, known_children: set[int | None]
) -> None:
    loader = ImageLoader(dataset, PREPROCESS.eval(), batch_size=2, num_workers=2)
    batches = loader.batches()
    next(batches)
    loader.close()
    left = new_children(known_children)
    del batches
    assert left == 0


def test_auto_takes_a_worker_per_core_up_to_four(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, 1), (3, 3), (64, 4)):
        monkeypatch.setattr(loader, "_num_cores", lambda cores=cores: cores)
        assert resolve_num_workers("auto", num_images=1000) == expected
        assert resolve_num_workers("auto", num_images=16) == 0


def test_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 7}, raising=False)
    assert resolve_num_workers("auto", num_images=1000) == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert resolve_num_workers("auto", num_images=1000) == 2
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert resolve_num_workers("auto", num_images=1000) == 1


# Arguments


@pytest.mark.parametrize("value", [-1, 1.0, True, "two", None])
def test_number_of_workers_that_cannot_work_is_an_error(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_num_workers(value, num_images=1)
    assert str(error.value) == (
        f'`num_workers` should be "auto" or an integer of at least 0, found {value!r}.'
    )


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "4", None])
def test_batch_size_that_cannot_work_is_an_error(dataset: ImageDataset, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        ImageLoader(dataset, PREPROCESS.eval(), batch_size=value)
    assert str(error.value) == f"`batch_size` should be an integer of at least 1, found {value!r}."


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("num_workers", -1), ("seed", -1)])
def test_loader_checks_its_arguments_at_once(dataset: ImageDataset, name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"^`{name}` should be "):
        ImageLoader(dataset, PREPROCESS.eval(), **{name: value})  # type: ignore[arg-type]


def test_workers_serve_one_pass_at_a_time(dataset: ImageDataset) -> None:
    loader = ImageLoader(dataset, PREPROCESS.eval(), batch_size=2, num_workers=1)
    first = loader.batches()
    next(first)
    message = (
        "A pass over this loader is not over yet, and its workers serve one at a time. "
        "Finish it, or make a loader for each."
    )
    with pytest.raises(ConfigError) as error:
        next(loader.batches())
    assert str(error.value) == message
    del first
    assert len(list(loader.batches())) == len(loader)
    loader.close()


def test_negative_epoch_is_an_error(dataset: ImageDataset) -> None:
    loader = ImageLoader(dataset, PREPROCESS.eval(), shuffle=True)
    with pytest.raises(ConfigError):
        next(loader.batches(epoch=-1))
