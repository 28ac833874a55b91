from __future__ import annotations

import os
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transferkit.data import PathArray

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
