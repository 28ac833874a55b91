from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from transferkit.data import ImageDataset, ImageSplits, SkippedFile
from transferkit.errors import DataError, ImageError


def make_dataset(folder: Path, class_names: tuple[str, ...] = ("ants", "bees")) -> ImageDataset:
    paths = []
    for index in range(3):
        path = folder / f"{index}.png"
        Image.new("RGB", (5, 4), (index, 0, 0)).save(path)
        paths.append(path)
    return ImageDataset(paths, [1, 0, 1], class_names=class_names)


def test_targets_are_integers() -> None:
    message = "`targets` should be integer class indices, found float64."
    with pytest.raises(DataError) as error:
        ImageDataset(["a", "b"], [0.9, 1.2], class_names=("a", "b"))  # type: ignore[list-item]
    assert str(error.value) == message


def test_item_is_the_decoded_picture_and_its_target(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    assert len(dataset) == 3
    for index, target in enumerate([1, 0, 1]):
        image, found = dataset[index]
        assert image.dtype == torch.uint8
        assert image.shape == (3, 4, 5)
        assert image[0].flatten().tolist() == [index] * 20
        assert found == target
        assert type(found) is int


def test_works_with_the_loader_of_pytorch(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(make_dataset(tmp_path), batch_size=3)
    images, targets = next(iter(loader))
    assert images.shape == (3, 3, 4, 5)
    assert targets.tolist() == [1, 0, 1]


def test_index_past_the_end_ends_an_iteration(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    with pytest.raises(IndexError):
        dataset[3]
    assert [dataset[index][1] for index in range(-3, 0)] == [1, 0, 1]


def test_transform_is_applied_and_replaced_without_changing_the_data_set(tmp_path: Path) -> None:
    skipped = SkippedFile(tmp_path / "x", "excluded")
    plain = ImageDataset(
        make_dataset(tmp_path).paths, [1, 0, 1], class_names=["ants", "bees"], skipped=[skipped]
    )
    other = plain.with_transform(lambda image: image.float() + 0.5)
    assert float(other[2][0][0, 0, 0]) == 2.5
    assert plain[2][0].dtype == torch.uint8
    assert plain.transform is None
    assert other.with_transform(None)[2][0].dtype == torch.uint8
    assert other.paths == plain.paths
    assert other.targets.tolist() == [1, 0, 1]
    assert other.class_names == plain.class_names
    assert other.skipped == (skipped,)


def test_counts_include_classes_without_pictures() -> None:
    dataset = ImageDataset(["a", "b", "c"], [2, 0, 2], class_names=["x", "y", "z"])
    assert dataset.class_counts == {"x": 1, "y": 0, "z": 2}
    assert list(dataset.class_counts) == ["x", "y", "z"]
    assert dataset.targets.dtype == np.int64
    assert repr(dataset) == "ImageDataset(3 images, 3 classes)"


def test_unreadable_picture_is_an_image_error(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    dataset.paths[1].write_text("text")
    with pytest.raises(ImageError, match=r"^Cannot read the picture `"):
        dataset[1]


def test_different_lengths_are_an_error() -> None:
    with pytest.raises(DataError) as error:
        ImageDataset(["a", "b"], [0], class_names=["x", "y"])
    assert str(error.value) == ("`paths` and `targets` should have the same length, found 2 and 1.")


@pytest.mark.parametrize(("targets", "found"), [([0, 2], "0 to 2"), ([-1, 1], "-1 to 1")])
def test_target_out_of_range_is_an_error(targets: list[int], found: str) -> None:
    with pytest.raises(DataError) as error:
        ImageDataset(["a", "b"], targets, class_names=["x", "y"])
    assert str(error.value) == (
        f"`targets` should lie in [0, 2), one index for each of 2 class names, found {found}."
    )


def test_splits_share_class_names(tmp_path: Path) -> None:
    train = make_dataset(tmp_path)
    splits = ImageSplits(train, train, train)
    assert splits.class_names == ("ants", "bees")
    assert splits.num_classes == 2
    assert list(splits.named()) == ["train", "val", "test"]
    assert list(ImageSplits(train, train).named()) == ["train", "val"]


def test_description_names_counts_and_skipped_files(tmp_path: Path) -> None:
    train = make_dataset(tmp_path)
    skipped = [SkippedFile(Path("x"), "no picture"), SkippedFile(Path("y"), "no picture")]
    val = ImageDataset(["a"], [0], class_names=train.class_names, skipped=skipped)
    assert ImageSplits(train, val).describe() == (
        "train 3 (1 ants, 2 bees); val 1 (1 ants, 0 bees, 2 files skipped)"
    )


@pytest.mark.parametrize("name", ["val", "test"])
def test_other_class_names_in_a_split_are_an_error(tmp_path: Path, name: str) -> None:
    train, other = make_dataset(tmp_path), make_dataset(tmp_path, ("bees", "ants"))
    with pytest.raises(DataError) as error:
        ImageSplits(train, *([other] if name == "val" else [train, other]))
    assert str(error.value) == (
        f"The splits should have the same class names in the same order: train has "
        f"['ants', 'bees'], {name} has ['bees', 'ants']."
    )


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_empty_split_is_an_error(tmp_path: Path, name: str) -> None:
    full = make_dataset(tmp_path)
    empty = ImageDataset([], [], class_names=full.class_names)
    splits = {each: empty if each == name else full for each in ("train", "val", "test")}
    with pytest.raises(DataError) as error:
        ImageSplits(**splits)
    assert str(error.value) == f"The {name} split has no pictures."
