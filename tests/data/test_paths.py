from __future__ import annotations

import multiprocessing
import os
import pickle
import tracemalloc
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transferkit.data import PathArray
from transferkit.errors import DataError

# What a file name may hold: any bytes but the separator and NUL.
names = st.binary(min_size=1, max_size=12).filter(
    lambda name: not set(name) & {0, 0x2F} and name not in (b".", b"..")
)
paths = st.lists(st.lists(names, min_size=1, max_size=3), max_size=12).map(
    lambda found: [Path(os.fsdecode(b"/".join(parts))) for parts in found]
)


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
@given(found=paths, seed=st.integers(0, 2**32 - 1))
def test_paths_come_back(found: list[Path], seed: int) -> None:
    array = PathArray.from_paths(found)
    assert list(array) == found
    assert array == found
    assert len(array) == len(found)
    assert [array[index - len(found)] for index in range(len(found))] == found
    assert list(array[1::2]) == found[1::2]
    assert list(array[::-1]) == found[::-1]
    places = np.random.default_rng(seed).integers(0, max(1, len(found)), 5 if found else 0)
    assert list(array.take(places)) == [found[place] for place in places]
    assert pickle.loads(pickle.dumps(array)) == found
    array.share_memory()
    assert array == found
    assert ForkingPickler.loads(ForkingPickler.dumps(array)) == found


def _list_in_child(sender: Any, array: PathArray) -> None:
    sender.send(list(array))


@pytest.mark.parametrize("shared", [False, True])
def test_paths_reach_a_process_that_is_not_forked(shared: bool) -> None:
    array = PathArray.from_paths([f"{number % 7}/{number}.jpg" for number in range(5000)])
    found = list(array)
    if shared:
        array.share_memory()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_list_in_child, args=(sender, array))
    child.start()
    try:
        assert receiver.poll(120)
        assert receiver.recv() == found
    finally:
        child.join()
    assert child.exitcode == 0


def test_many_are_taken_in_parts() -> None:
    found = [Path(f"{number % 3}/{'x' * (number % 11)}{number}.jpg") for number in range(50_000)]
    places = np.random.default_rng(0).permutation(len(found))
    taken = PathArray.from_paths(found).take(places)
    assert list(taken) == [found[place] for place in places]
    assert taken.take([-1, 0]) == [found[places[-1]], found[places[0]]]
    assert list(taken.take([])) == []


def test_taking_many_needs_no_many_times_their_memory() -> None:
    array = PathArray.from_paths(f"{number:030}.jpg" for number in range(200_000))
    everything = np.arange(len(array))
    tracemalloc.start()
    array.take(everything)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * array.num_bytes


@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
def test_places_of_any_kind_stay_as_they_are(kind: Any) -> None:
    place = kind(-1)
    assert PathArray.from_paths(["a", "b"])[place] == Path("b")
    assert place == -1


class BytesPath:
    """As `os.scandir` gives them for a folder in bytes."""

    def __fspath__(self) -> bytes:
        return b"a.jpg"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a/\ud800.jpg", "No file can have the path 'a/\\ud800.jpg'."),
        (BytesPath(), "A path should be a text, found b'a.jpg'."),
    ],
)
def test_what_is_no_path(path: Any, message: str) -> None:
    with pytest.raises(DataError) as error:
        PathArray.from_paths([path])
    assert str(error.value) == message


def test_memory_is_that_of_the_names() -> None:
    array = PathArray.from_paths(f"/data/pictures/ants/{number:08}.jpg" for number in range(1000))
    assert array.num_bytes == 1000 * (12 + 8 + 4)


def test_absolute_relative_and_root_paths() -> None:
    found = [Path("/a.jpg"), Path("b.jpg"), Path("c/d.jpg"), Path("../e.jpg")]
    assert PathArray.from_paths(found) == found


@pytest.mark.parametrize("index", [2, -3])
def test_path_that_is_not_there(index: int) -> None:
    with pytest.raises(IndexError) as error:
        PathArray.from_paths(["a", "b"])[index]
    assert str(error.value) == f"There are 2 paths, found the index {index}."


def test_other_things_are_not_equal() -> None:
    array = PathArray.from_paths(["a", "b"])
    assert array != [Path("a")]
    assert array != "ab"
    assert array != 3
    assert repr(array) == "PathArray(2 paths)"
