from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from transferkit import __version__
from transferkit.cli import main
from transferkit.inference import Predictor
from transferkit.models import BackboneSpec, list_backbones, register_backbone
from transferkit.models.registry import _BACKBONES
from transferkit.testing import make_image_folder
from transferkit.training import History, Trainer
from transferkit.training.fitting import Fit

Run = Callable[..., int]


@pytest.fixture(autouse=True)
def _registered(tiny_spec: BackboneSpec) -> object:
    register_backbone("tiny", lambda: tiny_spec)
    yield
    _BACKBONES.remove("tiny")


@pytest.fixture
def train(tiny_folder: Path, tmp_path: Path) -> Run:
    def run(*words: str, out: str = "model.safetensors") -> int:
        return main(
            ["train", str(tiny_folder), "--backbone", "tiny", "--weights", "none", "--epochs", "1",
             "--out", str(tmp_path / out), "--device", "cpu", *words]
        )  # fmt: skip

    return run


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def test_train_then_predict(
    train: Run, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--history", str(tmp_path / "history.json")) == 0
    out = capsys.readouterr().out
    assert out.startswith("train 16 (8 blue, 8 red); val 8 (4 blue, 4 red)\n")
    assert out.endswith(f"Saved {tmp_path / 'model.safetensors'}\n")
    assert len(History.from_json((tmp_path / "history.json").read_text())) == 1
    picture = tiny_folder / "val" / "red" / "000.png"
    assert main(["predict", str(tmp_path / "model.safetensors"), str(picture)]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["path", "label", "probability"]
    assert re.fullmatch(rf"{re.escape(str(picture))}  (blue|red) +0\.\d{{4}}", row)


def test_train_freezes_the_backbone_unless_told(
    train: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    train()
    assert "recipe probe" in capsys.readouterr().out
    train("--freeze", "none", "--lr", "0.1", "--backbone-lr-factor", "0.5")
    assert "recipe finetune, lr 0.1 (backbone 0.05), seed 0" in capsys.readouterr().out
    train("--freeze", "backbone.conv1.*", "--freeze", "backbone.bn1.*")
    assert "Training 1,234 of 1,474 parameters" in capsys.readouterr().out


def test_json_alone_is_printed(
    train: Run, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["best_epoch"] == 1
    assert summary["class_names"] == ["blue", "red"]
    artifact = str(tmp_path / "model.safetensors")
    assert main(["predict", artifact, str(tiny_folder / "val"), "--json", "--top-k", "2"]) == 0
    predictions = json.loads(capsys.readouterr().out)
    assert len(predictions) == 8
    assert [len(each["top_k"]) for each in predictions] == [2] * 8


def test_backbones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backbones"]) == 0
    assert capsys.readouterr().out.split() == list_backbones()
    assert main(["backbones", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == list_backbones()


def test_errors_are_one_line_and_exit_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "none"
    assert main(["train", str(missing), "--out", str(tmp_path / "m.safetensors")]) == 1
    assert error_of(capsys) == (
        f"transferkit: error: The data folder `{missing}` does not exist. Expected a folder "
        f"with `ROOT/train/CLASS/*.jpg` and `ROOT/val/CLASS/*.jpg`.\n"
    )


def test_an_output_that_cannot_be_written_is_found_before_training(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *_: pytest.fail("it trained"))
    assert train(out="none/model.safetensors") == 1
    assert error_of(capsys) == (
        f"transferkit: error: Cannot write `{tmp_path / 'none' / 'model.safetensors'}`: the "
        f"folder `{tmp_path / 'none'}` does not exist. Create it first.\n"
    )


def test_a_broken_picture_leaves_no_artifact(
    train: Run, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny_folder / "train" / "red" / "000.png").write_bytes(b"no picture")
    assert train() == 1
    assert "is not a JPEG" in error_of(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_one_file_cannot_be_two_things(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--history", str(tmp_path / "model.safetensors")) == 1
    assert error_of(capsys) == (
        f"transferkit: error: --out and --history name the same file, "
        f"`{tmp_path / 'model.safetensors'}`.\n"
    )


def test_shortcuts_of_freeze_stand_alone(train: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--freeze", "backbone", "--freeze", "head.*") == 1
    assert error_of(capsys) == (
        "transferkit: error: --freeze backbone stands alone, found backbone head.*.\n"
    )


@pytest.mark.parametrize(
    "words", [[], ["train"], ["nonsense"], ["train", "x", "--workers", "many"]]
)
def test_wrong_usage_exits_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2
    assert "usage: transferkit" in error_of(capsys)


def test_ctrl_c_before_training_exits_with_130(
    train: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", interrupt)
    assert train() == 130
    assert error_of(capsys) == "transferkit: interrupted\n"


@pytest.mark.parametrize("completed", [0, 1])
def test_ctrl_c_in_training_saves_what_there_is(
    train: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    completed: int,
) -> None:
    run = Fit._run_epoch

    def interrupted(self: Fit, epoch: int, *rest: object) -> object:
        if epoch > completed:
            raise KeyboardInterrupt
        return run(self, epoch, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Fit, "_run_epoch", interrupted)
    assert train("--epochs", "3") == 130
    assert (tmp_path / "model.safetensors").exists() is bool(completed)
    if not completed:
        assert error_of(capsys) == (
            "transferkit: interrupted before the first epoch ended; nothing is saved\n"
        )


def test_output_that_cannot_be_written() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    command = f"{sys.executable} -m transferkit backbones > /dev/full"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == (
        "transferkit: error: cannot write the output: [Errno 28] No space left on device\n"
    )


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"transferkit {__version__}\n"


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m transferkit backbones | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert result.stdout == "alexnet\n"
    assert "Traceback" not in result.stderr


def test_installed_command_trains_from_another_folder(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "data")
    command = [
        sys.executable, "-m", "transferkit", "train", "data", "--backbone", "squeezenet1_1",
        "--weights", "none", "--epochs", "1", "--device", "cpu",
    ]  # fmt: skip
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    predictor = Predictor.load(tmp_path / "model.safetensors", device="cpu")
    assert predictor.class_names == ("blue", "red")
