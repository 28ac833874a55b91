from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transferkit.data import ImageDataset, ImageSplits, SkippedFile
from transferkit.errors import ConfigError, DataError, ImageError
from transferkit.images import decode_image


def make_dataset(folder: Path, class_names: tuple[str, ...] = ("ants", "bees")) -> ImageDataset:
    paths = []
    for index in range(3):
        path = folder / f"{index}.png"
        Image.new("RGB", (5, 4), (index, 0, 0)).save(path)
        paths.append(path)
    return ImageDataset(paths, [1, 0, 1], class_names=class_names)


def test_targets_are_integers() -> None:
    message = "`targets` should be integer class indices, one for each picture, found float64 (2,)."
    with pytest.raises(DataError) as error:
        ImageDataset(["a", "b"], [0.9, 1.2], class_names=("a", "b"))  # type: ignore[list-item]
    assert str(error.value) == message


def test_targets_of_different_lengths() -> None:
    with pytest.raises(DataError) as error:
        ImageDataset(["a", "b"], [[0], [1, 0]], class_names=("a", "b"))  # type: ignore[list-item]
    assert str(error.value) == (
        "`targets` should be integer class indices, one for each picture, found [[0], [1, 0]]."
    )


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
    assert str(error.value) == (
        "`images` and `targets` should have the same length, found 2 and 1."
    )


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


# Pictures of any kind


def test_pictures_that_are_no_files() -> None:
    pixels = np.zeros((4, 5, 3), dtype=np.uint8)
    dataset = ImageDataset([pixels, Image.new("RGB", (3, 2))], [0, 1], class_names=["a", "b"])
    assert [dataset[index][0].shape for index in (0, 1)] == [(3, 4, 5), (3, 2, 3)]
    assert dataset.name_of(1) == "item 1"
    with pytest.raises(DataError) as error:
        _ = dataset.paths
    assert str(error.value) == (
        "The pictures of this data set are no files, so they have no paths."
    )


def test_broken_item_is_named_by_its_place() -> None:
    dataset = ImageDataset([b"", b"no picture"], [0, 1], class_names=["a", "b"])
    with pytest.raises(ImageError) as error:
        dataset[1]
    assert str(error.value) == (
        "Item 1 of the data set: Cannot read the picture `10 bytes`: it is not a JPEG, PNG, WEBP, "
        "BMP, GIF or TIFF file, whatever its name says."
    )


def test_subset_keeps_names_order_and_the_whole(tmp_path: Path) -> None:
    whole = make_dataset(tmp_path)
    part = whole.subset([2, 0])
    assert part.paths == [whole.paths[2], whole.paths[0]]
    assert part.targets.tolist() == [1, 1]
    assert part.class_names == whole.class_names
    assert len(whole) == 3
    arrays = ImageDataset([np.full((1, 1, 3), k, np.uint8) for k in range(4)], [0, 1, 0, 1],
                          class_names=["a", "b"])  # fmt: skip
    assert [int(arrays.subset([3, 1])[index][0][0, 0, 0]) for index in (0, 1)] == [3, 1]


@pytest.mark.parametrize("indices", [[3], [-1], [0.5], [[0]], [True], [[0], [1, 2]]])
def test_subset_of_what_is_not_there_is_an_error(tmp_path: Path, indices: Any) -> None:
    with pytest.raises(DataError) as error:
        make_dataset(tmp_path).subset(indices)
    assert str(error.value) == f"`indices` should be integers in [0, 3), found {indices!r}."


def test_other_decoding_leaves_the_data_set_as_it_is(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    other = dataset.with_decode(lambda source: decode_image(source)[:, :1])
    assert other[0][0].shape == (3, 1, 5)
    assert dataset[0][0].shape == (3, 4, 5)


def test_shared_data_set_is_sent_as_handles(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path).subset([0, 1, 2] * 2000)
    plain = len(ForkingPickler.dumps(dataset))
    dataset.share_memory()
    dataset.share_memory()
    sent = ForkingPickler.dumps(dataset)
    assert len(sent) < 5000 < plain
    again = ForkingPickler.loads(sent)
    assert again.paths == dataset.paths
    assert again.targets.tolist() == dataset.targets.tolist()
    assert pickle.loads(pickle.dumps(make_dataset(tmp_path))).paths == make_dataset(tmp_path).paths


@pytest.mark.parametrize("images", ["a.jpg", b"x", None, {"a": 1}, iter(["a.jpg"])])
def test_images_are_a_sequence(images: Any) -> None:
    with pytest.raises(DataError) as error:
        ImageDataset(images, [0], class_names=["a", "b"])
    assert str(error.value) == (f"`images` should be a sequence of pictures, found {images!r:.80}.")


@pytest.mark.parametrize("names", ["ab", None, ["a", 1], {"a", "b"}])
def test_class_names_are_texts(names: Any) -> None:
    with pytest.raises(DataError) as error:
        ImageDataset(["x"], [0], class_names=names)
    assert str(error.value) == f"`class_names` should be a list of texts, found {names!r:.80}."


def test_class_names_are_there_once() -> None:
    with pytest.raises(DataError) as error:
        ImageDataset(["x"], [0], class_names=["a", "b", "a"])
    assert str(error.value) == (
        "`class_names` should name each class once, found ['a'] more often."
    )


def test_class_name_that_is_no_text() -> None:
    with pytest.raises(DataError) as error:
        ImageDataset(["x"], [0], class_names=["a", "b\udcff"])
    assert str(error.value) == (
        "The class name 'b\\udcff' is no text: it has bytes that are no UTF-8. Rename its folder."
    )


def test_decode_is_called() -> None:
    with pytest.raises(ConfigError) as error:
        ImageDataset(["x"], [0], class_names=["a", "b"], decode=3)  # type: ignore[arg-type]
    assert str(error.value) == (
        "`decode` should be a callable from a picture to its pixels, found 3."
    )


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_splits_are_data_sets(tmp_path: Path, name: str) -> None:
    dataset = make_dataset(tmp_path)
    splits: dict[str, Any] = {"train": dataset, "val": dataset} | {name: [1, 2]}
    words = "an ImageDataset or None" if name == "test" else "an ImageDataset"
    with pytest.raises(ConfigError) as error:
        ImageSplits(**splits)
    assert str(error.value) == f"`{name}` should be {words}, found list."
