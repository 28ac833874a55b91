from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from transferkit._seeding import seeded
from transferkit.data import (
    Batch,
    ImageDataset,
    ImageLoader,
    ImageSplits,
    class_weights,
    loader,
)
from transferkit.data.cache import LocalCache, SharedCache
from transferkit.data.loader import resolve_num_workers
from transferkit.data.workers import start_threads
from transferkit.errors import ConfigError, DataError, ImageError, ProcessError
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


START_METHODS = multiprocessing.get_all_start_methods()
# Processes that are not forked import PyTorch anew, each of them for seconds.
WORKERS = [
    pytest.param(
        worker_type,
        num_workers,
        marks=pytest.mark.slow
        if worker_type == "forkserver" or (worker_type == "spawn" and num_workers != 1)
        else (),
    )
    for worker_type in ("thread", *START_METHODS)
    for num_workers in (1, 2, 4)
]


def opaque(image: Tensor) -> Tensor:
    """Crop at random places, drawn from the global generators."""
    top, left = int(torch.randint(16, ())), random.randrange(16)
    return image[:, top : top + 8, left : left + 8]


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


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes:UserWarning")
@pytest.mark.parametrize(("worker_type", "num_workers"), WORKERS)
@pytest.mark.parametrize("transform", [PREPROCESS.train(), PREPROCESS.train(opaque)])
def test_batches_do_not_depend_on_the_workers(
    dataset: ImageDataset, num_workers: int, worker_type: Any, transform: Any
) -> None:
    options = {"batch_size": 3, "shuffle": True, "seed": 5, "transform": transform}
    expected = read(dataset, 0, 1, **options)
    found = read(dataset, 0, 1, num_workers=num_workers, worker_type=worker_type, **options)
    assert_equal(found, expected)


