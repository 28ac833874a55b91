from __future__ import annotations

import json

import numpy as np
import pytest

from transferkit.training.lr_find import LRFind, SweepEnd, make_lr_find

LRS = [10 ** (step / 14 - 6) for step in range(100)]


def fall(middle: float, *, depth: float = 0.6, noise: float = 0.0, seed: int = 0) -> list[float]:
    """Return losses that fall most steeply at a rate, over about a decade and a half."""
    places = np.log10(LRS) - np.log10(middle)
    losses = 0.8 - depth / (1 + np.exp(-4 * places))
    return [*(losses + noise * np.random.default_rng(seed).standard_normal(len(LRS)))]


def found_in(losses: list[float]) -> LRFind:
    return make_lr_find("all", LRS[: len(losses)], losses)


@pytest.mark.parametrize("middle", [1e-4, 3e-3, 0.1])
def test_the_suggestion_is_where_most_of_the_fall_is_made(middle: float) -> None:
    found = found_in(fall(middle))
    place = found.smoothed_lrs.index(found.suggestion or 0)
    level = max(found.smoothed) - 0.8 * (max(found.smoothed) - min(found.smoothed))
    assert found.smoothed[place] <= level < found.smoothed[place - 1]
    assert middle < (found.suggestion or 0) < 5 * middle


@pytest.mark.parametrize("seed", range(10))
def test_the_suggestion_bears_noise(seed: int) -> None:
    quiet, noisy = found_in(fall(3e-3)), found_in(fall(3e-3, noise=0.1, seed=seed))
    assert quiet.suggestion is not None
    assert noisy.suggestion == pytest.approx(quiet.suggestion, rel=1)


def test_noise_alone_suggests_nothing() -> None:
    found = [found_in(fall(1, depth=0, noise=0.3, seed=seed)).suggestion for seed in range(200)]
    assert sum(each is not None for each in found) <= 4


def test_a_fall_within_the_noise_needs_more_steps() -> None:
    losses = fall(3e-3, depth=0.2, noise=0.4)
    assert found_in(losses).suggestion is None
    rates = [10 ** (step / 140 - 6) for step in range(1000)]
    many = np.repeat(fall(3e-3, depth=0.2), 10) + 0.4 * np.random.default_rng(0).normal(size=1000)
    assert make_lr_find("all", rates, many.tolist()).suggestion is not None


def test_a_divergence_after_the_fall_does_not_move_the_suggestion() -> None:
    losses = fall(3e-3)[:85]
    quiet = found_in(losses).suggestion
    losses += [losses[-1] * 2**step for step in range(5)]
    assert found_in(losses).suggestion == pytest.approx(quiet, rel=0.1)


def test_a_long_stay_at_the_bottom_does_not_move_the_suggestion() -> None:
    losses = fall(1e-4)
    assert found_in(losses).suggestion == pytest.approx(found_in(losses[:70]).suggestion, rel=0.2)


@pytest.mark.parametrize(
    "losses",
    [[0.7] * 100, [0.7, 0.6, 0.5, 0.4], [0.7], [], [0.1 + 0.01 * step for step in range(100)]],
    ids=["constant", "few", "one", "none", "rising"],
)
def test_what_does_not_fall_suggests_nothing(losses: list[float]) -> None:
    found = found_in(losses)
    assert found.suggestion is None
    if losses:
        last = "  suggestion  none: the loss does not fall by more than its noise"
        assert str(found).splitlines()[-1] == last


def test_ten_steps_are_enough_for_a_clear_fall() -> None:
    lrs = [10.0**step for step in range(-6, 4)]
    found = make_lr_find("all", lrs, [8, 8, 8, 8, 3, 1, 0, 0, 0, 0])
    assert found.suggestion is not None
    assert 1e-3 < found.suggestion < 1


def test_smoothing_does_not_lag() -> None:
    losses = [1 - 0.1 * np.log10(lr) for lr in LRS]
    found = found_in(losses)
    assert found.smoothed == pytest.approx([1 - 0.1 * np.log10(lr) for lr in found.smoothed_lrs])
    assert (found.smoothed[0], found.smoothed_lrs[0]) == pytest.approx((losses[0], LRS[0]))
    assert found.smoothed_lrs[-1] < LRS[-1]


def test_smoothing_is_a_mean_from_the_first_step_on() -> None:
    assert found_in([2.0] * 30).smoothed == pytest.approx([2.0] * 30)
    assert found_in([1.0, 0.0]).smoothed == pytest.approx([1, 0.09 / 0.19])


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (
            "max_lr",
            "all steps were taken, and the loss has not risen yet: a higher max_lr may tell more",
        ),
        ("diverged", "the smoothed loss rose above 4 times its lowest"),
        ("not_finite", "the loss was no finite number any more"),
    ],
)
def test_the_text_says_how_it_ended(end: SweepEnd, words: str) -> None:
    assert str(make_lr_find("head", LRS, fall(1e-3), end=end)).splitlines() == [
        "head: 100 steps at learning rates from 1e-06 to 11.8",
        "  loss        0.8 at first, lowest 0.202 when smoothed, at 2.68",
        f"  end         {words}",
        "  suggestion  0.0038",
    ]


def test_the_text_of_a_sweep_that_was_seen_to_the_end() -> None:
    losses = [*fall(1e-3)[:95], 0.5, 0.5, 0.5, 0.5, 0.5]
    assert str(found_in(losses)).splitlines()[2] == "  end         all steps were taken"


def test_the_text_without_any_loss() -> None:
    assert str(make_lr_find("head", [], [], end="not_finite")).splitlines() == [
        "head: the loss of the first batch is no finite number",
        "  suggestion  none",
    ]


@pytest.mark.parametrize("losses", [fall(1e-3), [0.7] * 100, []])
def test_a_result_is_json(losses: list[float]) -> None:
    found = found_in(losses)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data.keys() == LRFind.__dataclass_fields__.keys()
    assert (data["losses"], data["suggestion"]) == (losses, found.suggestion)
