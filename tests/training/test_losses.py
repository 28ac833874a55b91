from __future__ import annotations

from typing import Any

import pytest
import torch

from transferkit.errors import LossError
from transferkit.training.losses import LossWatch, _read_later

NAN = torch.tensor(float("nan"))


def watch_on(device: str, policy: Any = "raise") -> LossWatch:
    return LossWatch(policy, torch.device(device), lambda index: f"{index}.jpg")


def admits(watch: LossWatch, loss: torch.Tensor, batch: int) -> bool:
    return watch.admits(loss, epoch=1, batch=batch, lr=0.1, indices=torch.tensor([batch]))


def test_on_the_cpu_a_loss_is_looked_at_before_it_is_trained_on() -> None:
    with pytest.raises(LossError, match=r"^The loss is nan in epoch 1, batch 0, "):
        admits(watch_on("cpu"), NAN, 0)


def test_on_an_accelerator_a_loss_is_looked_at_when_the_next_one_is_there() -> None:
    watch = watch_on("cuda")
    assert admits(watch, torch.tensor(1.0), 0)
    assert admits(watch, NAN, 1)
    with pytest.raises(LossError, match=r"^The loss is nan in epoch 1, batch 1, .*`1\.jpg`"):
        admits(watch, torch.tensor(1.0), 2)


def test_on_an_accelerator_the_last_loss_is_looked_at_at_the_end() -> None:
    watch = watch_on("cuda")
    assert admits(watch, NAN, 0)
    with pytest.raises(LossError, match=r"^The loss is nan in epoch 1, batch 0, "):
        watch.finish()
    watch.finish()  # There is nothing more to look at.


def test_batches_that_may_be_left_out_are_looked_at_at_once() -> None:
    watch = watch_on("cuda", policy=1)
    assert not admits(watch, NAN, 0)
    assert [each["batch"] for each in watch.skipped] == [0]


def test_a_loss_is_copied_behind_what_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Copied:
        def copy_(self, loss: object, *, non_blocking: bool) -> None:
            events.append(f"copy, non_blocking={non_blocking}")

        def item(self) -> float:
            events.append("read")
            return 3.0

    class Queue:
        def record_event(self) -> Queue:
            events.append("record")
            return self

        def synchronize(self) -> None:
            events.append("wait")

    class Loss:
        device, dtype = torch.device("cuda"), torch.float32

    monkeypatch.setattr(torch, "empty", lambda *_, pin_memory, dtype: Copied())
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: Queue())
    loss: Any = Loss()
    read = _read_later(loss)
    assert events == ["copy, non_blocking=True", "record"]
    assert read() == 3.0
    assert events[2:] == ["wait", "read"]


@pytest.mark.gpu
def test_a_loss_of_an_accelerator_is_read() -> None:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        pytest.skip("PyTorch finds no accelerator")
    assert _read_later(torch.tensor(3.0, device=device))() == 3.0
