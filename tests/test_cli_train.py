"""What `transferkit train` reads, and how it loads."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from transferkit.cli import main
from transferkit.models import BackboneSpec, register_backbone
from transferkit.models.registry import _BACKBONES

Run = Callable[..., int]


@pytest.fixture(autouse=True)
def _registered(tiny_spec: BackboneSpec) -> object:
    register_backbone("tiny", lambda: tiny_spec)
    yield
    _BACKBONES.remove("tiny")


@pytest.fixture
def train(tmp_path: Path) -> Run:
    def run(data: Path, *words: str) -> int:
        return main(
            ["train", str(data), "--backbone", "tiny", "--weights", "none", "--epochs", "1",
             "--out", str(tmp_path / "m.safetensors"), "--device", "cpu", *words]
        )  # fmt: skip

    return run


def test_one_folder_is_split(
    train: Run, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny_folder / "train", "--val-share", "0.25") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "train 12 (6 blue, 6 red); val 4 (2 blue, 2 red)"


@pytest.mark.parametrize("has_splits", [True, False])
def test_table_is_read(
    train: Run, tiny_folder: Path, capsys: pytest.CaptureFixture[str], has_splits: bool
) -> None:
    table = tiny_folder / "table.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", *(["split"] if has_splits else [])])
        for path in sorted(tiny_folder.rglob("*.png")):
            split, label, _ = path.relative_to(tiny_folder).parts
            row = [path.relative_to(tiny_folder), label, *([split] if has_splits else [])]
            writer.writerow(row)
    assert train(table, *([] if has_splits else ["--val-share", "0.5"])) == 0
    first = capsys.readouterr().out.splitlines()[0]
    expected = (
        "train 16 (8 blue, 8 red); val 8 (4 blue, 4 red)"
        if has_splits
        else "train 12 (6 blue, 6 red); val 12 (6 blue, 6 red)"
    )
    assert first == expected


def test_how_to_load_reaches_the_fit(
    train: Run, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in sorted(tiny_folder.glob("*/red/000.png")):
        path.write_bytes(b"no picture")
    words = ["--augmentation", "light", "--batch-augmentation", "mixup", "--balance", "sampler"]
    # One of 16 is more than the share that may be skipped.
    assert train(tiny_folder, "--on-error", "skip", "--json", *words) == 1
    assert "pictures cannot be read, more than the share of 0.05" in capsys.readouterr().err
    for path in sorted(tiny_folder.glob("*/red/000.png")):
        path.unlink()
    assert train(tiny_folder, "--workers", "1", "--json", *words) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    found = [settings[key] for key in ("augmentation", "batch_augmentation", "balance")]
    assert found == ["light", "mixup", "sampler"]
