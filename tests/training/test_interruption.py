"""SIGINT and SIGTERM: the step ends, the state is saved, and all is as it was."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch

from transferkit.errors import LossError
from transferkit.testing import make_image_folder
from transferkit.training import Callback, EpochRecord, FeatureCache, Trainer
from transferkit.training.checkpoints import list_checkpoints, read_checkpoint

Make = Callable[..., Trainer]


class SignalAfter(Callback):
    """Send this process a signal after so many updates."""

    def __init__(self, number: signal.Signals, updates: int, times: int = 1) -> None:
        self.number, self.left, self.times = number, updates, times
        self.num_updates = 0

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        self.num_updates += 1
        self.left -= 1
        if self.left == 0:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def test_ctrl_c_ends_the_step_saves_and_returns(make: Make, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = make()
    initial = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.fit(3)
    callback = SignalAfter(signal.SIGINT, 6)
    trainer = make(checkpoints=tmp_path / "fit", callbacks=[callback])
    trainer.model.load_state_dict(initial)
    history = trainer.fit(3)
    assert history.status == "interrupted"
    assert (len(history), callback.num_updates) == (1, 6)
    assert [path.name[:28] for path in list_checkpoints(tmp_path / "fit")] == [
        "epoch-000002-batch-00000000.",
        "epoch-000002-batch-00000002.",
    ]
    second = make(checkpoints=tmp_path / "fit")
    second.model.load_state_dict(initial)
    assert second.fit(3, resume="auto").status == "completed"
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value)


def test_sigterm_saves_and_exits_with_143(make: Make, tmp_path: Path) -> None:
    callback = SignalAfter(signal.SIGTERM, 2)
    trainer = make(checkpoints=tmp_path / "fit", callbacks=[callback])
    with pytest.raises(SystemExit) as error:
        trainer.fit(3)
    assert error.value.code == 143
    (path,) = list_checkpoints(tmp_path / "fit")
    assert read_checkpoint(path).data["parts"]["progress"]["place"] == [1, 2]
    assert trainer.history.status == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_fit_at_once(
    make: Make, tmp_path: Path, number: signal.Signals
) -> None:
    trainer = make(checkpoints=tmp_path / "fit", callbacks=[SignalAfter(number, 2, times=2)])
    if number is signal.SIGINT:
        trainer.fit(3)
    else:
        with pytest.raises(SystemExit, match="143"):
            trainer.fit(3)
    assert not list_checkpoints(tmp_path / "fit")


def test_a_signal_while_features_are_computed(make: Make, tmp_path: Path) -> None:
    class Late(Callback):
        def on_epoch_start(self, trainer: Trainer, epoch: int) -> None:
            if epoch == 2:  # Which computes a view.
                os.kill(os.getpid(), signal.SIGINT)

    trainer = make(
        freeze="backbone",
        cache=FeatureCache(views=2),
        checkpoints=tmp_path / "fit",
        callbacks=[Late()],
    )
    assert trainer.fit(4).status == "interrupted"
    place = read_checkpoint(list_checkpoints(tmp_path / "fit")[-1]).data["parts"]["progress"]
    assert place["place"] == [2, 0]
    assert make(
        freeze="backbone", cache=FeatureCache(views=2), checkpoints=tmp_path / "fit"
    ).fit(4, resume=True).status == "completed"  # fmt: skip


def test_a_signal_while_validating_costs_no_update(make: Make, tmp_path: Path) -> None:
    class AtTheEnd(Callback):
        def on_step_end(self, trainer: Trainer, step: int) -> None:
            if step == trainer.steps_per_epoch:
                os.kill(os.getpid(), signal.SIGINT)

    trainer = make(checkpoints=tmp_path / "fit", callbacks=[AtTheEnd()])
    history = trainer.fit(2)
    assert (history.status, len(history)) == ("interrupted", 0)
    steps = trainer.steps_per_epoch
    place = read_checkpoint(list_checkpoints(tmp_path / "fit")[-1]).data["parts"]["progress"]
    assert place["place"] == [1, steps]
    assert len(make(checkpoints=tmp_path / "fit").fit(2, resume=True)) == 2


def test_an_ignored_signal_stays_ignored(make: Make) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert make(callbacks=[SignalAfter(signal.SIGINT, 1)]).fit(1).status == "completed"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def surroundings() -> dict[str, Any]:
    """Return what a fit has to leave alone."""
    return {
        "handlers": [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)],
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "backend": matplotlib.get_backend(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": repr(np.random.get_state()),
        "warnings": list(warnings.filters),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


class Raise(Callback):
    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        raise RuntimeError("of the callback")


@pytest.mark.parametrize("ending", ["well", "error", "signal"])
def test_the_surroundings_are_as_before(make: Make, tmp_path: Path, ending: str) -> None:
    callbacks: dict[str, list[Callback]] = {
        "well": [],
        "error": [Raise()],
        "signal": [SignalAfter(signal.SIGINT, 2)],
    }
    trainer = make(checkpoints=tmp_path, callbacks=callbacks[ending], num_workers=1)
    before, threads = surroundings(), set(threading.enumerate())
    if ending == "error":
        with pytest.raises(RuntimeError, match="of the callback"):
            trainer.fit(1)
    else:
        trainer.fit(1)
    assert surroundings() == before
    assert set(threading.enumerate()) <= threads  # Others' may end meanwhile.


def test_a_fit_in_another_thread(make: Make, tmp_path: Path) -> None:
    trainer = make(checkpoints=tmp_path / "fit")
    errors: list[BaseException] = []

    def run() -> None:
        try:
            trainer.fit(1)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors
    assert trainer.history.status == "completed"
    assert list_checkpoints(tmp_path / "fit")


PROGRAM = """
import sys
import transferkit as tk
data = tk.load_folders(sys.argv[1])
model = tk.build_model("squeezenet1_1", 2, weights=None, freeze="none", seed=0)
trainer = tk.Trainer(model, data, checkpoints=tk.Checkpoints(folder=sys.argv[2], every_steps=1),
                     batch_size=2, device="cpu", num_workers=int(sys.argv[3]),
                     worker_type="process")
