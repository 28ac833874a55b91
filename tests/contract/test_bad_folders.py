"""Everything that a folder of pictures can be instead of one, and what is said about it."""

from __future__ import annotations

import os
import socket
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from transferkit.artifacts import load_artifact, save_artifact
from transferkit.data import load_folder, load_folders
from transferkit.data.folders import find_images
from transferkit.data.scan import is_hidden
from transferkit.errors import ConfigError, DataError, ImageError
from transferkit.inference import Predictor
from transferkit.models import BackboneSpec, build_model
from transferkit.testing import make_image_folder
from transferkit.training import Trainer

LAYOUT = "`ROOT/train/CLASS/*.jpg` and `ROOT/val/CLASS/*.jpg`"
ENDINGS = ".bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_image_folder(tmp_path / "pictures", num_train=2, num_val=2)


def remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def empty(folder: Path) -> None:
    remove(folder)
    folder.mkdir()


def only_in_val(root: Path) -> None:
    (root / "val" / "green").mkdir()


def other_case(root: Path) -> None:
    (root / "val" / "red").rename(root / "val" / "Red")


def other_form(root: Path) -> None:
    (root / "train" / "red").rename(root / "train" / unicodedata.normalize("NFC", "é"))
    (root / "val" / "red").rename(root / "val" / unicodedata.normalize("NFD", "é"))


def link_to_class(root: Path) -> None:
    (root / "train" / "crimson").symlink_to(root / "train" / "red")
    (root / "val" / "crimson").mkdir()


def link_to_split(root: Path) -> None:
    (root / "val").rename(root / "elsewhere")
    (root / "val").symlink_to("train")


def link_to_class_of_another_split(root: Path) -> None:
    empty(root / "val" / "red")
    (root / "val" / "red").rmdir()
    (root / "val" / "red").symlink_to(root / "train" / "red")


def link_to_above(root: Path) -> None:
    (root / "train" / "up").symlink_to(root)
    (root / "val" / "up").mkdir()


def classes_before_splits(root: Path) -> None:
    for split in ("train", "val"):
        for name in ("blue", "red"):
            (root / name).mkdir(exist_ok=True)
            (root / split / name).rename(root / name / split)
        (root / split).rmdir()


def dangling_class(root: Path) -> None:
    remove(root / "train" / "red")
    (root / "train" / "red").symlink_to("nowhere")


def circle(root: Path) -> None:
    (root / "val").rename(root / "elsewhere")
    (root / "val").symlink_to("val")


def no_splits(root: Path) -> None:
    for name in ("train", "val"):
        (root / name).rename(root / f"class {name}")


