from __future__ import annotations

import random
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch

from transferkit._seeding import MAX_SEED, check_seed, seed_torch, seeded, seeded_torch
from transferkit.errors import ConfigError

Draw = tuple[float, float, float]


def draw() -> Draw:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def draw_and_fail(block: AbstractContextManager[None]) -> None:
    with block:
        torch.rand(())
        raise RuntimeError


def next_draw_without_drawing() -> Draw:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return drawn


@pytest.mark.parametrize("seed", [0, 1, MAX_SEED])
def test_good_seed_is_returned(seed: int) -> None:
    assert check_seed(seed) == seed


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, True, 1.0, "0", None])
def test_bad_seed_is_an_error(seed: Any) -> None:
    with pytest.raises(ConfigError) as error:
        check_seed(seed)
    assert str(error.value) == (
        f"`seed` should be an integer from 0 to 4294967295, found {seed!r}."
    )


def test_same_entropy_gives_the_same_draws_from_all_generators() -> None:
    with seeded(3, 1, 4):
        first = draw()
    draw()
    with seeded(3, 1, 4):
        second = draw()
    assert first == second


@pytest.mark.parametrize("other", [(3, 1, 5), (3, 2, 4), (2, 1, 4), (3, 4, 1)])
def test_other_entropy_gives_other_draws_from_all_generators(other: tuple[int, ...]) -> None:
    with seeded(3, 1, 4):
        first = draw()
    with seeded(*other):
        second = draw()
    assert all(one != two for one, two in zip(first, second, strict=True))


def test_callers_state_is_untouched() -> None:
    expected = next_draw_without_drawing()
    with seeded(0):
        draw()
        with seeded(1):
            draw()
    assert draw() == expected


def test_callers_state_is_untouched_by_an_error() -> None:
    expected = next_draw_without_drawing()
    with pytest.raises(RuntimeError):
        draw_and_fail(seeded(0))
    assert draw() == expected


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_torch_block_is_seeded_and_the_callers_state_untouched(device: str) -> None:
    expected = next_draw_without_drawing()
    values = []
    for seed in (7, 7, 8):
        with seeded_torch(seed, torch.device(device)):
            values.append(float(torch.rand(())))
    assert values[0] == values[1] != values[2]
    assert draw() == expected


def test_block_on_the_cpu_seeds_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    for place, name in (
        (torch, "manual_seed"),
        (torch.cuda, "manual_seed"),
        (torch.cuda, "manual_seed_all"),
    ):
        monkeypatch.setattr(place, name, fail)
    with seeded_torch(7, torch.device("cpu")):
        seed_torch(torch.device("cpu"), 1, 2)


def test_torch_block_puts_the_state_back_after_an_error() -> None:
    expected = next_draw_without_drawing()
    with pytest.raises(RuntimeError):
        draw_and_fail(seeded_torch(0, torch.device("cpu")))
    assert draw() == expected


def test_state_of_an_mps_device_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.tensor([1, 2, 3])
    restored: list[torch.Tensor] = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.mps, "set_rng_state", restored.append)
    seeds: list[int] = []
    monkeypatch.setattr(torch.mps, "manual_seed", seeds.append)
    expected = next_draw_without_drawing()
    with seeded_torch(7, torch.device("mps")):
        on_mps = float(torch.rand(()))
    with seeded_torch(7, torch.device("cpu")):
        assert float(torch.rand(())) == on_mps
    assert len(restored) == 1
    assert restored[0] is state
    assert seeds == [7]
    assert draw() == expected


@pytest.mark.gpu
def test_state_of_the_accelerator_is_put_back() -> None:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        pytest.skip("no accelerator on this machine")
    torch.manual_seed(1)
    with seeded_torch(7, device):
        first = torch.rand(3, device=device)
    found = torch.rand(3, device=device)
    torch.manual_seed(1)
    assert torch.equal(found, torch.rand(3, device=device))
    with seeded_torch(7, device):
        assert torch.equal(first, torch.rand(3, device=device))