@pytest.mark.parametrize(
    "worker_type", ["thread", "fork", pytest.param("spawn", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("options", [{"cache_bytes": 10**9}, {"cache_bytes": 9000}])
def test_batches_do_not_depend_on_the_cache(
    dataset: ImageDataset, worker_type: Any, options: dict[str, int]
) -> None:
    expected = read(dataset, 0, 1, 2, shuffle=True, batch_size=3)
    found = read(
        dataset,
        0,
        1,
        2,
        shuffle=True,
        batch_size=3,
        num_workers=2,
        worker_type=worker_type,
        **options,
    )
    assert_equal(found, expected)
    assert_equal(read(dataset, 0, 1, 2, shuffle=True, batch_size=3, **options), expected)


@pytest.mark.parametrize("worker_type", ["thread", "fork"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_pass_may_begin_anywhere(
    dataset: ImageDataset, worker_type: Any, num_workers: int
) -> None:
    options: dict[str, Any] = {"shuffle": True, "batch_size": 3, "seed": 1}
    expected = read(dataset, 4, **options)
    loader = ImageLoader(
        dataset, PREPROCESS.train(), num_workers=num_workers, worker_type=worker_type, **options
    )
    for start in (len(expected), 5, 2, 0):
        assert_equal(list(loader.batches(epoch=4, start=start)), expected[start:])
    loader.close()


def test_pictures_before_the_start_are_not_read(dataset: ImageDataset) -> None:
    for path in dataset.paths[:12]:
        path.unlink()
    loader = ImageLoader(dataset, PREPROCESS.eval(), batch_size=4)
    assert [each.indices.tolist() for each in loader.batches(start=3)] == [[12, 13, 14, 15]]


def test_training_transform_of_threads_and_of_none_leave_the_global_state_alone(
    dataset: ImageDataset,
) -> None:
    state = torch.get_rng_state()
    options = {"num_workers": 2, "worker_type": "thread", "shuffle": True}
    read(dataset, 0, **options)
    read(dataset, 0, transform=PREPROCESS.train(opaque), **options)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_workers", [1, 4])
def test_threads_leave_the_number_of_cores_alone(dataset: ImageDataset, num_workers: int) -> None:
    before = torch.get_num_threads()
    read(dataset, 0, num_workers=num_workers, worker_type="thread")
    assert torch.get_num_threads() == before


def cores_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_threads_of_a_thread_with_fewer_cores_leave_later_ones_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with start_threads(1) as pool:
            own = pool.submit(torch.get_num_threads).result()
            with pool.submit(start_threads, 2, cores_each=2).result() as inner:
                found = {inner.submit(torch.get_num_threads).result() for _ in range(8)}
            assert (own, found) == (1, {2})
            assert pool.submit(torch.get_num_threads).result() == 1
        assert cores_of_a_new_thread() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_thread_without_memory_does_not_keep_the_others_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    before = cores_of_a_new_thread()
    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(BrokenBarrierError):
        start_threads(2)
    assert cores_of_a_new_thread() == before


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
    loader = ImageLoader(dataset, PREPROCESS.eval(), num_workers=2, worker_type="process")
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
    loader = ImageLoader(
        dataset, PREPROCESS.eval(), batch_size=2, num_workers=2, worker_type="process"
    )
    batches = loader.batches()
    next(batches)
    loader.close()
    left = new_children(known_children)
    del batches
    assert left == 0


def test_auto_takes_a_worker_per_core_up_to_four(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, 1), (3, 3), (64, 4)):
        monkeypatch.setattr(loader, "num_cores", lambda cores=cores: cores)
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


def test_threads_that_cannot_start_leave_nothing_waiting(
    dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def fail_at_the_second(self: threading.Thread) -> None:
        if self.name.startswith("transferkit-loader"):
            started.append(self)
            if len(started) == 2:
                raise RuntimeError("can't start new thread")
        start(self)

    before = torch.get_num_threads()
    monkeypatch.setattr(threading.Thread, "start", fail_at_the_second)
    loader = ImageLoader(dataset, PREPROCESS.eval(), num_workers=2, worker_type="thread")
    with pytest.raises(RuntimeError, match=r"^can't start new thread$"):
        next(loader.batches())
    started[0].join(timeout=10)
    assert not started[0].is_alive()
    assert torch.get_num_threads() == before


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


def test_processes_serve_one_pass_at_a_time(dataset: ImageDataset) -> None:
    loader = ImageLoader(
        dataset, PREPROCESS.eval(), batch_size=2, num_workers=1, worker_type="fork"
    )
    second = loader.batches()
    first = loader.batches()
    next(first)
    message = (
        "A pass over this loader is not over yet, and its worker processes serve one at a time. "
        "Finish it, or make a loader for each."
    )
    for start in (loader.batches, lambda: next(second)):
        with pytest.raises(ConfigError) as error:
            start()
        assert str(error.value) == message
    del first
    assert len(list(loader.batches())) == len(loader)
    loader.close()


def test_threads_serve_several_passes_at_a_time(dataset: ImageDataset) -> None:
    options: dict[str, Any] = {"batch_size": 3, "shuffle": True}
    loader = ImageLoader(
        dataset, PREPROCESS.train(), num_workers=2, worker_type="thread", **options
    )
    pairs = list(zip(loader.batches(epoch=0), loader.batches(epoch=1), strict=True))
    loader.close()
    for epoch in (0, 1):
        assert_equal([pair[epoch] for pair in pairs], read(dataset, epoch, **options))


@pytest.mark.parametrize("worker_type", ["thread", "fork"])
def test_pass_whose_loader_was_closed_says_so(dataset: ImageDataset, worker_type: Any) -> None:
    loader = ImageLoader(
        dataset, PREPROCESS.eval(), batch_size=1, num_workers=2, worker_type=worker_type
    )
    batches = loader.batches()
    next(batches)
    loader.close()
    with pytest.raises(ConfigError) as error:
        list(batches)
    assert str(error.value) == "The loader was closed during this pass. Start a new one."
    assert len(list(loader.batches())) == 16
    loader.close()


def end_this_process(image: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return image


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no signals of this kind")
def test_a_worker_that_is_killed_is_an_error_that_says_so(dataset: ImageDataset) -> None:
    loader = ImageLoader(
        dataset, PREPROCESS.train(end_this_process), num_workers=1, worker_type="process"
    )
    with pytest.raises(ProcessError) as error:
        next(loader.batches())
    loader.close()
    assert str(error.value) == (
        "A worker process ended before its batch was read (signal 9). The system may have ended "
        'it for want of memory: use fewer workers (`num_workers`), or `worker_type="thread"`, '
        "whose workers share the memory."
    )


def leave_this_process(image: Tensor) -> Tensor:
    os._exit(3)


def test_a_worker_that_ends_by_itself_is_an_error_that_says_so(dataset: ImageDataset) -> None:
    loader = ImageLoader(
        dataset, PREPROCESS.train(leave_this_process), num_workers=1, worker_type="process"
    )
    with pytest.raises(ProcessError) as error:
        next(loader.batches())
    loader.close()
    assert str(error.value) == (
        "A worker process ended before its batch was read (exit code 3). What it printed says "
        "why. It has to import what the transform and the data set are made of; "
        '`worker_type="thread"` works in this process.'
    )


@pytest.mark.filterwarnings("ignore:Got pickle error when attempting:UserWarning")
def test_what_cannot_be_sent_to_processes_is_an_error(dataset: ImageDataset) -> None:
    loader = ImageLoader(dataset, lambda image: image, num_workers=1, worker_type="spawn")
    with pytest.raises(ConfigError) as error:
        next(loader.batches())
    loader.close()
    assert str(error.value) == (
        f"The transform and the data set cannot be sent to worker processes: "
        f"{error.value.__cause__}. Define them at the top level of a module, or use "
        f'`worker_type="thread"`.'
    )


def test_auto_takes_threads_where_the_transform_may_run_in_them(dataset: ImageDataset) -> None:
    assert ImageLoader(dataset, PREPROCESS.eval()).worker_type == "thread"
    assert ImageLoader(dataset, PREPROCESS.train("tutorial")).worker_type == "thread"
    assert ImageLoader(dataset, PREPROCESS.train(opaque)).worker_type == "process"


@pytest.mark.parametrize("value", ["threads", "", None, 2])
def test_type_of_workers_that_does_not_exist_is_an_error(dataset: ImageDataset, value: Any) -> None:
    methods = ", ".join(map(repr, multiprocessing.get_all_start_methods()))
    with pytest.raises(ConfigError) as error:
        ImageLoader(dataset, PREPROCESS.eval(), worker_type=value)
    assert str(error.value) == (
        f"`worker_type` should be one of 'auto', 'thread', 'process', {methods} on this system, "
        f"found {value!r}."
    )


def test_epoch_and_start_are_checked_at_once(dataset: ImageDataset) -> None:
    loader = ImageLoader(dataset, PREPROCESS.eval(), batch_size=4)
    with pytest.raises(ConfigError) as error:
        loader.batches(epoch=-1)
    assert str(error.value) == "`epoch` should be an integer of at least 0, found -1."
    with pytest.raises(ConfigError) as error:
        loader.batches(start=-1)
    assert str(error.value) == "`start` should be an integer of at least 0, found -1."
    with pytest.raises(ConfigError) as error:
        loader.batches(start=5)
    assert str(error.value) == "`start` should be at most 4, the number of batches, found 5."


def test_data_set_of_another_kind_is_an_error() -> None:
    with pytest.raises(ConfigError) as error:
        ImageLoader(["ant.jpg"], PREPROCESS.eval())  # type: ignore[arg-type]
    assert str(error.value) == "`dataset` should be an ImageDataset, found list."


# What the transform returns


@pytest.mark.parametrize("num_workers", [0, 2])
def test_transform_that_returns_no_tensor_is_an_error(
    dataset: ImageDataset, num_workers: int
) -> None:
    with pytest.raises(ConfigError) as error:
        read(dataset, 0, transform=np.asarray, num_workers=num_workers)
    assert str(error.value) == "The transform should return a tensor (C, h, w), found ndarray."


def test_transform_that_returns_several_shapes_is_an_error(dataset: ImageDataset) -> None:
    sizes = iter([8, 9] * 20)

    def uneven(image: Tensor) -> Tensor:
        return image[:, : next(sizes), :8]

    with pytest.raises(ConfigError) as error:
        read(dataset, 0, transform=uneven)
    assert str(error.value) == (
        "The transform should return images of one shape and dtype, found uint8 (3, 8, 8) and "
        "uint8 (3, 9, 8)."
    )


# Pictures that cannot be read


@pytest.fixture
def damaged(dataset: ImageDataset) -> ImageDataset:
    """16 pictures, of which numbers 1, 9 and 10 are damaged."""
    for index in (1, 9, 10):
        dataset.paths[index].write_bytes(b"no picture")
    return dataset


@pytest.mark.parametrize(
    "options", [{}, *({"num_workers": 2, "worker_type": each} for each in ("thread", "fork"))]
)
def test_skipping_leaves_pictures_out_and_lists_them(
    damaged: ImageDataset, options: dict[str, Any]
) -> None:
    loader = ImageLoader(
        damaged, PREPROCESS.eval(), batch_size=3, on_error="skip", max_skipped=0.5, **options
    )
    assert list(loader.skipped) == []
    for _ in range(2):
        batches = list(loader.batches())
        indices = [batch.indices.tolist() for batch in batches]
        assert indices == [[0, 2], [3, 4, 5], [6, 7, 8], [11], [12, 13, 14], [15]]
    for batch in batches:
        assert batch.images.shape == (len(batch.indices), 3, 8, 8)
        assert batch.targets.tolist() == damaged.targets[batch.indices.numpy()].tolist()
        for row, index in enumerate(batch.indices.tolist()):
            assert torch.equal(batch.images[row], PREPROCESS.eval()(damaged[index][0]))
    loader.close()
    assert [each.path for each in loader.skipped] == [damaged.paths[each] for each in (1, 9, 10)]
    assert loader.skipped[0].reason == (
        f"Cannot read the picture `{damaged.paths[1]}`: it is not a JPEG, PNG, WEBP, BMP, GIF or "
        f"TIFF file, whatever its name says."
    )


def test_a_batch_of_damaged_pictures_alone_is_left_out(damaged: ImageDataset) -> None:
    found = read(
        damaged, 0, transform=PREPROCESS.eval(), batch_size=1, on_error="skip", max_skipped=0.2
    )
    assert [each.indices.item() for each in found] == [0, *range(2, 9), *range(11, 16)]


def test_too_many_skipped_pictures_are_an_error(damaged: ImageDataset) -> None:
    options: dict[str, Any] = {"transform": PREPROCESS.eval(), "on_error": "skip"}
    with pytest.raises(DataError) as error:
        read(damaged, 0, max_skipped=0.15, **options)
    assert str(error.value) == (
        f"3 of 16 pictures cannot be read, more than the share of 0.15 that `max_skipped` allows. "
        f"The first: Cannot read the picture `{damaged.paths[1]}`: it is not a JPEG, PNG, WEBP, "
        f"BMP, GIF or TIFF file, whatever its name says."
    )
    assert len(read(damaged, 0, max_skipped=3 / 16, **options)) == 1


def test_other_errors_are_never_skipped(dataset: ImageDataset) -> None:
    with pytest.raises(ConfigError, match=r"^An augmentation should return "):
        read(
            dataset,
            0,
            transform=PREPROCESS.train(lambda image: image),
            on_error="skip",
            max_skipped=1.0,
        )


@pytest.mark.parametrize("value", ["ignore", None, True])
def test_answer_to_errors_that_does_not_exist_is_an_error(
    dataset: ImageDataset, value: Any
) -> None:
    with pytest.raises(ConfigError) as error:
        ImageLoader(dataset, PREPROCESS.eval(), on_error=value)
    assert str(error.value) == f'`on_error` should be "raise" or "skip", found {value!r}.'


@pytest.mark.parametrize("value", [-0.1, 1.5, "all", None])
def test_share_that_cannot_be_is_an_error(dataset: ImageDataset, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        ImageLoader(dataset, PREPROCESS.eval(), max_skipped=value)
    assert str(error.value) == (
        f"`max_skipped` should be a finite number in [0, 1], found {value!r}."
    )


# Balance


def test_balanced_pass_shows_each_class_equally_often(tmp_path: Path) -> None:
    names = [f"{index}.png" for index in range(12)]
    dataset = ImageDataset(names, [0] * 9 + [2] * 3, class_names=["a", "b", "c"])
    loader = ImageLoader(
        dataset, PREPROCESS.train(), batch_size=5, shuffle=True, balanced=True, seed=2
    )
    indices, repeats = loader._sampler.order(7)
    assert np.bincount(dataset.targets[indices], minlength=3).tolist() == [6, 0, 6]
    assert len(set(indices[dataset.targets[indices] == 0])) == 6
    assert sorted(indices[dataset.targets[indices] == 2]) == [9, 9, 10, 10, 11, 11]
    for picture in (9, 10, 11):
        assert sorted(repeats[indices == picture]) == [0, 1]


def test_picture_that_comes_again_is_augmented_anew(tiny_splits: ImageSplits) -> None:
    dataset = tiny_splits.train.subset([0, 1, 2, 3, 4, 5, 6, 8])
    batches = read(dataset, 0, shuffle=True, balanced=True)
    again = read(dataset, 0, shuffle=True, balanced=True, num_workers=2, worker_type="thread")
    assert_equal(batches, again)
    rare = batches[0].images[batches[0].indices == 7]
    assert len(rare) == 4
    assert not any(torch.equal(rare[0], other) for other in rare[1:])


def test_no_pictures_give_no_batches(dataset: ImageDataset) -> None:
    nothing = dataset.subset([])
    for options in ({}, {"balanced": True}, {"num_workers": 2, "worker_type": "thread"}):
        assert read(nothing, 0, shuffle=True, **options) == []


def test_balance_needs_an_order_to_draw(dataset: ImageDataset) -> None:
    with pytest.raises(ConfigError) as error:
        ImageLoader(dataset, PREPROCESS.eval(), balanced=True)
    assert str(error.value) == ("`balanced=True` draws the pictures, so it needs `shuffle=True`.")


def test_class_weights_are_inverse_to_the_counts() -> None:
    targets = [0] * 5 + [1] * 2 + [2] * 13
    dataset = ImageDataset(["x"] * 20, targets, class_names=["a", "b", "c"])
    weights = class_weights(dataset).numpy()
    # What they are for: each class has the same weight in all, and the mean weight is 1.
    np.testing.assert_allclose(weights * np.bincount(targets), 20 / 3, rtol=1e-6)
    assert weights[targets].mean() == pytest.approx(1.0)


def test_class_weights_need_every_class() -> None:
    dataset = ImageDataset(["x"], [1], class_names=["ants", "bees", "wasps"])
    with pytest.raises(DataError) as error:
        class_weights(dataset)
    assert str(error.value) == (
        "Class weights need at least one picture of each class, found none of 'ants', 'wasps'."
    )


# The cache


def test_kept_pictures_are_not_read_again(dataset: ImageDataset) -> None:
    expected = read(dataset, 0, 1)
    loader = ImageLoader(dataset, PREPROCESS.train(), cache_bytes=10**9)
    found = list(loader.batches(epoch=0))
    for path in dataset.paths:
        path.unlink()
    found += list(loader.batches(epoch=1))
    assert_equal(found, expected)
    loader.close()
    with pytest.raises(ImageError):
        next(loader.batches())


def test_processes_share_what_they_keep(dataset: ImageDataset) -> None:
    loader = ImageLoader(
        dataset,
        PREPROCESS.eval(),
        batch_size=1,
        num_workers=2,
        worker_type="fork",
        cache_bytes=10**8,
    )
    expected = list(loader.batches())
    for path in dataset.paths:
        path.unlink()
    # Every picture was kept by one worker, and may be asked of the other.
    shifted = [batch for epoch in range(3) for batch in loader.batches(epoch=epoch, start=1)]
    loader.close()
    assert_equal(shifted, expected[1:] * 3)


@pytest.mark.parametrize("shared", [False, True])
def test_cache_keeps_to_its_budget_and_gives_copies(shared: bool) -> None:
    pixels = torch.arange(60, dtype=torch.uint8).view(3, 4, 5)
    context = multiprocessing.get_context()
    cache = SharedCache(3, 130, context) if shared else LocalCache(130)
    for index in range(3):
        cache.put(index, pixels + index)
        cache.put(index, pixels)
    assert cache.num_bytes == 120
    first = cache.get(0)
    assert first is not None
    first.fill_(0)
    assert torch.equal(cache.get(0), pixels)  # type: ignore[arg-type]
    assert torch.equal(cache.get(1), pixels + 1)  # type: ignore[arg-type]
    assert cache.get(2) is None
    cache.close()


def test_shared_cache_takes_no_more_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transferkit.data.cache._free_shared_memory", lambda: 100)
    cache = SharedCache(2, 10**15, multiprocessing.get_context())
    assert cache.budget == 100
    cache.put(0, torch.zeros(3, 4, 5, dtype=torch.uint8))
    cache.put(1, torch.zeros(3, 4, 5, dtype=torch.uint8))
    assert cache.get(0) is not None
    assert cache.get(1) is None
    cache.close()
    with pytest.raises(ConfigError) as error:
        cache.get(0)
    assert str(error.value) == "The loader was closed during this pass. Start a new one."
