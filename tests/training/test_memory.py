"""Batches that do not fit the memory, and how large a one does."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from transferkit.errors import ConfigError, OutOfMemoryError
from transferkit.training import Trainer, memory
from transferkit.training.estimates import measure_step, noise, weight_bytes

Make = Callable[..., Trainer]


class Limited:
    """A criterion that finds memory for so many pictures only."""

    def __init__(self, limit: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        self.limit, self.error = limit, error

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        if logits.requires_grad and len(logits) > self.limit:
            raise self.error("DefaultCPUAllocator: can't allocate memory")
        return torch.nn.functional.cross_entropy(logits, targets)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_the_error_names_the_size_that_fits(make: Make, kind: type[Exception]) -> None:
    trainer = make(batch_size=8, criterion=Limited(3, kind), accumulate=2)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    message = (
        "A batch of 8 pictures does not fit the memory of `cpu`. One of 2 does. Pass batch_size=2, "
        'accumulate=8 for updates like these, or batch_size="auto".'
    )
    with pytest.raises(OutOfMemoryError, match=f"^{re.escape(message)}$"):
        trainer.fit(1)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_error_where_nothing_fits(make: Make) -> None:
    message = (
        "A batch of 4 pictures does not fit the memory of `cpu`. Not even one picture does. Freeze "
        "more of the network, or take a smaller one."
    )
    with pytest.raises(OutOfMemoryError, match=f"^{re.escape(message)}$"):
        make(criterion=Limited(0)).fit(1)


def test_other_errors_are_left_alone(make: Make) -> None:
    class Broken(Limited):
        def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match=r"^something else$"):
        make(criterion=Broken(0)).fit(1)


def test_auto_takes_the_recipes_size_where_there_is_room(make: Make) -> None:
    trainer = make(batch_size="auto", recipe="probe", freeze="backbone")
    assert trainer.recipe.batch_size == make(batch_size=None).recipe.batch_size


def test_auto_takes_what_fits(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(batch_size=None)
    size = whole.recipe.batch_size
    held = [measure_step(whole._job, whole.model, noise(whole._job, count))[1] for count in (1, 2)]
    needed = weight_bytes(whole._job, None) + held[0]
    per_picture = held[1] - held[0]
    assert per_picture > 0
    free = (needed + (size // 4 - 1) * per_picture) / 0.8 + 8
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    trainer = make(batch_size="auto")
    assert trainer.recipe.batch_size == size // 4
    assert trainer.steps_per_epoch == -(-16 // (size // 4))
    assert trainer.fit(1).settings["batch_size"] == size // 4


def test_auto_with_no_room_at_all(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1)
    message = (
        'batch_size="auto" finds no room for a single picture in the memory of `cpu`. Freeze more '
        "of the network, or take a smaller one."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(batch_size="auto")


def test_auto_leaves_the_model_and_the_random_state_alone(make: Make) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    expected: Any = make(batch_size=None).model.state_dict()
    found = make(batch_size="auto").model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_free_memory_is_less_than_the_machine_has() -> None:
    free = memory.free_memory()
    if free is None:
        pytest.skip("this system does not say how much memory is free")
    assert 2**20 < free < 2**50
