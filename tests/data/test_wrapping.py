from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import FakeData, ImageFolder

from transferkit.data import ImageLoader, split_dataset, wrap_dataset
from transferkit.errors import DataError, ImageError
from transferkit.images import Preprocess
from transferkit.testing import make_image_folder


def test_a_data_set_of_torchvision() -> None:
    fake = FakeData(size=6, image_size=(3, 20, 30), num_classes=3)
    dataset = wrap_dataset(fake, class_names=["a", "b", "c"])
    assert dataset.targets.tolist() == [fake[index][1] for index in range(6)]
    expected = np.asarray(fake[2][0])
    assert torch.equal(dataset[2][0], torch.from_numpy(expected.copy()).permute(2, 0, 1))
    loader = ImageLoader(dataset, Preprocess(crop_size=8, resize_size=8).train(), batch_size=4)
    assert [len(batch.images) for batch in loader.batches()] == [4, 2]


def test_a_part_of_a_data_set() -> None:
    fake = FakeData(size=6, image_size=(3, 20, 30), num_classes=3)
    dataset = wrap_dataset(Subset(fake, [4, 1]), class_names=["a", "b", "c"])
    assert dataset.targets.tolist() == [fake[4][1], fake[1][1]]


class Numbers(Dataset[Any]):
    """A data set that notes what is read and knows nothing of its targets."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.read.append(index)
        return Image.new("RGB", (4, 3)), index % 3


def test_of_a_part_no_more_than_the_part_is_read() -> None:
    numbers = Numbers()
    dataset = wrap_dataset(Subset(Subset(numbers, [8, 7, 6, 1]), [3, 1]))
    assert numbers.read == [1, 7]
    assert dataset.targets.tolist() == [1, 1]


@pytest.mark.parametrize("is_part", [False, True])
def test_targets_that_the_data_set_changes(tmp_path: Path, is_part: bool) -> None:
    make_image_folder(tmp_path, num_train=2)
    folder = ImageFolder(tmp_path / "train", target_transform=lambda target: 2 - target)
    assert folder.targets == [0, 0, 1, 1]
    dataset = wrap_dataset(Subset(folder, [0, 1, 2, 3]) if is_part else folder)
    assert dataset.targets.tolist() == [2, 2, 1, 1]
    assert dataset.class_names == ("0", "1", "2")
    named = wrap_dataset(folder, class_names=["none", "red", "blue"])
    assert named.class_counts == {"none": 0, "red": 2, "blue": 2}


@pytest.mark.parametrize("worker_type", ["thread", "process"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_tensors_go_all_the_way(worker_type: Any, num_workers: int) -> None:
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    source = TensorDataset(images, torch.tensor([0, 1, 2, 0, 1, 2]))
    dataset = wrap_dataset(source, class_names=["a", "b", "c"])
    splits = split_dataset(dataset, val=0.5, seed=1)
    preprocess = Preprocess(crop_size=8, resize_size=8)
    loader = ImageLoader(splits.val, preprocess.eval(), batch_size=2, num_workers=num_workers,
                         worker_type=worker_type)  # fmt: skip
    batches = list(loader.batches())
    loader.close()
    found = torch.cat([batch.targets for batch in batches])
    assert sorted(found.tolist()) == [0, 1, 2]
    for batch in batches:
        for image, target, index in zip(*batch, strict=True):
            pixels = splits.val[int(index)][0]
            assert any(torch.equal(pixels, images[place]) for place in (int(target), target + 3))
            assert torch.equal(image, preprocess.eval()(pixels))


@pytest.mark.parametrize("attribute", ["targets", "labels"])
@pytest.mark.parametrize("value", [3, None, [0, 1], len])
def test_attributes_that_are_no_targets_are_not_taken(attribute: str, value: Any) -> None:
    numbers = Numbers()
    setattr(numbers, attribute, value)
    assert wrap_dataset(numbers).targets.tolist() == [0, 1, 2] * 3


@pytest.mark.parametrize("names", ["abc", 3])
def test_names_of_another_kind_are_an_error(names: Any) -> None:
    with pytest.raises(DataError) as error:
        wrap_dataset(Numbers(), class_names=names)
    assert str(error.value) == f"`class_names` should be a list of texts, found {names!r}."


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_names_may_be_an_array(kind: Any) -> None:
    assert wrap_dataset(Numbers(), class_names=kind(["a", "b", "c"])).class_names == ("a", "b", "c")


class Labelled:
    classes = ("zebra", "ant")

    def __init__(self, attribute: str) -> None:
        setattr(self, attribute, [1, 0, 1])
        self.num_read = 0

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.num_read += 1
        return Image.new("RGB", (4, 3)), [1, 0, 1][index]


@pytest.mark.parametrize("attribute", ["targets", "labels"])
def test_known_targets_and_classes_are_taken_without_reading(attribute: str) -> None:
    source = Labelled(attribute)
    dataset = wrap_dataset(source)  # type: ignore[arg-type]
    assert source.num_read == 0
    assert dataset.class_names == ("zebra", "ant")
    assert dataset.targets.tolist() == [1, 0, 1]


def test_given_targets_come_first_and_names_are_numbers() -> None:
    pairs: Any = [(Image.new("RGB", (4, 3)), "x")] * 3
    dataset = wrap_dataset(pairs, targets=[0, 2, 1])
    assert dataset.targets.tolist() == [0, 2, 1]
    assert dataset.class_names == ("0", "1", "2")


def test_a_part_knows_the_classes_of_the_whole() -> None:
    source = Labelled("targets")
    part: Subset[Any] = Subset(Subset(source, [2, 1]), [0])  # type: ignore[arg-type]
    dataset = wrap_dataset(part)
    assert source.num_read == 0
    assert dataset.class_names == ("zebra", "ant")
    assert dataset.targets.tolist() == [1]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize("source", [Stream(), 3, "folder", {"a": 1}])
def test_what_has_no_places_is_an_error(source: Any) -> None:
    with pytest.raises(DataError) as error:
        wrap_dataset(source)
    assert str(error.value) == (
        f"A data set should have a length and items by index, found {type(source).__name__}. "
        f"Order and splits need both."
    )


def test_items_of_another_kind_are_an_error() -> None:
    with pytest.raises(DataError) as error:
        wrap_dataset(TensorDataset(torch.zeros(2, 3, 4, 4)))
    assert str(error.value) == (
        "Items of the data set should be (image, target), found tuple at 0."
    )


def test_floats_are_an_error_that_says_where_they_are_made() -> None:
    fake = FakeData(size=2, image_size=(3, 4, 5), num_classes=2, transform=transforms.ToTensor())
    dataset = wrap_dataset(fake, class_names=["a", "b"])
    with pytest.raises(ImageError) as error:
        dataset[1]
    assert str(error.value) == (
        "Item 1 of the data set: A picture given as a tensor should be uint8 (3, H, W) in "
        "[0, 255], found float32 (3, 4, 5). Leave out the transform that made floats of it; it is "
        "done here."
    )
