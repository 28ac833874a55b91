from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from transferkit.cli import main
from transferkit.data import check_folder
from transferkit.testing import make_image_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_image_folder(tmp_path / "data", num_train=10, num_val=2)


def test_good_folder_exits_with_0(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(root), "--strict"]) == 0
    assert capsys.readouterr().out == check_folder(root).describe() + "\n"


def test_errors_exit_with_1(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "train" / "red" / "000.png").write_bytes(b"no picture")
    assert main(["check", str(root), "--json", "--workers", "2"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"][0]["kind"] == "broken"


def test_warnings_exit_with_1_where_that_was_asked(root: Path) -> None:
    (root / "train" / "red" / "list.txt").write_text("red")
    assert main(["check", str(root)]) == 0
    assert main(["check", str(root), "--strict"]) == 1


def test_picture_is_drawn(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "findings.png"
    assert main(["check", str(root), "--picture", str(path)]) == 0
    assert capsys.readouterr().err == (
        "transferkit: no finding is about a file; no picture is drawn\n"
    )
    assert not path.exists()
    (root / "train" / "red" / "000.png").write_bytes(b"no picture")
    assert main(["check", str(root), "--picture", str(path)]) == 1
    with Image.open(path) as image:
        assert image.format == "PNG"


def test_place_of_the_picture_is_checked_first(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "no" / "findings.png"
    assert main(["check", str(root), "--picture", str(place)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"transferkit: error: Cannot write `{place}`: the folder `{place.parent}` does not exist. "
        f"Create it first.\n"
    )


def test_names_of_splits_and_distance_reach_the_check(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "train").rename(root / "a")
    (root / "val").rename(root / "b")
    assert main(["check", str(root), "--train", "a", "--val", "b", "--near-distance", "0"]) == 0
    assert "\n  a: 20 (10 blue, 10 red)\n  b: 4 (2 blue, 2 red)\n" in capsys.readouterr().out
    assert main(["check", str(root), "--near-distance", "99"]) == 1


def test_check_does_not_load_matplotlib(root: Path) -> None:
    code = (
        "import sys; from transferkit.cli import main; main(['check', sys.argv[1]]);"
        "sys.exit('matplotlib' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(root)], check=True, capture_output=True)
