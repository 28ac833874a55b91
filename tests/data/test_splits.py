from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transferkit.data import ImageDataset, k_folds, split_dataset
from transferkit.errors import ConfigError, DataError

SHARE = "should be a finite number in %s0, 1), the share to split off"


def make(sizes: list[int], names: list[str] | None = None) -> ImageDataset:
    targets = np.repeat(np.arange(len(sizes)), sizes)
    names = names or [f"class {number}" for number in range(len(sizes))]
    pictures = [f"{names[target]}/{number}.jpg" for number, target in enumerate(targets)]
    return ImageDataset(pictures, targets, class_names=names)


sizes = st.lists(st.integers(3, 40), min_size=2, max_size=5)


@given(
    sizes=sizes, val=st.floats(0.05, 0.6), test=st.sampled_from([0.0, 0.1, 0.3]),
    seed=st.integers(0, 100),
)  # fmt: skip
def test_splits_are_stratified_disjoint_and_complete(
    sizes: list[int], val: float, test: float, seed: int
) -> None:
    dataset = make(sizes)
    splits = split_dataset(dataset, val=val, test=test, seed=seed)
    parts = [list(split.paths) for split in splits.named().values()]
    assert sorted(path for part in parts for path in part) == sorted(dataset.paths)
    assert all(part == sorted(part, key=list(dataset.paths).index) for part in parts)
    assert (splits.test is None) == (test == 0)
    for target, size in enumerate(sizes):
        counts = [int((split.targets == target).sum()) for split in splits.named().values()]
        assert min(counts) >= 1
        assert abs(counts[1] - size * val) <= 2
        if len(counts) == 3:
            assert abs(counts[2] - size * test) <= 2
    again = split_dataset(dataset, val=val, test=test, seed=seed)
    assert [list(split.paths) for split in again.named().values()] == parts


def test_a_class_more_changes_nothing_for_the_others() -> None:
    few = split_dataset(make([10, 12], ["ants", "bees"]), val=0.3)
    more = split_dataset(make([10, 12, 9], ["ants", "bees", "wasps"]), val=0.3)
    chosen = [path for path in more.val.paths if path.parent.name != "wasps"]
    assert chosen == list(few.val.paths)


@given(sizes=sizes, seed=st.integers(0, 100))
def test_what_is_chosen_depends_on_seed_name_and_number_alone(sizes: list[int], seed: int) -> None:
    whole = split_dataset(make([*sizes, 7]), val=0.4, test=0.2, seed=seed)
    name = f"class {len(sizes)}"
    alone = split_dataset(make([11, 7], ["other", name]), val=0.4, test=0.2, seed=seed)
    for split, other in zip(whole.named().values(), alone.named().values(), strict=True):
        chosen, others = (
            [int(path.stem) for path in each.paths if path.parent.name == name]
            for each in (split, other)
        )
        assert [place - sum(sizes) for place in chosen] == [place - 11 for place in others]


def test_a_seed_means_the_same_in_every_version() -> None:
    dataset = make([5, 4], ["ants", "bees"])
    chosen = [path.as_posix() for path in split_dataset(dataset, val=0.4).val.paths]
    assert chosen == ["ants/3.jpg", "ants/4.jpg", "bees/6.jpg", "bees/8.jpg"]
    chosen = [path.as_posix() for path in k_folds(dataset, 2)[0].val.paths]
    assert chosen == ["ants/0.jpg", "ants/1.jpg", "ants/4.jpg", "bees/5.jpg", "bees/8.jpg"]


@pytest.mark.parametrize("function", [split_dataset, k_folds])
def test_class_without_pictures(function: Any) -> None:
    dataset = ImageDataset([f"{number}.jpg" for number in range(12)], [0, 2] * 6,
                           class_names=["x", "y", "z"])  # fmt: skip
    rest = {
        split_dataset: "too few for one in each of 2 splits. Add pictures, or make the splits by "
        "hand.",
        k_folds: "fewer than 5 folds. Take fewer folds, or add pictures.",
    }
    with pytest.raises(DataError) as error:
        function(dataset)
    assert str(error.value) == f"The class 'y' has 0 pictures, {rest[function]}"


def test_another_seed_splits_in_another_way() -> None:
    dataset = make([30, 30])
    assert split_dataset(dataset, seed=1).val.paths != split_dataset(dataset, seed=2).val.paths


@given(sizes=sizes, seed=st.integers(0, 100))
def test_each_picture_is_validated_on_once(sizes: list[int], seed: int) -> None:
    dataset = make(sizes)
    folds = k_folds(dataset, 3, seed=seed)
    held_out = [path for splits in folds for path in splits.val.paths]
    assert sorted(held_out) == sorted(dataset.paths)
    for splits in folds:
        assert sorted([*splits.train.paths, *splits.val.paths]) == sorted(dataset.paths)
        assert not set(splits.train.paths) & set(splits.val.paths)
        for target, size in enumerate(sizes):
            assert int((splits.val.targets == target).sum()) in (size // 3, -(-size // 3))
    numbers = [len(splits.val) for splits in folds]
    assert max(numbers) - min(numbers) <= 1


def test_class_that_is_too_small() -> None:
    with pytest.raises(DataError) as error:
        split_dataset(make([5, 1]))
    assert str(error.value) == (
        "The class 'class 1' has 1 picture, too few for one in each of 2 splits. Add pictures, "
        "or make the splits by hand."
    )
    with pytest.raises(DataError) as error:
        split_dataset(make([5, 2]), test=0.2)
    assert str(error.value) == (
        "The class 'class 1' has 2 pictures, too few for one in each of 3 splits. Add pictures, or "
        "make the splits by hand."
    )
    with pytest.raises(DataError) as error:
        k_folds(make([5, 2]), 3)
    assert str(error.value) == (
        "The class 'class 1' has 2 pictures, fewer than 3 folds. Take fewer folds, or add pictures."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val": 0}, f"`val` {SHARE % '('}, found 0."),
        ({"val": 1.0}, f"`val` {SHARE % '('}, found 1.0."),
        ({"val": "a"}, f"`val` {SHARE % '('}, found 'a'."),
        ({"test": -1}, f"`test` {SHARE % '['}, found -1."),
        ({"val": 0.5, "test": 0.5},
         "`val` and `test` should leave something for training, found 0.5 and 0.5."),
        ({"seed": -1}, "`seed` should be an integer from 0 to 4294967295, found -1."),
    ],
)  # fmt: skip
def test_shares_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        split_dataset(make([9, 9]), **options)
    assert str(error.value) == message


def test_other_arguments_are_checked() -> None:
    with pytest.raises(ConfigError) as error:
        k_folds(make([9, 9]), 1)
    assert str(error.value) == "`num_folds` should be an integer of at least 2, found 1."
    for function in (split_dataset, k_folds):
        with pytest.raises(ConfigError) as error:
            function([1, 2])  # type: ignore[arg-type]
        assert str(error.value) == "`dataset` should be an ImageDataset, found list."
