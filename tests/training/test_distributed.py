"""Two processes under torchrun give what one gives, and fail, stop and go on together."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from transferkit.errors import ConfigError
from transferkit.testing import make_image_folder
from transferkit.training.checkpoints import list_checkpoints
from transferkit.training.distributed import World, find_world

PROGRAM = Path(__file__).with_name("distributed_program.py")


class Runner:
    """Run the program in folders of its own, on pictures that all runs share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # 15 pictures in batches of 4, and 7: no number that two processes can share evenly.
        self.data = make_image_folder(folder / "data", num_train=8, num_val=4)
        for split in ("train", "val"):
            min((self.data / split / "red").iterdir()).unlink()

    def run(
        self,
        name: str,
        *,
        processes: int,
        code: int = 0,
        arguments: tuple[str, ...] = (),
        **told: Any,
    ) -> Path:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        options: dict[str, Any] = {
            "data": str(self.data),
            "model": {},
            "trainer": {},
            "epochs": 2,
        } | told
        options["trainer"] = {"batch_size": 4, "lr": 0.05} | options["trainer"]
        (folder / "options.json").write_text(json.dumps(options))
        launcher = [
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
            *arguments,
        ]  # fmt: skip
        command = [sys.executable, *(launcher if processes > 1 else []), str(PROGRAM)]
        result = subprocess.run(
            [*command, str(folder / "options.json")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert (result.returncode == 0) == (code == 0), result.stderr
        return folder


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("distributed"))


def history_of(folder: Path, rank: int = 0) -> dict[str, Any]:
    history: dict[str, Any] = json.loads((folder / f"history{rank}.json").read_text())
    return history


def assert_close(found: Path, expected: Path) -> None:
    for one, other in zip(
        history_of(found)["records"], history_of(expected)["records"], strict=True
    ):
        for key in ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "lr"):
            assert one[key] == pytest.approx(other[key], abs=1e-5), key
    weights = load_file(expected / "weights0.safetensors")
    for name, value in load_file(found / "weights0.safetensors").items():
        torch.testing.assert_close(value, weights[name], atol=1e-5, rtol=1e-4, msg=name)


FITS: dict[str, dict[str, Any]] = {
    "everything": {"model": {"bn": "fixed"}},
    "accumulated": {"model": {"bn": "fixed"}, "trainer": {"accumulate": 2, "clip_norm": 0.5}},
    "cached": {"model": {"freeze": "backbone"}, "trainer": {"cache": {"views": 2}}},
    "streamed": {"model": {"freeze": "backbone"}, "trainer": {"cache": {"views": "epochs"}}},
    "balanced": {
        "model": {"freeze": "backbone"},
        "trainer": {"cache": {"views": 2}, "balance": "sampler"},
    },
    "frozen live": {"model": {"freeze": "backbone"}, "trainer": {"cache": False}},
}


QUICK = ("accumulated",)


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in FITS]
)
def test_two_processes_give_what_one_gives(runner: Runner, name: str) -> None:
    one = runner.run(f"{name} one", processes=1, **FITS[name])
    two = runner.run(f"{name} two", processes=2, **FITS[name])
    assert_close(two, one)
    first, second = (load_file(two / f"weights{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], value) for name, value in second.items())
    assert history_of(two, 1)["records"][0]["val_loss"] == history_of(two)["records"][0]["val_loss"]
    # Only the first writes.
    assert (two / "artifact0.safetensors").exists()
    assert not (two / "artifact1.safetensors").exists()


@pytest.mark.slow
def test_moving_statistics_become_the_mean(runner: Runner) -> None:
    folder = runner.run("moving", processes=2)
    first, second = (load_file(folder / f"weights{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], value) for name, value in second.items())


@pytest.mark.slow
def test_both_take_the_layout_that_the_first_has_measured(runner: Runner) -> None:
    folder = runner.run("measured", processes=2, model={"bn": "fixed"}, epochs=13)
    chosen, other = (history_of(folder, rank)["settings"]["execution"] for rank in range(2))
    assert chosen == other
    assert chosen["reason"].startswith("measured")
    first, second = (load_file(folder / f"weights{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], value) for name, value in second.items())


def test_a_picture_that_one_cannot_read_stops_all(runner: Runner) -> None:
    broken = min((runner.data / "train" / "red").iterdir())
    content = broken.read_bytes()
    broken.write_bytes(b"no picture")
    try:
        folder = runner.run("broken", processes=2, code=1)
    finally:
        broken.write_bytes(content)
    texts = sorted((folder / f"error{rank}").read_text() for rank in range(2))
    assert texts[0].startswith(f"ImageError: Cannot read the picture `{broken}`: it is")
    assert re.fullmatch(
        r"ProcessError: Process [01] of 2 failed, so that none can go on\. Its error: "
        rf"ImageError: Cannot read the picture `{re.escape(str(broken))}`: it is.*",
        texts[1],
        re.DOTALL,
    )


CHECKPOINTED: dict[str, Any] = {"model": {"bn": "fixed"}, "epochs": 4}


def test_a_killed_process_is_started_again_and_goes_on(runner: Runner) -> None:
    whole = runner.run("whole", processes=2, **CHECKPOINTED)
    checkpoints = {"folder": str(runner.folder / "kept"), "every_steps": 1}
    killed = runner.run(
        "killed", processes=2, arguments=("--max-restarts", "1"),
        trainer={"checkpoints": checkpoints}, fit={"resume": "auto"},
        trouble={"after": 6, "signal": "SIGKILL"}, **CHECKPOINTED,
    )  # fmt: skip
    assert (killed / "trouble").exists()
    expected = load_file(whole / "weights0.safetensors")
    for rank in range(2):
        for name, value in load_file(killed / f"weights{rank}.safetensors").items():
            assert torch.equal(value, expected[name]), name


def test_a_signal_to_one_stops_all_and_one_process_goes_on(runner: Runner) -> None:
    checkpoints = {"folder": str(runner.folder / "signalled")}
    told: dict[str, Any] = {**CHECKPOINTED, "trainer": {"checkpoints": checkpoints}}
    folder = runner.run("signal", processes=2, trouble={"after": 6, "signal": "SIGINT"}, **told)
    for rank in range(2):
        assert history_of(folder, rank)["status"] == "interrupted"
        assert len(history_of(folder, rank)["records"]) == 1
    assert list_checkpoints(checkpoints["folder"])[-1].name[:28] == "epoch-000002-batch-00000002."
    alone = runner.run("alone", processes=1, fit={"resume": True}, **told)
    assert_close(alone, runner.run("whole one", processes=1, **CHECKPOINTED))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"WORLD_SIZE": "two"},
            "WORLD_SIZE is 'two' in the environment, expected a number. Start the program by "
            "torchrun, or unset it.",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"},
            "WORLD_SIZE is 2 in the environment, RANK 2 and LOCAL_RANK 0. Start the program by "
            "torchrun, which sets all three, or unset WORLD_SIZE.",
        ),
    ],
)
def test_an_environment_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        find_world()


def test_a_batch_for_fewer_pictures_than_processes() -> None:
    message = (
        "`batch_size` is 2, and 3 processes share each batch. Pass at least batch_size=3, or start "
        "fewer processes."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        World(rank=0, size=3).check_batch_size(2)
