"""What `transferkit train` reads, and how it loads."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transferkit.artifacts import load_artifact
from transferkit.cli import main
from transferkit.models import BackboneSpec, register_backbone
from transferkit.models.registry import _BACKBONES
from transferkit.training.fitting import Fit

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


def test_plan_is_printed_and_nothing_is_done(
    train: Run, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny_folder, "--recipe", "probe_then_finetune", "--epochs", "4", "--plan") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")][2:] == [
        "probe: epochs 1 to 2",
        "finetune: epochs 3 to 4",
        "execution: channels_last (too short to measure)",
    ]
    assert not (tmp_path / "m.safetensors").exists()


def test_plan_as_json(train: Run, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tiny_folder, "--plan", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert [phase["name"] for phase in plan["phases"]] == ["probe"]


def test_a_learning_rate_is_found_and_nothing_else_is_done(
    train: Run, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "found.png"
    assert train(tiny_folder, "--lr-find", "--plot", str(plot)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].startswith("probe: ")
    assert lines[-1].startswith("  suggestion  ")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "m.safetensors").exists()


def test_a_learning_rate_as_json(
    train: Run, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny_folder, "--lr-find", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["phase"], len(found["lrs"])) == ("probe", len(found["losses"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--plot", "found.png"],
            "--plot draws what --lr-find found, and would be ignored without it.",
        ),
        (
            ["--lr-find", "--plot", "found.txt"],
            "--plot writes .png or .svg or .pdf, found `found.txt`. Give the file such an ending.",
        ),
        (
            ["--lr-find", "--plot", "none/found.png"],
            "Cannot write `none/found.png`: the folder `none` does not exist. Create it first.",
        ),
    ],
)
def test_plots_that_cannot_be(
    words: list[str],
    message: str,
    train: Run,
    tiny_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(tiny_folder, *words) == 1
    assert capsys.readouterr().err == f"transferkit: error: {message}\n"


def test_two_looks_at_once(
    train: Run, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train(tiny_folder, "--lr-find", "--plan")
    assert "--plan: not allowed with argument --lr-find" in capsys.readouterr().err


def settings_of(tmp_path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = load_artifact(tmp_path / "m.safetensors").history["settings"]  # type: ignore[index]
    return settings


def test_options_of_head_and_regularizers_reach_the_trainer(
    train: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    words = [
        "--freeze", "none", "--head", "cosine", "--dropout", "0.2", "--head-start", "ridge",
        "--label-smoothing", "0.1", "--l2-sp", "0.01", "--ema", "0.9", "--wise-ft",
        "--stage-lr-factor", "0.5", "--bn", "fixed",
    ]  # fmt: skip
    assert train(tiny_folder, *words) == 0
    settings = settings_of(tmp_path)
    assert settings["head"]["kind"] == "cosine"
    assert settings["head"]["dropout"] == 0.2
    assert settings["head_start"]["start"] == "ridge"
    assert settings["label_smoothing"] == 0.1
    assert settings["l2_sp"] == 0.01
    assert settings["average"] == {"name": "ema", "decay": 0.9}
    assert settings["wise_ft_result"]["factor"] in [number / 10 for number in range(11)]
    assert settings["stage_lr_factor"] == 0.5


def test_options_of_the_cache_reach_the_trainer(
    train: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "features"
    words = ["--views", "2", "--engine", "pytorch", "--feature-precision", "float32"]
    assert train(tiny_folder, *words, "--feature-folder", str(folder), "--epochs", "3") == 0
    features = settings_of(tmp_path)["features"]["probe"]
    assert (features["views"], features["cached"]) == (2, True)
    assert len(list(folder.iterdir())) == 3


def test_fine_tuning_freezes_nothing_unasked(train: Run, tiny_folder: Path, tmp_path: Path) -> None:
    assert train(tiny_folder, "--recipe", "finetune") == 0
    assert settings_of(tmp_path)["freeze_plan"]["patterns"] == []
    assert train(tiny_folder, "--recipe", "tutorial") == 0
    assert settings_of(tmp_path)["freeze_plan"]["patterns"] == ["backbone.*"]


def test_recipe_and_freeze_that_contradict_each_other(
    train: Run, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny_folder, "--recipe", "probe", "--freeze", "none") == 1
    assert capsys.readouterr().err.endswith(
        "transferkit: error: --recipe probe freezes the backbone, --freeze none does not.\n"
    )


def test_views_by_the_epoch_and_no_cache(train: Run, tiny_folder: Path, tmp_path: Path) -> None:
    assert train(tiny_folder, "--views", "epochs") == 0
    assert settings_of(tmp_path)["features"]["probe"]["views"] == "epochs"
    assert train(tiny_folder, "--cache", "off") == 0
    assert settings_of(tmp_path)["features"]["probe"]["cached"] is False


def test_swa_and_solver(train: Run, tiny_folder: Path, tmp_path: Path) -> None:
    assert train(tiny_folder, "--swa", "0.25", "--epochs", "2") == 0
    assert settings_of(tmp_path)["average"] == {"name": "swa", "start": 0.25}
    assert train(tiny_folder, "--solver", "lbfgs") == 0
    assert settings_of(tmp_path)["solver"] == "lbfgs"


def test_options_that_would_be_ignored_are_an_error(
    train: Run, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny_folder, "--cache", "off", "--feature-folder", "x") == 1
    message = "transferkit: error: --cache off would ignore --feature-folder. Leave one out.\n"
    assert capsys.readouterr().err == message


def test_a_fit_that_was_cut_off_goes_on(
    train: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--checkpoints", str(tmp_path / "fit"), "--checkpoint-steps", "2", "--epochs", "3"]

    class Cut(BaseException):
        pass

    save = Fit._save
    left = [3]

    def cut(self: Fit, **options: bool) -> None:
        save(self, **options)
        left[0] -= 1
        if not left[0]:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "_save", cut)
        with pytest.raises(Cut):
            train(tiny_folder, *words)
    assert train(tiny_folder, *words, "--resume") == 0
    assert len(load_artifact(tmp_path / "m.safetensors").history["records"]) == 3  # type: ignore[index]


def test_a_new_fit_in_a_used_folder_is_an_error(
    train: Run, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoints", str(tmp_path / "fit"), "--epochs", "1"]
    assert train(tiny_folder, *words) == 0
    assert train(tiny_folder, *words) == 1
    assert "holds 1 checkpoints of a fit already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume"], "--resume needs the folder of the checkpoints: --checkpoints DIR."),
        (
            ["--checkpoint-steps", "3"],
            "--checkpoint-steps needs a folder for them: --checkpoints DIR.",
        ),
    ],
)
def test_options_of_checkpoints_need_a_folder(
    train: Run,
    tiny_folder: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    assert train(tiny_folder, *words) == 1
    assert capsys.readouterr().err == f"transferkit: error: {message}\n"


def test_options_of_updates_reach_the_trainer(
    train: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    words = ["--accumulate", "2", "--clip-norm", "0.5", "--nan-policy", "3", "--precision", "auto"]
    assert train(tiny_folder, *words, "--batch-size", "auto") == 0
    settings = settings_of(tmp_path)
    assert (settings["accumulate"], settings["clip_norm"], settings["nan_policy"]) == (2, 0.5, 3)
    assert settings["precision"] in ("float32", "bfloat16")