def no_text(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "red").rename(root / split / os.fsdecode(b"r\xff"))


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "class only in val": (
        only_in_val,
        "`{root}/val` has the classes ['green'], which the training split lacks: it has "
        "['blue', 'red']. Add them there, or remove them here.",
    ),
    "class missing in val": (
        lambda root: remove(root / "val" / "red"),
        "`{root}/val` lacks the classes ['red'] of the training split. Add them, or pass "
        "`allow_missing_classes=True`; the indices of the others stay the same.",
    ),
    "class missing in train": (
        lambda root: remove(root / "train" / "red"),
        "Classification needs at least two classes, found only `blue` in `{root}/train`. Expected "
        f"a subfolder with pictures for each class: {LAYOUT}.",
    ),
    "empty class": (
        lambda root: empty(root / "train" / "red"),
        "The class folder `{root}/train/red` has no pictures. Expected files that end in "
        f"{ENDINGS}.",
    ),
    "other case": (
        other_case,
        "`{root}/val` has the classes ['Red'], which the training split lacks: it has ['blue', "
        "'red']. Add them there, or remove them here. 'Red' differs from 'red' in nothing but "
        "case or Unicode form.",
    ),
    "other Unicode form": (
        other_form,
        "`{root}/val` has the classes ['e\u0301'], which the training split lacks: it has "
        "['blue', '\u00e9']. Add them there, or remove them here. 'e\u0301' differs from "
        "'\u00e9' in nothing but case or Unicode form.",
    ),
    "class that is a link to another": (
        link_to_class,
        "The class folder `{root}/train/red` is the same folder as `{root}/train/crimson`, by a "
        "link. Each is read once, for one class of one split: remove the link.",
    ),
    "split that is a link to another": (
        link_to_split,
        "The class folder `{root}/val/blue` is the same folder as `{root}/train/blue`, by a "
        "link. Each is read once, for one class of one split: remove the link.",
    ),
    "class that is a link to another split": (
        link_to_class_of_another_split,
        "The class folder `{root}/val/red` is the same folder as `{root}/train/red`, by a "
        "link. Each is read once, for one class of one split: remove the link.",
    ),
    "class that is a link to a folder above": (
        link_to_above,
        "The class folder `{root}/train/up` is the same folder as `{root}`, by a "
        "link. Each is read once, for one class of one split: remove the link.",
    ),
    "class that is a link to nowhere": (
        dangling_class,
        "Classification needs at least two classes, found only `blue` in `{root}/train`. Expected "
        f"a subfolder with pictures for each class: {LAYOUT}.",
    ),
    "split that is a circle of links": (
        circle,
        "Cannot read the folder `{root}/val`: too many levels of symbolic links.",
    ),
    "splits within classes": (
        classes_before_splits,
        "The data folder `{root}` has no subfolder `train`; it has ['blue', 'red']. "
        f"Expected {LAYOUT}. To split class folders, pass `val=0.2`.",
    ),
    "no validation": (
        lambda root: (root / "val").rename(root / "validation"),
        "The data folder `{root}` has no subfolder `val`; it has ['train', 'validation']. "
        f"Expected {LAYOUT}.",
    ),
    "classes without splits": (
        no_splits,
        "The data folder `{root}` has no subfolder `train`; it has ['class train', 'class val']. "
        f"Expected {LAYOUT}. To split class folders, pass `val=0.2`.",
    ),
    "class name that is no text": (
        no_text,
        "The class name 'r\\udcff' is no text: it has bytes that are no UTF-8. Rename its folder.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_folder_that_is_refused(root: Path, case: str) -> None:
    spoil, message = REFUSED[case]
    spoil(root)
    with pytest.raises(DataError) as error:
        load_folders(root)
    assert str(error.value) == message.format(root=root)


def test_missing_class_may_be_allowed_and_shifts_no_index(root: Path) -> None:
    remove(root / "val" / "blue")
    data = load_folders(root, allow_missing_classes=True)
    assert data.val.class_counts == {"blue": 0, "red": 2}
    assert data.val.targets.tolist() == [1, 1]


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)  # From its folder: such names must be short.


