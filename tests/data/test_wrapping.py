from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import FakeData

from transferkit.data import ImageLoader, wrap_dataset
from transferkit.errors import DataError, ImageError
from transferkit.images import Preprocess


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
