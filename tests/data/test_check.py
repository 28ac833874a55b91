from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transferkit.data import DataReport, check_folder, load_folders
from transferkit.data.drawn import draw_picture
from transferkit.data.facts import Facts
from transferkit.errors import ConfigError, DataError

DAMAGED = "the file is damaged or truncated. Replace or remove it."


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 ants and 12 bees to train on, 2 of each to validate with, all different."""
    root = tmp_path_factory.mktemp("drawn")
    seed = 0
    for split, count in (("train", 12), ("val", 2)):
        for label in ("ants", "bees"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                seed += 1
                draw_picture(label, seed=seed).resize((120, 90)).save(folder / f"{number}.png")
    return root


@pytest.fixture
def root(drawn: Path, tmp_path: Path) -> Path:
    """A copy of them to spoil."""
    return Path(shutil.copytree(drawn, tmp_path / "pictures"))


def found(report: DataReport, severity: str | None = None) -> list[tuple[str, str, list[str]]]:
    return [
        (each.kind, each.message, [str(path.relative_to(report.root)) for path in each.paths])
        for each in report.findings
        if severity in (None, each.severity)
    ]


def test_good_folder_has_nothing_wrong(root: Path) -> None:
    report = check_folder(root)
    assert found(report) == []
    assert not report.has_errors
    assert report.describe() == (
        f"{root}: 28 pictures, 0 of them broken\n"
        "  train: 24 (12 ants, 12 bees)\n"
        "  val: 4 (2 ants, 2 bees)\n"
        "  width: 120 to 120 pixels, median 120\n"
        "  height: 90 to 90 pixels, median 90\n"
        "0 errors, 0 warnings, 0 notes"
    )


def truncate(root: Path) -> None:
    path = root / "train" / "ants" / "0.png"
    path.write_bytes(path.read_bytes()[:500])


def leak(root: Path) -> None:
    (root / "val" / "ants" / "a.png").write_bytes((root / "train/ants/3.png").read_bytes())


def conflict(root: Path) -> None:
    (root / "train" / "bees" / "a.png").write_bytes((root / "train/ants/3.png").read_bytes())


def duplicate(root: Path) -> None:
    (root / "train" / "ants" / "a.png").write_bytes((root / "train/ants/3.png").read_bytes())


def near_leak(root: Path) -> None:
    with Image.open(root / "train/ants/3.png") as image:
        image.save(root / "val" / "ants" / "a.jpg", quality=60)


def near_mirrored(root: Path) -> None:
    with Image.open(root / "train/ants/3.png") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(root / "train" / "ants" / "a.png")


def near_conflict(root: Path) -> None:
    with Image.open(root / "train/ants/3.png") as image:
        image.resize((60, 45)).save(root / "train" / "bees" / "a.png")


def unknown_class(root: Path) -> None:
    (root / "val" / "bees").rename(root / "val" / "wasps")


def empty_class(root: Path) -> None:
    (root / "train" / "wasps").mkdir()


def few_classes(root: Path) -> None:
    for split in ("train", "val"):
        for path in (root / split / "bees").iterdir():
            path.unlink()
        (root / split / "bees").rmdir()


def link(root: Path) -> None:
    (root / "train" / "cows").symlink_to(root / "train" / "bees")
    (root / "val" / "cows").mkdir()


def no_val(root: Path) -> None:
    (root / "val").rename(root / "validation")


def tiny_class(root: Path) -> None:
    for number in range(3, 12):
        (root / "train" / "bees" / f"{number}.png").unlink()


def imbalance(root: Path) -> None:
    for number in range(1, 12):
        (root / "train" / "bees" / f"{number}.png").unlink()


def extension(root: Path) -> None:
    (root / "train" / "ants" / "0.png").rename(root / "train" / "ants" / "0.jpg")


def left_out(root: Path) -> None:
    (root / "train" / "ants" / "list.txt").write_text("ants")
    (root / "train" / "ants" / "Thumbs.db").write_text("passed over")


def rotated(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(root / "train/ants/0.png") as image:
        image.transpose(Image.Transpose.ROTATE_180).save(root / "train/ants/0.png", exif=exif)


def animated(root: Path) -> None:
    frames = [draw_picture("ants", seed=seed).resize((60, 40)) for seed in (90, 91)]
    frames[0].save(root / "train" / "ants" / "a.gif", save_all=True, append_images=frames[1:])


def odd(root: Path) -> None:
    rng = np.random.default_rng(0)
    thin = rng.integers(0, 255, (3, 120, 3), dtype=np.uint8)
    Image.fromarray(thin).convert("CMYK").save(root / "train" / "ants" / "a.tif")


CASES: dict[Callable[[Path], None], list[tuple[str, str, str, list[str]]]] = {
    truncate: [
        ("error", "broken", "Cannot read the picture `{root}/train/ants/0.png`: " + DAMAGED,
         ["train/ants/0.png"]),
    ],
    leak: [
        ("error", "leak", "the same file in the splits train, val, a leak",
         ["train/ants/3.png", "val/ants/a.png"]),
    ],
    conflict: [
        ("error", "conflict", "the same file in the classes ants, bees",
         ["train/ants/3.png", "train/bees/a.png"]),
    ],
    duplicate: [
        ("warning", "duplicate", "the same file 2 times in train, class ants",
         ["train/ants/3.png", "train/ants/a.png"]),
    ],
    near_leak: [
        ("warning", "near leak", "nearly the same picture in the splits train, val, a leak",
         ["train/ants/3.png", "val/ants/a.jpg"]),
    ],
    near_mirrored: [
        ("note", "near duplicate", "nearly the same picture 2 times in train, class ants",
         ["train/ants/3.png", "train/ants/a.png"]),
    ],
    near_conflict: [
        ("warning", "near conflict", "nearly the same picture in the classes ants, bees",
         ["train/ants/3.png", "train/bees/a.png"]),
    ],
    unknown_class: [
        ("error", "unknown class", "the class 'wasps' is in val and not in train", []),
        ("warning", "missing class", "the class 'bees' is in train and not in val", []),
    ],
    empty_class: [
        ("error", "empty class", "the class 'wasps' of train has no pictures", ["train/wasps"]),
        ("warning", "missing class", "the class 'wasps' is in train and not in val", []),
    ],
    few_classes: [("error", "few classes", "train has 1 classes, expected two or more", [])],
    link: [
        ("error", "link", "the class folder `cows` is a link to a folder that is read already",
         ["train/cows"]),
        ("error", "empty class", "the class 'cows' of train has no pictures", ["train/cows"]),
        ("error", "empty class", "the class 'cows' of val has no pictures", ["val/cows"]),
    ],
    no_val: [
        ("error", "missing split", "there is no split `val`", ["val"]),
        ("note", "other folder", "folders beside the splits are not looked at", ["validation"]),
    ],
    tiny_class: [("warning", "tiny class", "the class 'bees' of train has 3 pictures", [])],
    imbalance: [
        ("warning", "tiny class", "the class 'bees' of train has 1 pictures", []),
        ("warning", "imbalance",
         'the largest class of train has 12 pictures, the smallest 1; see `balance="sampler"`', []),
    ],
    extension: [
        ("warning", "extension",
         "1 file with an extension of another format; the content decides", ["train/ants/0.jpg"]),
    ],
    left_out: [
        ("warning", "left out", "1 file of train left out: no picture by its extension `.txt`",
         ["train/ants/list.txt"]),
    ],
    rotated: [("note", "odd", "1 file turned upright by EXIF data", ["train/ants/0.png"])],
    animated: [
        ("note", "odd", "1 file with several frames, of which the first is taken",
         ["train/ants/a.gif"]),
    ],
    odd: [
        ("note", "odd", "1 file of the mode CMYK, converted to RGB", ["train/ants/a.tif"]),
        ("note", "odd", "1 file over 32 times as long as wide, seen in the middle only",
         ["train/ants/a.tif"]),
        ("note", "odd", "1 file with a side under 32 pixels", ["train/ants/a.tif"]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("spoil", CASES, ids=lambda spoil: spoil.__name__)
def test_what_is_wrong_is_found(root: Path, spoil: Callable[[Path], None]) -> None:
    spoil(root)
    report = check_folder(root)
    assert [
        (each.severity, *about) for each, about in zip(report.findings, found(report), strict=True)
    ] == [
        (severity, kind, message.format(root=root), paths)
        for severity, kind, message, paths in CASES[spoil]
    ]
    assert report.has_errors == any(case[0] == "error" for case in CASES[spoil])


def test_text_lists_a_few_paths(root: Path) -> None:
    for number in range(6):
        (root / "train" / "ants" / f"{number}.txt").write_text("text")
    lines = check_folder(root).describe().splitlines()
    assert lines[5:] == [
        "warning: 6 files of train left out: no picture by its extension `.txt`",
        "    train/ants/0.txt",
        "    train/ants/1.txt",
        "    train/ants/2.txt",
        "    train/ants/3.txt",
        "    and 2 more",
        "0 errors, 1 warning, 0 notes",
    ]


def test_report_does_not_depend_on_the_workers(root: Path) -> None:
    for spoil in (truncate, leak, near_conflict, left_out, animated):
        spoil(root)
    expected = check_folder(root, num_workers=0)
    for num_workers in (1, 4):
        assert check_folder(root, num_workers=num_workers) == expected


def test_json_holds_everything(root: Path) -> None:
    truncate(root)
    report = check_folder(root)
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    assert data["counts"] == {"train": {"ants": 12, "bees": 12}, "val": {"ants": 2, "bees": 2}}
    assert data["num_broken"] == 1
    assert data["widths"] == data["widths"][:1] * 3 == [120] * 3
    assert data["findings"][0]["paths"] == [str(root / "train" / "ants" / "0.png")]


def test_folder_of_class_folders_is_one_split(root: Path) -> None:
    report = check_folder(root / "train")
    assert report.counts == {"all": {"ants": 12, "bees": 12}}
    assert found(report) == []


def test_other_names_of_splits(root: Path) -> None:
    (root / "train").rename(root / "a")
    (root / "val").rename(root / "b")
    report = check_folder(root, train="a", val="b")
    assert list(report.counts) == ["a", "b"]
    assert found(report) == []


def test_empty_folder(tmp_path: Path) -> None:
    report = check_folder(tmp_path)
    assert found(report) == [("few classes", "all has 0 classes, expected two or more", [])]
    assert report.widths == report.heights == ()
    assert report.num_images == 0


def test_names_that_are_no_text(root: Path) -> None:
    name = os.fsdecode(b"ant\xff.png")
    (root / "train" / "ants" / "0.png").rename(root / "train" / "ants" / name)
    (root / "train" / "ants" / name).write_bytes(b"no picture")
    report = check_folder(root)
    assert report.findings[0].paths[0].name == name
    assert json.loads(report.to_json())["findings"][0]["paths"][0].endswith(name)


def test_progress_is_told_the_number_of_files(root: Path) -> None:
    seen: list[int] = []

    def watch(facts: Iterable[Facts], total: int) -> Iterable[Facts]:
        seen.append(total)
        for each in facts:
            seen.append(1)
            yield each

    check_folder(root, watch=watch)
    assert seen == [28] + [1] * 28


def test_too_many_pixels_are_broken(root: Path) -> None:
    report = check_folder(root, max_pixels=10_799)
    assert report.num_broken == 28


def test_file_that_goes_away(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: Path) -> bytes:
        raise FileNotFoundError(2, "No such file or directory", str(self))

    monkeypatch.setattr(Path, "read_bytes", gone)
    path = root / "train" / "ants" / "0.png"
    assert check_folder(root).findings[0].message == (
        f"Cannot read the picture `{path}`: [Errno 2] No such file or directory: '{path}'."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"near_distance": 16}, "`near_distance` should be at most 15, found 16."),
        ({"near_distance": -1}, "`near_distance` should be an integer of at least 0, found -1."),
        ({"max_pixels": 0}, "`max_pixels` should be an integer of at least 1, found 0."),
        (
            {"num_workers": -1},
            '`num_workers` should be "auto" or an integer of at least 0, found -1.',
        ),
    ],
)  # fmt: skip
def test_arguments_are_checked(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_folder(root, **options)
    assert str(error.value) == message


def test_root_must_be_a_folder(root: Path) -> None:
    for path, problem in ((root / "no", "does not exist"), (root / "f", "is a file")):
        if problem == "is a file":
            path.write_text("")
        with pytest.raises(DataError) as error:
            check_folder(path)
        assert str(error.value) == (
            f"The data folder `{path}` {problem}. Expected a folder with pictures."
        )


def test_the_photographs(photographs: Path) -> None:
    report = check_folder(photographs)
    assert report.counts == {"train": {"ants": 123, "bees": 121}, "val": {"ants": 70, "bees": 83}}
    expected = "1 file of train left out: excluded by `imageNotFound.gif`"
    assert found(report) == [("left out", expected, ["train/ants/imageNotFound.gif"])]
    everything = check_folder(photographs, exclude=())
    assert found(everything, "error") == []
    assert everything.num_images == 398


@pytest.mark.parametrize("target", ["../../val", "../../val/bees", "../../..", "/"])
def test_links_bring_nothing_from_elsewhere_as_in_training(root: Path, target: str) -> None:
    (root / "train" / "ants" / "link").symlink_to(target)
    report = check_folder(root)
    data = load_folders(root)
    assert report.counts == {name: split.class_counts for name, split in data.named().items()}
    message = "1 file of train left out: a link to a folder that is read already"
    assert ("left out", message, ["train/ants/link"]) in found(report)
    assert not report.has_errors


def test_class_that_is_a_link_into_another_split(root: Path) -> None:
    shutil.rmtree(root / "val" / "ants")
    (root / "val" / "ants").symlink_to("../train/ants")
    report = check_folder(root)
    assert report.counts["val"] == {"ants": 0, "bees": 2}
    assert found(report, "error")[0] == (
        "link",
        "the class folder `ants` is a link to a folder that is read already",
        ["val/ants"],
    )
