from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from transferkit.data import load_folders
from transferkit.data.folders import find_images
from transferkit.data.scan import EXTENSIONS, natural_key
from transferkit.errors import ConfigError, DataError
from transferkit.testing import make_image_folder

LAYOUT = "`ROOT/train/CLASS/*.jpg` and `ROOT/val/CLASS/*.jpg`"
ENDINGS = ".bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp"


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def refuse(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the folder `path` unreadable, also for an administrator."""
    plain_iterdir, plain_scandir = Path.iterdir, os.scandir

    def iterdir(self: Path) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied")
        return plain_iterdir(self)

    def scandir(folder: Any = ".") -> Any:
        if Path(folder) == path:
            raise PermissionError(13, "Permission denied")
        return plain_scandir(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    monkeypatch.setattr(os, "scandir", scandir)


# load_folders


def test_each_split_is_read_with_its_targets(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, class_names=["bees", "ants"], num_train=3, num_val=2)
    splits = load_folders(str(root))
    assert splits.class_names == ("ants", "bees")
    assert splits.test is None
    for name, split in splits.named().items():
        for path, target in zip(split.paths, split.targets, strict=True):
            assert path.parent == root / name / splits.class_names[target]
    assert splits.describe() == "train 6 (3 ants, 3 bees); val 4 (2 ants, 2 bees)"


def test_test_split_is_read_where_there_is_one(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, num_train=2, num_val=1)
    for name in ("blue", "red"):
        touch(root / "test" / name / "a.jpg")
    splits = load_folders(root)
    assert splits.test is not None
    assert splits.test.class_counts == {"blue": 1, "red": 1}


def test_splits_may_have_other_names(tmp_path: Path) -> None:
    for split in ("learn", "check", "exam"):
        for name in ("a", "b"):
            touch(tmp_path / split / name / "1.jpg")
    splits = load_folders(tmp_path, train="learn", val="check", test="exam")
    assert splits.describe() == "train 2 (1 a, 1 b); val 2 (1 a, 1 b); test 2 (1 a, 1 b)"


def test_pictures_are_in_the_order_of_their_names(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            for file in ("c.jpg", "B.jpg", "a.jpg"):
                touch(tmp_path / split / name / file)
    names = [path.name for path in load_folders(tmp_path).train.paths]
    assert names == ["B.jpg", "a.jpg", "c.jpg"] * 2


def test_classes_are_sorted_naturally(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("class10", "class2", "class1"):
            touch(tmp_path / split / name / "1.jpg")
    assert load_folders(tmp_path).class_names == ("class1", "class2", "class10")


@pytest.mark.parametrize("extension", sorted(EXTENSIONS))
def test_every_extension_counts_in_lower_and_upper_case(tmp_path: Path, extension: str) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            touch(tmp_path / split / name / f"low{extension}")
            touch(tmp_path / split / name / f"UP{extension.upper()}")
    assert load_folders(tmp_path).train.class_counts == {"a": 2, "b": 2}


def test_files_that_are_left_out_are_listed_and_hidden_ones_passed_over(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, num_train=1, num_val=1)
    blue = root / "train" / "blue"
    for name in ("imageNotFound.gif", "notes.txt", "bare", ".hidden.jpg"):
        touch(blue / name)
    touch(blue / "Thumbs.db")
    (blue / "folder.jpg").mkdir()
    (root / "train" / ".cache").mkdir()
    (root / "train" / "__MACOSX").mkdir()
    touch(root / "train" / "readme.txt")
    splits = load_folders(root)
    assert splits.class_names == ("blue", "red")
    assert [path.name for path in splits.train.paths] == ["000.png", "000.png"]
    assert [(each.path, each.reason) for each in splits.train.skipped] == [
        (root / "train" / "readme.txt", "in no class folder"),
        (blue / "bare", "no picture by its extension ``"),
        (blue / "imageNotFound.gif", "excluded by `imageNotFound.gif`"),
        (blue / "notes.txt", "no picture by its extension `.txt`"),
    ]


def test_excluded_patterns_can_be_chosen(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, num_train=2, num_val=2)
    touch(root / "train" / "blue" / "imageNotFound.gif")
    assert len(load_folders(root, exclude=()).train) == 5
    splits = load_folders(root, exclude=("*1.png",))
    assert [path.name for path in splits.val.paths] == ["000.png"] * 2
    assert splits.val.skipped[0].reason == "excluded by `*1.png`"


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_root_that_is_no_folder_is_an_error(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "data"
    if kind == "file":
        root.touch()
    what = "is a file" if kind == "file" else "does not exist"
    with pytest.raises(DataError) as error:
        load_folders(root)
    assert str(error.value) == (
        f"The data folder `{root}` {what}. Expected a folder with {LAYOUT}."
    )


@pytest.mark.parametrize(
    ("present", "missing", "found"),
    [([], "train", "no subfolders"), (["train", "x"], "val", "['train', 'x']")],
)
def test_missing_split_is_an_error(
    tmp_path: Path, present: list[str], missing: str, found: str
) -> None:
    for name in present:
        (tmp_path / name).mkdir()
    with pytest.raises(DataError) as error:
        load_folders(tmp_path)
    assert str(error.value) == (
        f"The data folder `{tmp_path}` has no subfolder `{missing}`; it has {found}. "
        f"Expected {LAYOUT}."
    )


@pytest.mark.parametrize(("classes", "found"), [([], "none"), (["ants"], "only `ants`")])
def test_fewer_than_two_classes_are_an_error(
    tmp_path: Path, classes: list[str], found: str
) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    for name in classes:
        touch(tmp_path / "train" / name / "1.jpg")
    with pytest.raises(DataError) as error:
        load_folders(tmp_path)
    assert str(error.value) == (
        f"Classification needs at least two classes, found {found} in `{tmp_path / 'train'}`. "
        f"Expected a subfolder with pictures for each class: {LAYOUT}."
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_class_is_an_error(tmp_path: Path, split: str) -> None:
    root = make_image_folder(tmp_path, num_train=1, num_val=1)
    folder = root / split / "blue"
    (folder / "000.png").rename(folder / "000.txt")
    with pytest.raises(DataError) as error:
        load_folders(root)
    assert str(error.value) == (
        f"The class folder `{folder}` has no pictures. Expected files that end in {ENDINGS}."
    )


def test_class_only_in_val_is_an_error(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, num_train=1, num_val=1)
    touch(root / "val" / "green" / "1.jpg")
    for allow in (False, True):
        with pytest.raises(DataError) as error:
            load_folders(root, allow_missing_classes=allow)
        assert str(error.value) == (
            f"`{root / 'val'}` has the classes ['green'], which the training split lacks: it "
            f"has ['blue', 'red']. Add them there, or remove them here."
        )


def test_class_missing_in_val_is_an_error_or_a_choice_that_shifts_no_index(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, num_train=1, num_val=1)
    (root / "val" / "blue" / "000.png").unlink()
    (root / "val" / "blue").rmdir()
    with pytest.raises(DataError) as error:
        load_folders(root)
    assert str(error.value) == (
        f"`{root / 'val'}` lacks the classes ['blue'] of the training split. Add them, or pass "
        f"`allow_missing_classes=True`; the indices of the others stay the same."
    )
    val = load_folders(root, allow_missing_classes=True).val
    assert val.class_counts == {"blue": 0, "red": 1}
    assert val.targets.tolist() == [1]


@pytest.mark.parametrize("place", ["train", "train/red"])
def test_unreadable_folder_is_an_error(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_image_folder(tmp_path, num_train=1, num_val=1)
    refuse(root / place, monkeypatch)
    with pytest.raises(DataError) as error:
        load_folders(root)
    assert str(error.value) == f"Cannot read the folder `{root / place}`: permission denied."


def test_exclude_is_a_list(tmp_path: Path) -> None:
    message = "`exclude` should be a list of glob patterns, found '0*'."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        load_folders(make_image_folder(tmp_path), exclude="0*")


def test_unreadable_root_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(tmp_path, monkeypatch)
    with pytest.raises(DataError):
        load_folders(tmp_path)


def test_photographs_have_the_published_counts(photographs: Path) -> None:
    splits = load_folders(photographs)
    assert splits.class_names == ("ants", "bees")
    assert len(splits.train) == 244
    assert len(splits.val) == 153
    assert [each.path.name for each in splits.train.skipped] == ["imageNotFound.gif"]
    assert splits.describe() == (
        "train 244 (123 ants, 121 bees, 1 file skipped); val 153 (70 ants, 83 bees)"
    )


# find_images


def test_pictures_are_found_at_any_depth_sorted_by_path(tmp_path: Path) -> None:
    for name in ("b.jpg", "a/2.PNG", "a/b/1.gif", "imageNotFound.gif", "a/x.txt"):
        touch(tmp_path / name)
    for name in (".hidden/1.jpg", ".1.jpg", "__MACOSX/1.jpg"):
        touch(tmp_path / name)
    found = find_images(tmp_path)
    assert found == [tmp_path / "a/2.PNG", tmp_path / "a/b/1.gif", tmp_path / "b.jpg"]


def test_relative_folder_gives_relative_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "some" / "a.jpg")
    monkeypatch.chdir(tmp_path)
    assert find_images("some") == [Path("some/a.jpg")]


def test_folder_without_pictures_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path / "a.txt")
    with pytest.raises(DataError) as error:
        find_images(tmp_path)
    assert str(error.value) == (
        f"The folder `{tmp_path}` holds no pictures. Expected files that end in {ENDINGS}."
    )


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_pictures_of_no_folder_are_an_error(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "pictures"
    if kind == "file":
        Image.new("RGB", (2, 2)).save(root, "PNG")
    what = "is a file" if kind == "file" else "does not exist"
    with pytest.raises(DataError) as error:
        find_images(root)
    assert str(error.value) == f"The folder `{root}` {what}. Expected a folder with pictures."


def test_folder_that_cannot_be_read_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "a.jpg")
    touch(tmp_path / "private" / "b.jpg")
    refuse(tmp_path / "private", monkeypatch)
    with pytest.raises(DataError):
        find_images(tmp_path)


# The natural order


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "class_", ""]), st.integers(0, 10**12))))
def test_numbers_are_ordered_by_value(parts: list[tuple[str, int]]) -> None:
    if any(prefix == "" for prefix, _ in parts):
        parts = [("", number) for _, number in parts]
    names = [f"{prefix}{number}" for prefix, number in parts]
    expected = [f"{prefix}{number}" for prefix, number in sorted(parts)]
    assert sorted(names, key=natural_key) == expected


@settings(deadline=None)
@given(st.permutations(["1", "01", "10", "2", "a", "A", "a1b", "a01b", "²", "é", "", "1a", "a 2"]))
def test_order_does_not_depend_on_where_it_started(names: list[str]) -> None:
    assert sorted(names, key=natural_key) == sorted(sorted(names), key=natural_key)


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab", max_size=5)))
def test_names_without_digits_are_in_the_order_of_the_alphabet(names: list[str]) -> None:
    assert sorted(names, key=natural_key) == sorted(names)


@settings(deadline=None)
@given(st.lists(st.text(max_size=6), max_size=8))
def test_any_names_can_be_ordered(names: list[str]) -> None:
    ordered = sorted(names, key=natural_key)
    assert sorted(ordered) == sorted(names)
    names.reverse()
    assert sorted(names, key=natural_key) == ordered