print("begun", flush=True)
trainer.fit(50)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals of this kind")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 0)])
def test_a_signal_to_the_whole_group_of_processes(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    pictures = make_image_folder(tmp_path / "pictures")
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(pictures), str(tmp_path / "fit"), "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not list_checkpoints(tmp_path / "fit") and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    read_checkpoint(list_checkpoints(tmp_path / "fit")[-1])


class Explode(Callback):
    """Make the weights infinite before an update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        if step == self.step:
            with torch.no_grad():
                trainer.model.get_parameter("head.bias").fill_(float("inf"))


def test_a_loss_that_is_not_finite_ends_the_fit(make: Make, tmp_path: Path) -> None:
    trainer = make(checkpoints=tmp_path / "fit", callbacks=[Explode(2)], lr=0.125, scheduler="none")
    with pytest.raises(LossError) as error:
        trainer.fit(2)
    order = [int(each) for each in trainer._job.train_loader.order(1)[0][8:12]]
    names = ", ".join(f"`{trainer.data.train.name_of(index)}`" for index in order)
    assert str(error.value) == (
        f"The loss is nan in epoch 1, batch 2, at the learning rate 0.125. Its pictures: {names}. "
        f"The weights are those of the best epoch so far. Take a lower learning rate, clip the "
        f"gradients by `clip_norm`, or let some batches be left out by `nan_policy`."
    )
    assert trainer.history.status == "failed"
    assert all(torch.isfinite(each).all() for each in trainer.model.parameters())


class NanOnce:
    """A criterion that is not finite for one batch."""

    def __init__(self, calls: set[int]) -> None:
        self.calls, self.num_calls = calls, 0

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(logits, targets)
        if logits.requires_grad:
            self.num_calls += 1
            if self.num_calls in self.calls:
                return loss * float("nan")
        return loss


def test_some_batches_may_be_left_out(make: Make) -> None:
    trainer = make(criterion=NanOnce({2}), nan_policy=1)
    history = trainer.fit(1)
    (left_out,) = history.settings["nonfinite"]
    assert (left_out["epoch"], left_out["batch"], left_out["loss"]) == (1, 1, "nan")
    assert len(left_out["paths"]) == 4
    assert np.isfinite(history[0].train_loss)


def test_no_more_batches_than_allowed_are_left_out(make: Make) -> None:
    trainer = make(criterion=NanOnce({2, 3}), nan_policy=1)
    message = (
        r" The 1 batches that `nan_policy` lets be left out are used up\. The weights are those of "
        r"the best epoch so far\. Take a lower learning rate, or clip the gradients by `clip_norm`"
    )
    with pytest.raises(LossError, match=message):
        trainer.fit(1)


@pytest.mark.parametrize("policy", ["skip", 0, -1, 1.5, None, True])
def test_a_policy_that_there_is_not(make: Make, policy: Any) -> None:
    from transferkit.errors import ConfigError

    message = (
        f'`nan_policy` should be "raise" or the number of batches that may be left out, at least '
        f"1, found {policy!r}."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(nan_policy=policy)
