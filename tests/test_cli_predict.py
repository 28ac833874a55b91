"""What `transferkit predict` prints, writes and returns."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from transferkit.artifacts import save_artifact
from transferkit.cli import main
from transferkit.cli import predict as command
from transferkit.cli.predict_table import Table
from transferkit.inference import Predictor, predict_to_file
from transferkit.models import BackboneSpec, build_model, register_backbone
from transferkit.models.registry import _BACKBONES

Run = Callable[..., int]


@pytest.fixture(autouse=True)
def _registered(tiny_spec: BackboneSpec) -> object:
    register_backbone("tiny", lambda: tiny_spec)
    yield
    _BACKBONES.remove("tiny")


@pytest.fixture
def artifact(tiny_spec: BackboneSpec, tmp_path: Path) -> Path:
    model = build_model(tiny_spec, 2, weights=None, seed=3)
    return save_artifact(tmp_path / "model.safetensors", model, class_names=("ants", "=bees"))


@pytest.fixture
def predict(artifact: Path) -> Run:
    def run(*words: object) -> int:
        return main(
            ["predict", str(artifact), *(str(word) for word in words), "--engine", "pytorch"]
        )

    return run


@pytest.fixture
def folder(tiny_folder: Path) -> Path:
    """A folder of four good pictures and a damaged one."""
    folder = tiny_folder / "val" / "red"
    (folder / "002x.png").write_bytes((folder / "002.png").read_bytes()[:50])
    return folder


def printed(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out.splitlines(), captured.err


def test_a_table(
    predict: Run,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder.parent)  # The whole paths may be too long for a column.
    folder = Path(folder.name)
    assert predict(folder) == 3
    lines, err = printed(capsys)
    assert err == "transferkit: 1 of 5 pictures could not be read\n"
    width = len(str(folder / "002x.png"))
    assert lines[0] == f"{'path'.ljust(width)}  label  probability"
    assert len(lines) == 6
    for line, name in zip(lines[1:], ["000", "001", "002", "002x", "003"], strict=True):
        path = str(folder / f"{name}.png")
        if name == "002x":
            assert line == (
                f"{path}  Cannot read the picture `{path}`: the file is damaged or truncated. "
                f"Replace or remove it."
            )
        else:
            assert re.fullmatch(rf"{re.escape(path)}   (ants |=bees)  0\.\d{{4}}", line)


def test_a_table_of_two_classes(
    predict: Run,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)  # The whole path may be too long for a column.
    assert predict("000.png", "--top-k", "2") == 0
    (header, row), _ = printed(capsys)
    assert header.split() == ["path", "label", "probability", "label_2", "probability_2"]
    assert sorted(row.split()[1::2]) == ["=bees", "ants"]
    assert header.index("label_2") == row.index(row.split()[3])


def test_names_stay_on_one_line() -> None:
    table = Table(["a\nb\x1b[2J.jpg", "c.jpg"], ["an\tts"], 1)
    row = {"path": "a\nb\x1b[2J.jpg", "top_k": [{"label": "an\tts", "probability": 1.0}]}
    assert table.row({**row, "abstains": False}) == r"a\nb\x1b[2J.jpg  an\tts  1.0000"
    assert table.row({"path": "c.jpg", "error": "no\npicture"}) == r"c.jpg            no\npicture"


def test_a_long_path_shifts_its_row_alone() -> None:
    table = Table(["a" * 81, "b"], ["x"], 1)
    row = {"top_k": [{"label": "x", "probability": 0.5}], "abstains": False}
    assert table.row({"path": "b", **row}) == "b     x      0.5000"
    assert table.row({"path": "a" * 81, **row}) == f"{'a' * 81}  x      0.5000"


def test_json(predict: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(folder, "--json", "--quiet") == 3
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads(captured.out)
    assert [Path(each["path"]).stem for each in found] == ["000", "001", "002", "002x", "003"]
    assert ["error" in each for each in found] == [False, False, False, True, False]
    assert found[0]["label"] in ("ants", "=bees")


def test_pictures_that_cannot_be_read(
    predict: Run, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "none.png"
    reason = f"Cannot read the picture `{missing}`: no such file or directory."
    assert predict(missing) == 3
    assert printed(capsys)[0][1] == f"{missing}  {reason}"
    assert predict(missing, "--on-error", "raise") == 1
    assert printed(capsys)[1] == f"transferkit: error: {reason}\n"
    assert predict(folder, missing, "--on-error", "skip") == 0
    lines, err = printed(capsys)
    assert len(lines) == 5
    assert err == "transferkit: 2 of 6 pictures could not be read\n"


def test_patterns_and_folders(
    predict: Run, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(tiny_folder / "val" / "*" / "000.png", tiny_folder / "val" / "red") == 0
    lines, _ = printed(capsys)
    assert [line.split()[0] for line in lines[1:]] == [
        str(tiny_folder / "val" / name)
        for name in (
            "blue/000.png", "red/000.png", "red/000.png", "red/001.png", "red/002.png",
            "red/003.png",
        )
    ]  # fmt: skip
    assert predict(tiny_folder / "*.jpg") == 1
    assert printed(capsys)[1] == (
        f"transferkit: error: No file fits the pattern `{tiny_folder / '*.jpg'}`.\n"
    )


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_file(
    suffix: str,
    predict: Run,
    artifact: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / f"found.{suffix}"
    assert predict(folder, "--out", out, "--top-k", "2") == 3
    (line,), err = printed(capsys)
    assert re.fullmatch(
        rf"Saved 5 pictures in {re.escape(str(out))} \(4 predicted, 1 not readable\), by pytorch "
        rf"in fp32 in \d+\.\d s",
        line,
    )
    assert err == "transferkit: 1 of 5 pictures could not be read\n"
    predictor = Predictor.load(artifact, device="cpu", engine="pytorch")
    predict_to_file(predictor, folder, tmp_path / f"same.{suffix}", top_k=2)
    assert out.read_bytes() == (tmp_path / f"same.{suffix}").read_bytes()
    assert predict(folder, "--out", out) == 1
    assert printed(capsys)[1] == (
        f"transferkit: error: `{out}` is there already, and no journal to go on from. Give "
        f"another name, or replace it by `overwrite=True` (`--overwrite`).\n"
    )
    assert predict(folder, "--out", out, "--overwrite", "--on-error", "skip", "--quiet") == 0
    assert printed(capsys) == ([], "")


def test_the_report_as_json(
    predict: Run, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.txt"
    assert predict(folder, "--out", out, "--format", "jsonl", "--json") == 3
    report = json.loads(capsys.readouterr().out)
    assert report.pop("seconds") > 0
    assert report == {
        "path": str(out), "num_images": 5, "num_predicted": 4, "num_duplicates": 0,
        "num_resumed": 0, "num_failed": 1, "engine": "pytorch", "precision": "fp32",
    }  # fmt: skip
    assert len(out.read_text().splitlines()) == 5


def test_interrupted_and_gone_on_with(
    predict: Run,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "found.csv"
    predict_many = Predictor.predict_many

    def interrupt(self: Predictor, *arguments: Any, **options: Any) -> Iterator[Any]:
        def stream() -> Iterator[Any]:
            for number, found in enumerate(predict_many(self, *arguments, **options)):
                if number == 3:
                    raise KeyboardInterrupt
                yield found

        return stream()

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "predict_many", interrupt)
        assert predict(tiny_folder / "val", "--out", out) == 130
    assert printed(capsys) == (
        [],
        "transferkit: interrupted; what was done is kept, and the same command with --resume goes "
        "on\n",
    )
    assert predict(tiny_folder / "val", "--out", out) == 1
    assert "--resume" in printed(capsys)[1]
    assert predict(tiny_folder / "val", "--out", out, "--resume") == 0
    assert "(5 predicted, 3 done before)" in printed(capsys)[0][0]
    assert len(out.read_text().splitlines()) == 9


@pytest.mark.parametrize("option", ["--format=csv", "--resume", "--overwrite"])
def test_options_for_a_file_need_one(
    option: str, predict: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(folder, option) == 1
    name = option.split("=")[0]
    assert printed(capsys)[1] == (
        f"transferkit: error: {name} needs the file that it is about: --out FILE.\n"
    )


def test_resume_or_overwrite(
    predict: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        predict(folder, "--out", "a.csv", "--resume", "--overwrite")
    assert "not allowed with argument --resume" in capsys.readouterr().err


def test_each_process_under_torchrun_has_its_shard(
    predict: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    names = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert predict(tiny_folder / "val", "--out", tmp_path / "found.jsonl") == 0
        lines = (tmp_path / f"found-0000{rank}-of-00002.jsonl").read_text().splitlines()
        names += [json.loads(line)["path"] for line in lines]
    assert len(names) == 8
    assert sorted(names) == sorted(str(path) for path in (tiny_folder / "val").rglob("*.png"))


def test_each_process_has_an_accelerator_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert command._device("auto") == "auto"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert command._device("cpu") == "cpu"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert command._device("auto") == "auto"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert command._device("auto") == "cuda:1"


@pytest.mark.parametrize("argument", ["--engine=tensorrt", "--precision=int8", "--tta=rotate"])
def test_choices(argument: str, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["predict", str(artifact), "a.png", argument])
    assert "invalid choice" in capsys.readouterr().err


def test_options_reach_the_predictor(
    predict: Run, folder: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SeenError(Exception):
        pass

    seen: dict[str, Any] = {}

    def load(path: Path, **options: Any) -> None:
        seen.update(options)
        raise SeenError

    monkeypatch.setattr(Predictor, "load", load)
    words = ["--precision", "bf16", "--tta", "flip", "--threshold", "0.8", "--device", "cpu"]
    words += ["--temperature", "1.5"]
    with pytest.raises(SeenError):
        predict(folder, *words)
    assert seen == {
        "device": "cpu", "engine": "pytorch", "precision": "bf16", "tta": "flip", "threshold": 0.8,
        "temperature": 1.5,
    }  # fmt: skip


PROGRAM = """
import sys
from transferkit.cli import main
try:
    main(["predict", "--help"])
except SystemExit:
    sys.exit("torch" in sys.modules)
"""


def test_help_is_quick() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "--resume" in result.stdout