LEFT_OUT: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "text": ("list.txt", lambda path: path.write_text("red"), "no picture by its extension `.txt`"),
    "no extension": ("bare", lambda path: path.write_text(""), "no picture by its extension ``"),
    "placeholder": (
        "imageNotFound.gif",
        lambda path: path.write_bytes(b"GIF89a"),
        "excluded by `imageNotFound.gif`",
    ),
    "pipe": ("pipe.jpg", os.mkfifo, "no regular file"),
    "socket": ("s.jpg", make_socket, "no regular file"),
    "dangling link": ("link.jpg", lambda path: path.symlink_to("nowhere"), "no regular file"),
    "loop of links": ("loop.jpg", lambda path: path.symlink_to(path), "no regular file"),
    "device": ("zero.jpg", lambda path: path.symlink_to("/dev/zero"), "no regular file"),
    "link to the parent": (
        "up",
        lambda path: path.symlink_to(".."),
        "a link to a folder that is read already",
    ),
    "link to its own folder": (
        "here",
        lambda path: path.symlink_to("."),
        "a link to a folder that is read already",
    ),
    "link to another class": (
        "blue",
        lambda path: path.symlink_to("../blue"),
        "a link to a folder that is read already",
    ),
    "link to a class that comes later": (
        "later",
        lambda path: path.symlink_to("../zebra"),
        "a link to a folder that is read already",
    ),
    "link to the root": (
        "root",
        lambda path: path.symlink_to("../.."),
        "a link to a folder that is read already",
    ),
    "link to what the root lies in": (
        "above",
        lambda path: path.symlink_to("../../.."),
        "a link to a folder that is read already",
    ),
    "link to the system's root": (
        "system",
        lambda path: path.symlink_to("/"),
        "a link to a folder that is read already",
    ),
    "link to a class of another split": (
        "held out",
        lambda path: path.symlink_to("../../val/red"),
        "a link to a folder that is read already",
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_is_left_out_is_listed(root: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, make, reason = LEFT_OUT[case]
    monkeypatch.chdir(root / "train" / "red")
    path = root / "train" / "red" / name
    make(path)
    for split in ("train", "val"):
        make_image_folder(root.parent / "more", class_names=["zebra"], num_train=1, num_val=1)
        (root.parent / "more" / split / "zebra").rename(root / split / "zebra")
    data = load_folders(root)
    assert data.train.class_counts == {"blue": 2, "red": 2, "zebra": 1}
    assert data.val.class_counts == {"blue": 2, "red": 2, "zebra": 1}
    assert data.val.skipped == ()
    assert [(each.path, each.reason) for each in data.train.skipped] == [(path, reason)]


@pytest.mark.parametrize(
    "name", [".hidden.jpg", "._red.jpg", "Thumbs.db", "desktop.ini", ".DS_Store", "Icon\r"]
)
def test_what_desktops_leave_behind_is_passed_over(root: Path, name: str) -> None:
    (root / "train" / "red" / name).write_bytes(b"")
    for folder in ("__MACOSX", ".cache"):
        (root / "train" / folder).mkdir()
        (root / "train" / "red" / folder).mkdir()
        (root / "train" / "red" / folder / "x.jpg").write_bytes(b"")
    data = load_folders(root)
    assert data.class_names == ("blue", "red")
    assert data.train.class_counts == {"blue": 2, "red": 2}
    assert data.train.skipped == ()


def test_pictures_are_found_at_any_depth(root: Path) -> None:
    red = root / "train" / "red"
    (red / "b" / "c").mkdir(parents=True)
    (red / "000.png").rename(red / "b" / "c" / "x.PNG")
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir()
    (red / "001.png").rename(elsewhere / "y.png")
    (red / "a").symlink_to(elsewhere)
    data = load_folders(root)
    names = [str(path.relative_to(red)) for path in data.train.paths[2:]]
    assert names == ["a/y.png", "b/c/x.PNG"]
    assert find_images(red) == list(data.train.paths[2:])


def test_what_lies_beside_the_class_folders_is_listed(root: Path) -> None:
    train = root / "train"
    for name in ("stray.jpg", "list.csv", ".hidden", "Thumbs.db"):
        (train / name).touch()
    (train / "gone").symlink_to("nowhere")
    skipped = load_folders(root).train.skipped
    assert [(each.path, each.reason) for each in skipped] == [
        (train / name, "in no class folder") for name in ("gone", "list.csv", "stray.jpg")
    ]
    assert load_folders(root).val.skipped == ()
    assert load_folder(train).skipped == skipped


def test_folders_may_lie_deep(root: Path) -> None:
    handle = os.open(root / "train" / "red", os.O_RDONLY)
    for _ in range(1100):  # More than Python lets functions call themselves.
        os.mkdir("a", dir_fd=handle)
        inner = os.open("a", os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = inner
    os.close(os.open("x.png", os.O_CREAT, dir_fd=handle))
    os.close(handle)
    try:
        assert load_folders(root).train.class_counts == {"blue": 2, "red": 3}
    finally:
        remove_chain(root / "train" / "red" / "a")


def remove_chain(folder: Path) -> None:
    """Remove folders one in the other; pytest's own clean-up calls itself for each of them."""
    chain = [folder]
    while (chain[-1] / "a").is_dir():
        chain.append(chain[-1] / "a")
    (chain[-1] / "x.png").unlink()
    for each in reversed(chain):
        each.rmdir()


def test_folder_that_goes_away_while_it_is_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = root / "train" / "red" / "inner"
    inner.mkdir()
    plain = os.stat

    def gone(path: Any, **options: Any) -> Any:
        if path == str(inner):
            raise FileNotFoundError(2, "No such file or directory", path)
        return plain(path, **options)

    monkeypatch.setattr(os, "stat", gone)
    with pytest.raises(DataError) as error:
        load_folders(root)
    assert str(error.value) == f"Cannot read the folder `{inner}`: no such file or directory."


def test_train_and_val_in_each_others_place(root: Path) -> None:
    (root / "train" / "red" / "001.png").unlink()
    data = load_folders(root, train="val", val="train")
    assert data.describe() == "train 4 (2 blue, 2 red); val 3 (2 blue, 1 red)"


def test_default_test_split_is_not_read_a_second_time(root: Path) -> None:
    (root / "val").rename(root / "test")
    data = load_folders(root, val="test")
    assert data.test is None
    assert data.describe() == "train 4 (2 blue, 2 red); val 4 (2 blue, 2 red)"


def test_test_split_that_is_named_has_to_be_there(root: Path) -> None:
    with pytest.raises(DataError) as error:
        load_folders(root, test="exam")
    assert str(error.value) == (
        f"The data folder `{root}` has no subfolder `exam`; it has ['train', 'val']. "
        f"Expected {LAYOUT}."
    )


@pytest.mark.parametrize("length", [300, 5000])
def test_name_of_a_split_that_is_too_long(root: Path, length: int) -> None:
    path = root / ("x" * length)
    with pytest.raises(DataError) as error:
        load_folders(root, train=path.name)
    assert str(error.value) == f"Cannot read the folder `{path}`: file name too long."


def test_name_of_a_split_with_a_nul(root: Path) -> None:
    with pytest.raises(DataError) as error:
        load_folders(root, val="v\0")
    assert str(error.value) == (
        f"The data folder `{root}` has no subfolder `v\0`; it has ['train', 'val']. "
        f"Expected {LAYOUT}."
    )


def test_file_names_need_not_be_text(root: Path) -> None:
    path = root / "train" / "red" / os.fsdecode(b"r\xff.png")
    (root / "train" / "red" / "000.png").rename(path)
    data = load_folders(root)
    index = list(data.train.paths).index(path)
    assert data.train[index][0].shape == (3, 32, 40)


@pytest.mark.parametrize("place", [".", "train", "train/red"])
def test_folder_that_cannot_be_read(
    root: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir
    (root / "val").rename(root / "held out")

    def refuse(path: str) -> Any:  # The tests may run as root, who may read all.
        if Path(path) == root / place:
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError) as error:
        load_folders(root, val="held out" if place != "." else "val")
    assert str(error.value) == f"Cannot read the folder `{root / place}`: permission denied."


def test_file_that_cannot_be_read_is_found_when_it_is_used(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_folders(root)

    def refuse(path: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("transferkit.images.decode.os.open", refuse)
    with pytest.raises(ImageError) as error:
        data.train[0]
    path = data.train.paths[0]
    assert str(error.value) == f"Cannot read the picture `{path}`: permission denied."


@pytest.mark.parametrize(("make", "problem"), [(None, "does not exist"), (Path.touch, "is a file")])
def test_root_that_is_no_folder(tmp_path: Path, make: Any, problem: str) -> None:
    path = tmp_path / "x"
    if make:
        make(path)
    for load, expected in (
        (load_folders, f"a folder with {LAYOUT}"),
        (load_folder, "a folder with `ROOT/CLASS/*.jpg`"),
    ):
        with pytest.raises(DataError) as error:
            load(path)
        assert str(error.value) == f"The data folder `{path}` {problem}. Expected {expected}."


def test_empty_root(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        load_folders(tmp_path)
    assert str(error.value) == (
        f"The data folder `{tmp_path}` has no subfolder `train`; it has no subfolders. "
        f"Expected {LAYOUT}."
    )
    with pytest.raises(DataError) as error:
        load_folder(tmp_path)
    assert str(error.value) == (
        f"Classification needs at least two classes, found none in `{tmp_path}`. Expected a "
        f"subfolder with pictures for each class: `ROOT/CLASS/*.jpg`."
    )


@pytest.mark.parametrize(
    ("names", "found", "call"),
    [
        (("train", "val"), "`train` and `val`", "ROOT"),
        (("train", "val", "test"), "`test`, `train` and `val`", "ROOT"),
        (("train", "test"), "`test` and `train`", "ROOT, train=..., val=..."),
        (("Training", "Validation"), "`Training` and `Validation`", "ROOT, train=..., val=..."),
    ],
)
def test_share_for_a_folder_that_has_splits(
    tmp_path: Path, names: tuple[str, ...], found: str, call: str
) -> None:
    for name in names:
        for label in ("blue", "red"):
            (tmp_path / name / label).mkdir(parents=True)
            (tmp_path / name / label / "1.jpg").touch()
    with pytest.raises(DataError) as error:
        load_folders(tmp_path, val=0.2)
    assert str(error.value) == (
        f"The data folder `{tmp_path}` has the subfolders {found}, which look like splits rather "
        f"than classes. Load it with `load_folders({call})`, without a share."
    )


@pytest.mark.parametrize("names", [("train", "tram"), ("test", "val"), ("trained", "untrained")])
def test_classes_may_be_called_nearly_as_splits(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        for number in range(2):
            path = tmp_path / name / f"{number}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.touch()
    assert set(load_folders(tmp_path, val=0.5).class_names) == set(names)


def test_a_single_class_to_split(tmp_path: Path) -> None:
    (tmp_path / "red").mkdir()
    (tmp_path / "red" / "1.jpg").touch()
    with pytest.raises(DataError) as error:
        load_folders(tmp_path, val=0.5)
    assert str(error.value) == (
        f"Classification needs at least two classes, found only `red` in `{tmp_path}`. Expected a "
        f"subfolder with pictures for each class: `ROOT/CLASS/*.jpg`."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": None}, "`train` should be the name of a folder, found None."),
        ({"train": ""}, "`train` should be the name of a folder, found ''."),
        ({"test": 0.2}, "`test` should be the name of a folder, found 0.2."),
        ({"val": None}, "`val` should be a finite number in (0, 1), the share to split off, "
                        "found None."),
        ({"val": 0.2, "test": "held out"}, "`test` should be a finite number in [0, 1), the share "
                                           "to split off, found 'held out'."),
        ({"val": 0.2, "train": "learn"}, "`train` should be left out where `val` is a share, since "
                                         "the class folders lie in `root` itself then, found "
                                         "'learn'."),
        ({"val": "train"}, "`train` and `val` should be different folders, found 'train' for "
                           "both."),
        ({"test": "val"}, "`val` and `test` should be different folders, found 'val' for both."),
        ({"exclude": "*.gif"}, "`exclude` should be a list of glob patterns, found '*.gif'."),
        ({"exclude": None}, "`exclude` should be a list of glob patterns, found None."),
        ({"exclude": [3]}, "`exclude` should be a list of glob patterns, found [3]."),
        ({"val": 0.2, "seed": -1}, "`seed` should be an integer from 0 to 4294967295, found -1."),
    ],
)  # fmt: skip
def test_arguments_that_cannot_work(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_folders(root, **options)
    assert str(error.value) == message


# What a folder may be called, and is not passed over.
labels = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=12
).filter(lambda name: not is_hidden(name))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.sets(labels, min_size=2, max_size=4))
def test_any_names_come_back(names: set[str], tiny_spec: BackboneSpec) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "pictures")
        for split in ("train", "val"):
            for name in names:
                path = Path(f"{root}/{split}/{name}/x.png")
                path.parent.mkdir(parents=True)
                Image.new("RGB", (8, 8)).save(path)
        data = load_folders(root)
        assert set(data.class_names) == names
        assert [path.parent.name for path in data.val.paths] == list(data.class_names)
        assert load_folder(root / "train").class_names == data.class_names
        model = build_model(tiny_spec, len(names), weights=None)
        path = save_artifact(Path(folder, "m"), model, class_names=data.class_names)
        assert load_artifact(path, backbone=tiny_spec).class_names == data.class_names
        predictor = Predictor.load(path, backbone=tiny_spec, device="cpu")
        found = predictor.predict(data.val.paths[0], top_k=len(names))
        assert {each.label for each in found.top_k} == names


@given(st.lists(st.integers(0, 10**30), min_size=2, max_size=6, unique=True))
def test_numbers_keep_their_order(numbers: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            Path(folder, str(number)).mkdir()
            Path(folder, str(number), "x.jpg").touch()
        assert load_folder(folder).class_names == tuple(map(str, sorted(numbers)))


NAMES = ("two words", "line\nbreak", "🐜", 'a "quote"', "é", "10", "9", "$x^2$")


def test_names_of_any_kind_go_all_the_way(tmp_path: Path, tiny_spec: BackboneSpec) -> None:
    root = make_image_folder(tmp_path / "pictures", class_names=NAMES, num_train=1, num_val=1)
    data = load_folders(root)
    assert set(data.class_names) == set(NAMES)
    assert data.class_names.index("9") < data.class_names.index("10")
    model = build_model(tiny_spec, len(NAMES), weights=None)
    trainer = Trainer(model, data, verbose=False, device="cpu")
    trainer.fit(1)
    path = trainer.save(tmp_path / "m.safetensors")
    assert load_artifact(path, backbone=tiny_spec).class_names == data.class_names
    predictor = Predictor.load(path, backbone=tiny_spec, device="cpu")
    assert predictor.predict(data.val.paths[0]).label in NAMES
    assert save_artifact(tmp_path / "n.safetensors", model, class_names=data.class_names).exists()
