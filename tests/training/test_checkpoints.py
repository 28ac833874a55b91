"""Where checkpoints lie, which of them stay, and what is said of those that are no good."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from transferkit import _files
from transferkit.data import load_folders
from transferkit.errors import CheckpointError, ConfigError, OutputError
from transferkit.evaluation import evaluate_model
from transferkit.testing import make_image_folder
from transferkit.training import Callback, Checkpoints, Phase, Trainer
from transferkit.training.checkpoints import list_checkpoints, read_checkpoint, read_newest

Make = Callable[..., Trainer]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "fit"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class AccuracyOf(Callback):
    """Make the epochs of a fit end with these validation accuracies."""

    def __init__(self, trainer: Trainer, values: list[float], monkeypatch: Any) -> None:
        evaluate = evaluate_model
        left = iter(values)

        def evaluated(*arguments: Any, **options: Any) -> Any:
            found = evaluate(*arguments, **options)
            object.__setattr__(found, "accuracy", next(left))
            return found

        monkeypatch.setattr("transferkit.training.fitting.evaluate_model", evaluated)


def test_the_newest_and_the_best_stay(
    make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(checkpoints=Checkpoints(folder=folder, keep_last=2))
    AccuracyOf(trainer, [0.1, 0.9, 0.2, 0.3, 0.4], monkeypatch)
    trainer.fit(5)
    assert names(folder) == [
        "epoch-000003-batch-00000000.safetensors",  # After epoch 2, the best.
        "epoch-000005-batch-00000000.safetensors",
        "epoch-000006-batch-00000000.safetensors",
    ]
    assert read_checkpoint(folder / names(folder)[0]).data["best_checkpoint"] == names(folder)[0]


def test_the_best_need_not_stay(make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(checkpoints=Checkpoints(folder=folder, keep_last=1, keep_best=False))
    AccuracyOf(trainer, [0.9, 0.1, 0.2], monkeypatch)
    trainer.fit(3)
    assert names(folder) == ["epoch-000004-batch-00000000.safetensors"]


def test_how_often(make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every_other: dict[str, Any] = {"every_epochs": 2, "keep_last": 99}
    make(checkpoints=Checkpoints(folder=folder, keep_best=False, **every_other)).fit(5)
    assert [name[6:12] for name in names(folder)] == ["000003", "000005", "000006"]
    shutil.rmtree(folder)
    # The best epoch so far is kept where it would not be its turn.
    trainer = make(checkpoints=Checkpoints(folder=folder, **every_other))
    AccuracyOf(trainer, [0.9, 0.1, 0.2, 0.1, 0.3], monkeypatch)
    trainer.fit(5)
    assert [name[6:12] for name in names(folder)] == ["000002", "000003", "000005", "000006"]
    AccuracyOf(trainer, [0.5], monkeypatch)
    other = make(checkpoints=Checkpoints(folder=folder.parent / "o", every_steps=3, keep_last=99))
    other.fit(1)
    assert [name[13:28] for name in names(folder.parent / "o")] == [
        "batch-00000003.",
        "batch-00000000.",
    ]


def test_the_end_of_a_phase_is_kept_always(make: Make, folder: Path) -> None:
    trainer = make(
        checkpoints=Checkpoints(folder=folder, every_epochs=9, keep_last=99, keep_best=False)
    )
    trainer.fit(phases=[Phase("head", 1, freeze="backbone"), Phase("all", 1, unfreeze="all")])
    assert [name[6:12] for name in names(folder)] == ["000002", "000003"]


def test_a_fit_that_is_over_is_not_run_again(make: Make, folder: Path) -> None:
    first = make(checkpoints=folder)
    history = first.fit(2)
    second = make(checkpoints=folder)
    again = second.fit(2, resume="auto")
    assert [vars(each) for each in again.records] == [vars(each) for each in history.records]
    assert again.status == "completed"
    for name, value in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value)


def test_checkpoints_are_data_and_leave_out_what_is_frozen(make: Make, folder: Path) -> None:
    trainer = make(checkpoints=folder, freeze="backbone")
    trainer.fit(1)
    checkpoint = read_newest(folder)
    assert checkpoint is not None
    parameters = {name for name, _ in trainer.model.named_parameters()}
    kept = {name.removeprefix("model.") for name in checkpoint.tensors} & parameters
    assert kept == {"head.weight", "head.bias"}


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(make: Make, folder: Path) -> None:
    make(checkpoints=folder).fit(2)
    older, newest = list_checkpoints(folder)[-2:]
    newest.write_bytes(newest.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="goes on from") as caught:
        checkpoint = read_newest(folder)
    assert checkpoint is not None
    assert checkpoint.path == older
    (warning,) = caught
    assert re.fullmatch(
        rf"Cannot read the checkpoint `{re.escape(str(newest))}`: it is no safetensors file, or is "
        rf"truncated or damaged \(.*\)\. The fit goes on from the one before, `{older.name}`\.",
        str(warning.message),
    )


def test_a_flipped_bit_is_found(make: Make, folder: Path) -> None:
    make(checkpoints=folder).fit(1)
    (path,) = list_checkpoints(folder)[-1:]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    message = (
        f"The checkpoint `{path}` is damaged: its content does not match its digest. Copy it anew "
        f"from where it came."
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        read_checkpoint(path)


def test_no_good_checkpoint_is_an_error(make: Make, folder: Path) -> None:
    make(checkpoints=Checkpoints(folder=folder, keep_last=1, keep_best=False)).fit(1)
    (path,) = list_checkpoints(folder)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        make(checkpoints=folder).fit(1, resume="auto")
    assert str(error.value).startswith(
        f"None of the 1 checkpoints in `{folder}` can be read. The newest: Cannot read the "
        f"checkpoint `{path}`: it is no safetensors file, or is truncated or damaged ("
    )
    assert str(error.value).endswith("To train from the start, remove them or name another folder.")


def test_an_artifact_is_no_checkpoint(make: Make, tmp_path: Path) -> None:
    trainer = make()
    trainer.fit(1)
    path = trainer.save(tmp_path / "model.safetensors")
    message = (
        f"`{path}` is a safetensors file but no transferkit checkpoint: its metadata has no "
        f"`transferkit_checkpoint`. Expected a file written by `Trainer.fit`."
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        trainer.fit(1, resume=path)


def test_a_new_fit_does_not_replace_an_older_one(make: Make, folder: Path) -> None:
    make(checkpoints=folder).fit(1)
    count = len(list_checkpoints(folder))
    message = (
        f"The folder `{folder}` holds {count} checkpoints of a fit already, and a new fit would "
        f'replace them. Go on from them with resume="auto", remove them, or name another folder.'
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(checkpoints=folder).fit(1)


def test_resume_needs_a_folder_and_a_checkpoint(make: Make, folder: Path) -> None:
    message = (
        "resume='auto' needs a folder with checkpoints. Name one: "
        'Trainer(..., checkpoints="runs/ants").'
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make().fit(1, resume="auto")
    message = (
        f'resume=True, and there is no checkpoint in `{folder}`. Pass resume="auto" to start '
        f"where there is none."
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        make(checkpoints=folder).fit(1, resume=True)
    message = '`resume` should be "auto", True, False or the path of a checkpoint, found 3.'
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(checkpoints=folder).fit(1, resume=3)  # type: ignore[arg-type]


def test_a_path_goes_on_from_that_checkpoint(make: Make, folder: Path) -> None:
    trainer = make(checkpoints=Checkpoints(folder=folder, keep_last=9))
    trainer.fit(3)
    other = make()
    history = other.fit(3, resume=list_checkpoints(folder)[0])
    assert [each.train_loss for each in history] == [each.train_loss for each in trainer.history]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"every_epochs": 0}, "`every_epochs` should be an integer of at least 1, found 0."),
        ({"every_steps": 0}, "`every_steps` should be an integer of at least 1, found 0."),
        ({"keep_last": 0}, "`keep_last` should be an integer of at least 1, found 0."),
        ({"keep_best": 1}, "`keep_best` should be True or False, found 1."),
    ],
)
def test_settings_that_cannot_work(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        Checkpoints(folder="x", **values)


def test_what_is_no_folder(make: Make) -> None:
    message = "`checkpoints` should be a folder or Checkpoints(...), found int."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(checkpoints=3)


END = "To train anew, name another folder for `checkpoints`."


def resumed_with(make: Make, folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        make(checkpoints=folder, **options).fit(2, resume="auto")
    text = str(error.value)
    start = f"The checkpoint `{list_checkpoints(folder)[-1]}` is of another fit: "
    assert text.startswith(start)
    assert text.endswith(END)
    return text.removeprefix(start).removesuffix(END).strip()


def test_another_setting_is_an_error(make: Make, folder: Path) -> None:
    make(checkpoints=folder).fit(2)
    assert resumed_with(make, folder, batch_size=8) == "`batch_size` was 4, and is 8 now."
    assert resumed_with(make, folder, seed=1) == "`seed` was 0, and is 1 now."
    assert resumed_with(make, folder, clip_norm=1.0) == "`clip_norm` was None, and is 1.0 now."


def test_changed_pictures_are_an_error(make: Make, folder: Path, tmp_path: Path) -> None:
    pictures = make_image_folder(tmp_path / "pictures")
    make(checkpoints=folder, data=load_folders(pictures)).fit(2)
    moved = tmp_path / "moved"
    shutil.move(pictures, moved)
    make(checkpoints=folder, data=load_folders(moved)).fit(2, resume="auto")  # A folder may move.
    next((moved / "val" / "red").iterdir()).unlink()
    assert resumed_with(make, folder, data=load_folders(moved)) == (
        "the pictures of the val split changed since (their names, sizes, order or classes)."
    )


def test_other_classes_are_an_error(make: Make, folder: Path, tmp_path: Path) -> None:
    make(checkpoints=folder).fit(2)
    pictures = make_image_folder(tmp_path / "pictures")
    for split in ("train", "val"):
        (pictures / split / "red").rename(pictures / split / "green")
    assert resumed_with(make, folder, data=load_folders(pictures)) == (
        "its classes are ['blue', 'red'], those of the data are ['blue', 'green']."
    )


def test_other_frozen_weights_are_an_error(make: Make, folder: Path) -> None:
    make(checkpoints=folder, freeze="backbone").fit(2)

    def make_other(**options: Any) -> Trainer:
        trainer = make(**options)
        with torch.no_grad():
            next(trainer.model.backbone.parameters()).add_(1)
        return trainer

    assert resumed_with(make_other, folder, freeze="backbone") == (
        "the weights that do not train, which it does not hold, are others. Build the model from "
        "the same weights."
    )


class _Fault(BaseException):
    pass


@pytest.mark.parametrize("point", _files.WRITE_POINTS)
def test_a_fault_at_each_point_of_a_write_leaves_a_whole_checkpoint(
    make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    torch.manual_seed(0)
    whole = make()
    initial = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.fit(3)
    trainer = make(checkpoints=Checkpoints(folder=folder, keep_last=1, keep_best=False))
    trainer.model.load_state_dict(initial)
    seen: list[str] = []

    def fault(passed: str) -> None:
        seen.append(passed)
        if seen.count(point) == 2:
            raise _Fault

    with monkeypatch.context() as patch:
        patch.setattr(_files, "_pass", fault)
        with pytest.raises(_Fault):
            trainer.fit(3)
    assert not list(folder.glob(f"{_files.TEMPORARY_PREFIX}*"))
    checkpoint = read_newest(folder)
    assert checkpoint is not None
    assert checkpoint.data["parts"]["progress"]["place"][0] in (2, 3)
    second = make(checkpoints=folder)
    second.model.load_state_dict(initial)
    second.fit(3, resume="auto")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value)


def test_a_full_disk_loses_nothing(
    make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(checkpoints=folder)
    calls: list[str] = []

    def full(point: str) -> None:
        calls.append(point)
        if calls.count("written") == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files, "_pass", full)
    with pytest.raises(OutputError) as error:
        trainer.fit(3)
    path = folder / "epoch-000003-batch-00000000.safetensors"
    assert str(error.value) == (
        f"Cannot write `{path}`: no space left on device. Choose a place that you may write to and "
        f"that has room."
    )
    assert names(folder) == ["epoch-000002-batch-00000000.safetensors"]
    assert read_newest(folder) is not None
    assert trainer.history.status == "failed"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_the_right_to_write(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "readonly"
    folder.mkdir(mode=0o500)
    with pytest.raises(OutputError, match=r"^Cannot write into the folder"):
        make(checkpoints=folder).fit(1)


def test_what_a_killed_write_has_left_is_removed(make: Make, folder: Path) -> None:
    make(checkpoints=folder).fit(1)
    (folder / f"{_files.TEMPORARY_PREFIX}abc").write_bytes(b"half")
    make(checkpoints=folder).fit(1, resume="auto")
    assert not list(folder.glob(f"{_files.TEMPORARY_PREFIX}*"))


def test_a_folder_that_cannot_be_made(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError) as error:
        make(checkpoints=tmp_path / "file").fit(1)
    assert str(error.value) == (
        f"Cannot write into the folder `{tmp_path / 'file'}`: file exists. Choose a folder that "
        f"exists or can be created and that you may write to."
    )
