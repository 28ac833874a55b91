"""What a bulk prediction writes, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from transferkit.artifacts import save_artifact
from transferkit.data.folders import find_images
from transferkit.errors import ConfigError, DataError, ImageError, OutputError, TransferkitError
from transferkit.inference import Failure, Prediction, Predictor, network, predict_to_file
from transferkit.models import BackboneSpec, build_model
from transferkit.models.engines import make_engine


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def expect(kind: type[TransferkitError], message: str) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


def test_rows_are_the_predictions_in_their_order(
    watched: Any, pictures: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "found.csv"
    report = predict_to_file(watched, pictures, out)
    expected = list(Predictor.predict_many(watched, pictures))
    rows = read(out)
    assert [row["path"] for row in rows] == [str(path) for path in pictures]
    for row, prediction in zip(rows, expected, strict=True):
        assert isinstance(prediction, Prediction)
        assert (row["label"], int(row["index"])) == (prediction.label, prediction.index)
        assert float(row["probability"]) == prediction.probability
        assert (row["abstains"], row["error"]) == ("false", "")
    assert report.path == out
    assert (report.num_images, report.num_predicted) == (16, 16)
    assert (report.num_duplicates, report.num_resumed, report.num_failed) == (0, 0, 0)
    assert 0 < report.seconds < 60
    assert report.to_dict()["path"] == str(out)
    assert json.loads(json.dumps(report.to_dict()))["num_images"] == 16


def test_the_journal_is_gone_at_the_end(watched: Any, pictures: list[Path], tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    predict_to_file(watched, pictures, tmp_path / "found.csv")
    assert set(tmp_path.iterdir()) - before == {tmp_path / "found.csv"}


def test_a_folder_a_pattern_a_file_and_a_generator(
    watched: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    files = sorted((tiny_folder / "val").rglob("*.png"))
    sources: list[Any] = [
        tiny_folder / "val",
        str(tiny_folder / "val"),
        str(tiny_folder / "val" / "**" / "*.png"),
        (str(path) for path in files),
    ]
    for number, source in enumerate(sources):
        out = tmp_path / f"{number}.csv"
        assert predict_to_file(watched, source, out).num_images == 8
        assert [row["path"] for row in read(out)] == [str(path) for path in files]
    assert predict_to_file(watched, files[0], tmp_path / "one.csv").num_images == 1


def test_paths_are_relative_to_the_root(watched: Any, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.csv"
    predict_to_file(watched, tiny_folder / "val" / "red", out, root=tiny_folder)
    assert [row["path"] for row in read(out)] == [f"val/red/00{number}.png" for number in range(4)]


def test_a_picture_that_is_not_in_the_root(
    watched: Any, pictures: list[Path], tmp_path: Path
) -> None:
    message = (
        f"The picture `{pictures[0]}` does not lie in `root`, `elsewhere`. Give a folder that all "
        f"of them lie in, or leave `root` out."
    )
    with expect(ConfigError, message):
        predict_to_file(watched, pictures, tmp_path / "found.csv", root="elsewhere")
    assert list(tmp_path.glob("found*")) == []


@pytest.fixture
def mixed(pictures: list[Path], tmp_path: Path) -> list[Path]:
    """A good picture, a damaged one, one that is not there, and a good one."""
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(pictures[0].read_bytes()[:60])
    return [pictures[0], damaged, tmp_path / "none.png", pictures[1]]


def test_failures_are_recorded(watched: Any, mixed: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "found.csv"
    report = predict_to_file(watched, mixed, out)
    assert (report.num_images, report.num_predicted, report.num_failed) == (4, 2, 2)
    rows = read(out)
    reasons = [each.reason if isinstance(each, Failure) else "" for each in _record(watched, mixed)]
    assert [row["error"] for row in rows] == reasons
    assert rows[2] == {
        "path": str(mixed[2]), "label": "", "index": "", "probability": "", "abstains": "",
        "error": f"Cannot read the picture `{mixed[2]}`: no such file or directory.",
    }  # fmt: skip


def _record(predictor: Predictor, paths: list[Path]) -> list[Prediction | Failure]:
    return list(Predictor.predict_many(predictor, paths, on_error="record"))


def test_failures_are_skipped(watched: Any, mixed: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "found.csv"
    report = predict_to_file(watched, mixed, out, on_error="skip")
    assert (report.num_images, report.num_failed) == (4, 2)
    assert [row["path"] for row in read(out)] == [str(mixed[0]), str(mixed[3])]


def test_a_failure_ends_the_run_and_what_is_done_is_kept(
    watched: Any, mixed: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "found.csv"
    with pytest.raises(ImageError, match=r"damaged\.png"):
        predict_to_file(watched, mixed, out, on_error="raise")
    assert not out.exists()
    report = predict_to_file(watched, mixed, out, resume=True)
    assert (report.num_resumed, report.num_predicted, report.num_failed) == (1, 1, 2)


def test_files_with_the_same_bytes_are_computed_once(
    watched: Any, pictures: list[Path], tmp_path: Path
) -> None:
    copies = []
    for number, source in enumerate([*pictures[:3], *pictures[:3], *pictures]):
        copies.append(tmp_path / f"copy{number:02}.png")
        shutil.copyfile(source, copies[-1])
    once, each = tmp_path / "once.csv", tmp_path / "each.csv"
    report = predict_to_file(watched, copies, once, batch_size=1)
    assert (report.num_images, report.num_predicted, report.num_duplicates) == (22, 16, 6)
    assert len(watched.seen) == 16
    watched.seen.clear()
    report = predict_to_file(watched, copies, each, duplicates="each", batch_size=1)
    assert (report.num_predicted, report.num_duplicates) == (22, 0)
    assert len(watched.seen) == 22
    assert once.read_bytes() == each.read_bytes()


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_duplicates_of_what_is_not_yet_predicted(
    watched: Any, pictures: list[Path], tmp_path: Path, batch_size: int
) -> None:
    inputs = [pictures[0], pictures[0], pictures[1], pictures[0], pictures[1], pictures[2]]
    out = tmp_path / "found.csv"
    report = predict_to_file(watched, inputs, out, batch_size=batch_size)
    assert (report.num_images, report.num_predicted, report.num_duplicates) == (6, 3, 3)
    assert [row["path"] for row in read(out)] == [str(path) for path in inputs]
    by_path: dict[str, set[str]] = {}
    for row in read(out):
        by_path.setdefault(row["path"], set()).add(row["probability"])
    assert all(len(values) == 1 for values in by_path.values())


def test_a_damaged_file_twice_has_two_errors_with_their_own_paths(
    watched: Any, mixed: list[Path], tmp_path: Path
) -> None:
    again = tmp_path / "again.png"
    shutil.copyfile(mixed[1], again)
    inputs = [mixed[1], again, mixed[0], again]
    report = predict_to_file(watched, inputs, tmp_path / "found.jsonl")
    assert (report.num_failed, report.num_duplicates, report.num_predicted) == (3, 0, 1)
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    expected = [each.to_dict() for each in _record(watched, inputs)]
    assert [each.get("error") for each in found] == [each.get("error") for each in expected]
    assert [each["path"] for each in found] == [str(path) for path in inputs]


def test_no_pictures_give_a_header_alone(watched: Any, tmp_path: Path) -> None:
    out = tmp_path / "found.csv"
    assert predict_to_file(watched, [], out).num_images == 0
    assert out.read_bytes() == b"path,label,index,probability,abstains,error\r\n"


def test_few_pictures_are_not_worth_the_choice_of_an_engine(
    tiny_spec: BackboneSpec, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def choose(part: torch.nn.Module, *_: Any, **options: Any) -> Any:
        tried.append("auto")
        return "pytorch", make_engine(part, device=options["device"]), ()

    monkeypatch.setattr(network, "choose_engine", choose)
    model = build_model(tiny_spec, 2, weights=None)
    predictor = Predictor(model, class_names=("blue", "red"), device="cpu")
    report = predict_to_file(predictor, pictures, tmp_path / "few.csv")
    assert (report.engine, tried) == ("pytorch", [])
    sharded = predict_to_file(predictor, pictures * 8, tmp_path / "part.csv", shard=(1, 2))
    assert (sharded.num_images, tried) == (64, [])
    # What was settled for these is not for others.
    predict_to_file(predictor, pictures * 5, tmp_path / "many.csv", duplicates="each")
    assert tried == ["auto"]
    predictor = Predictor(model, class_names=("blue", "red"), device="cpu")
    predict_to_file(predictor, iter(pictures), tmp_path / "unknown.csv")
    assert tried == ["auto"] * 2


def test_each_shard_has_its_own_pictures_and_file(
    watched: Any,
    pictures: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "found.csv"
    predict_to_file(watched, pictures, out, shard=(0, 3))
    predict_to_file(watched, iter(pictures), out, shard=(1, 3))
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    report = predict_to_file(watched, pictures, out, shard="auto")
    assert report.path == tmp_path / "found-00002-of-00003.csv"
    for rank in range(3):
        rows = read(tmp_path / f"found-{rank:05}-of-00003.csv")
        assert [row["path"] for row in rows] == [str(path) for path in pictures[rank::3]]
    assert not out.exists()


@pytest.mark.slow
def test_processes_of_torchrun_share_a_folder(tiny_folder: Path, tmp_path: Path) -> None:
    model = build_model("squeezenet1_1", 2, weights=None)
    artifact = save_artifact(tmp_path / "m.safetensors", model, class_names=("blue", "red"))
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["predict", str(artifact), str(tiny_folder), "--out", str(tmp_path / "found.csv")]
    result = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "transferkit", *command, "--quiet"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    paths = find_images(tiny_folder)
    for rank in range(2):
        rows = read(tmp_path / f"found-{rank:05}-of-00002.csv")
        assert [row["path"] for row in rows] == [str(path) for path in paths[rank::2]]
        assert not any(row["error"] for row in rows)
    assert sorted(path.name for path in tmp_path.glob("found*")) == [
        "found-00000-of-00002.csv",
        "found-00001-of-00002.csv",
    ]


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_one_process_has_no_shards(
    environment: dict[str, str],
    watched: Any,
    pictures: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    report = predict_to_file(watched, pictures[:1], tmp_path / "found.csv", shard="auto")
    assert report.path == tmp_path / "found.csv"


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0), (0.5, 2), 3, "all", (1, 2, 3)])
def test_a_shard_that_is_none(shard: Any, watched: Any, tmp_path: Path) -> None:
    message = (
        f'`shard` should be "auto" or two integers `(i, n)` with i in [0, n), found {shard!r}.'
    )
    with expect(ConfigError, message):
        predict_to_file(watched, [], tmp_path / "found.csv", shard=shard)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"on_error": "ignore"},
        '`on_error` should be "record", "skip" or "raise", found \'ignore\'.',
    ),
    ({"duplicates": 1}, '`duplicates` should be "once" or "each", found 1.'),
    (
        {"resume": True, "overwrite": True},
        "`resume` goes on from what is there and `overwrite` begins anew. Set one of them.",
    ),
    ({"resume": 1}, "`resume` should be True or False, found 1."),
    ({"keep_journal": None}, "`keep_journal` should be True or False, found None."),
    ({"progress": "yes"}, "`progress` should be True or False, found 'yes'."),
    ({"top_k": 3}, "`top_k` should lie in [1, 2], the number of classes, found 3."),
    ({"top_k": None}, "`top_k` should be an integer of at least 1, found None."),
    (
        {"format": "xlsx"},
        "Results are written as csv, jsonl, parquet, found `format` as 'xlsx'. Give the file such "
        "an ending, or name the `format`.",
    ),
    (
        {"out": "found.txt"},
        "Results are written as csv, jsonl, parquet, found `out` as `found.txt`. Give the file "
        "such an ending, or name the `format`.",
    ),
    (
        {"images": b"bytes"},
        "`images` should be a folder, a glob pattern or an iterable of paths, found bytes.",
    ),
    (
        {"images": 3},
        "`images` should be a folder, a glob pattern or an iterable of paths, found int.",
    ),
    (
        {"images": [b"bytes"]},
        "Each of `images` should be a path, since rows need names, found bytes. `predict_many` "
        "takes pictures of every kind.",
    ),
    ({"predictor": "model"}, "`predictor` should be a Predictor, found str."),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_arguments_that_cannot_work(
    options: dict[str, Any], message: str, watched: Any, tmp_path: Path
) -> None:
    given = {"predictor": watched, "images": [], "out": "found.csv", **options}
    predictor, images, out = (given.pop(name) for name in ("predictor", "images", "out"))
    with expect(ConfigError, message):
        predict_to_file(predictor, images, tmp_path / out, **given)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_at_the_place(watched: Any, tmp_path: Path) -> None:
    out = tmp_path / "found.csv"
    missing, pattern = tmp_path / "none", tmp_path / "*.jpg"
    with expect(
        DataError, f"`{missing}` does not exist. Expected a folder, a picture or a glob pattern."
    ):
        predict_to_file(watched, missing, out)
    with expect(DataError, f"No file fits the pattern `{pattern}`."):
        predict_to_file(watched, pattern, out)
    with expect(
        OutputError,
        f"Cannot write `{missing / 'found.csv'}`: the folder `{missing}` does not exist. "
        f"Create it first.",
    ):
        predict_to_file(watched, [], missing / "found.csv")


def test_an_output_that_is_there(watched: Any, pictures: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "found.csv"
    out.write_text("old")
    message = (
        f"`{out}` is there already, and no journal to go on from. Give another name, or replace "
        f"it by `overwrite=True` (`--overwrite`)."
    )
    for resume in (False, True):
        with expect(OutputError, message):
            predict_to_file(watched, pictures, out, resume=resume)
        assert out.read_text() == "old"
        assert not (tmp_path / "found.csv.journal").exists()
    assert predict_to_file(watched, pictures, out, overwrite=True).num_predicted == 16
    assert len(read(out)) == 16


NAMES_OF_FILES = [
    b"plain.png", b"with, comma.png", b'with "quotes".png', b"with\nnewline.png",
    b"with\r\nboth.png", b"\xff\xfe no text.png", "ümlaut 蚁.png".encode(), b"=1+1.png",
    b"-x.png", b"@x.png", b"+x.png", b"\tx.png", b" space .png",
]  # fmt: skip


def test_names_of_every_kind(watched: Any, pictures: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    names = sorted(os.fsdecode(name) for name in NAMES_OF_FILES)
    for name, source in zip(names, pictures, strict=False):
        shutil.copyfile(source, folder / name)
    out = tmp_path / "found.csv"
    report = predict_to_file(watched, folder, out, root=folder)
    assert (report.num_predicted, report.num_failed) == (len(names), 0)
    rows = read(out)  # Valid UTF-8, one record for each file.
    shown = [name.encode("utf-8", "backslashreplace").decode() for name in names]
    assert [row["path"] for row in rows] == [
        f"'{name}" if name[0] in "=+-@\t\r" else name for name in shown
    ]
    predict_to_file(watched, folder, tmp_path / "found.jsonl", root=folder)
    lines = (tmp_path / "found.jsonl").read_bytes().decode().split("\n")[:-1]
    assert [json.loads(line)["path"] for line in lines] == names


def test_memory_does_not_grow_with_the_pictures(
    instant: Any, pictures: list[Path], tmp_path: Path
) -> None:
    def peak(repeats: int) -> int:
        def stream() -> Iterator[str]:
            for number in range(repeats):
                yield f"/nowhere/{number}.png"  # Distinct, but there is nothing to read.
                yield str(pictures[number % 16])

        tracemalloc.start()
        try:
            predict_to_file(instant, stream(), tmp_path / f"{repeats}.csv")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)
    buffers = 4 * 2**17  # What the threads read at once differs.
    assert peak(4000) - peak(500) < 8 * 7000 + buffers + 100_000
    assert len(read(tmp_path / "4000.csv")) == 8000


@pytest.mark.slow
def test_a_million_rows(instant: Any, tmp_path: Path) -> None:
    out = tmp_path / "found.csv"
    report = predict_to_file(instant, (f"/nowhere/{n}.png" for n in range(1_000_000)), out)
    assert report.num_images == 1_000_000
    with out.open(newline="") as file:
        rows = csv.reader(file)
        next(rows)
        assert all(row[0] == f"/nowhere/{n}.png" for n, row in enumerate(rows))
