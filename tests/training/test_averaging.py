"""Averages of the weights, against PyTorch's own, and what must not change beside them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from transferkit._seeding import seeded_torch
from transferkit.data import Batch
from transferkit.errors import ConfigError, DataError
from transferkit.models import BackboneSpec, Classifier, FreezePlan, build_model
from transferkit.training.averaging import (
    EMA,
    SWA,
    WeightAverage,
    make_average,
    refresh_batch_norm,
)
from transferkit.training.best import BestWeights
from transferkit.training.history import EpochRecord


@pytest.fixture
def model(tiny_spec: BackboneSpec) -> Classifier:
    torch.manual_seed(0)
    return build_model(tiny_spec, 2, weights=None)


def batches(sizes: Iterable[int] = (4, 4, 2)) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(
            3 * torch.rand(size, 3, 32, 32, generator=generator) + 1,
            torch.zeros(size, dtype=torch.int64),
            torch.arange(size),
        )
        for size in sizes
    ]


def no_batches_wanted() -> Iterator[Batch]:
    raise AssertionError("A batch was loaded.")
    yield


def move(model: nn.Module, step: int) -> None:
    """Change what trains, as an optimizer would, and the buffers, as batches would."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each.add_(torch.randn(each.shape, generator=generator).to(each.dtype))
        for buffer in model.buffers():
            buffer.add_(1)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {
        name: value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, value in model.state_dict().items()
    }


# The averages


def rising_decay(averaged: Tensor, present: Tensor, num_averaged: Tensor | int) -> Tensor:
    decay = min(0.5, (1 + float(num_averaged)) / (10 + float(num_averaged)))
    return decay * averaged + (1 - decay) * present


@pytest.mark.parametrize(
    ("average", "reference"),
    [
        (SWA(), {}),
        # So small a decay is below its rise from the first step on: PyTorch's constant one.
        (EMA(decay=0.1), {"multi_avg_fn": get_ema_multi_avg_fn(0.1)}),  # type: ignore[no-untyped-call]
        (EMA(decay=0.5), {"avg_fn": rising_decay}),
    ],
)
def test_averages_are_those_of_pytorch(
    model: Classifier, average: EMA | SWA, reference: dict[str, Any]
) -> None:
    expected = AveragedModel(model, **reference)
    running = WeightAverage(average)
    running.start(model)
    for step in range(20):
        move(model, step)
        running.update(model)
        expected.update_parameters(model)
    with running.applied(model):
        found = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(found, expected.module.state_dict(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found["head.weight"], model.get_parameter("head.weight"))


def test_the_decay_of_an_ema_rises() -> None:
    shares = [EMA(decay=0.9).share(number) for number in (0, 1, 2, 79, 80, 81, 1000)]
    expected = [1, 1 - 2 / 11, 1 - 3 / 12, 1 - 80 / 89, 0.1, 0.1, 0.1]
    assert shares == pytest.approx(expected, abs=1e-12)


def test_an_ema_takes_every_epoch() -> None:
    assert all(EMA().takes(epoch, 3) for epoch in range(3))


@pytest.mark.parametrize(
    ("start", "num_epochs", "first"),
    [
        (0.0, 5, 0),
        (0.5, 4, 2),
        (0.5, 5, 2),
        (0.9, 5, 4),
        (0.5, 1, 0),
        (0.75, 1, 0),
        # 0.28 * 100 is above 28 and 0.29 * 100 below 29.
        (0.28, 100, 28),
        (0.29, 100, 29),
    ],
)
def test_swa_starts_after_its_share_of_the_epochs(
    start: float, num_epochs: int, first: int
) -> None:
    average = WeightAverage(SWA(start=start))
    taken = [epoch for epoch in range(num_epochs) if average.takes(epoch, num_epochs)]
    assert taken == list(range(first, num_epochs))


def test_the_intervals() -> None:
    assert WeightAverage(EMA()).interval == "step"
    assert WeightAverage(SWA()).interval == "epoch"


def test_settings_are_plain_data() -> None:
    assert EMA(decay=0.99).to_dict() == {"name": "ema", "decay": 0.99}
    assert SWA(start=0.25).to_dict() == {"name": "swa", "start": 0.25}


@pytest.mark.parametrize("decay", [0, 1, -0.1, 1.5, float("nan"), "0.9", True])
def test_bad_decays_are_errors(decay: Any) -> None:
    message = f"`decay` should be a finite number above 0 and below 1, found {decay!r}."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        EMA(decay=decay)


@pytest.mark.parametrize("start", [-0.1, 1, 3, float("inf"), None])
def test_bad_starts_are_errors(start: Any) -> None:
    message = (
        f"`start` should be a finite number in [0, 1), a share of all epochs, found {start!r}."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        SWA(start=start)


def test_make_average() -> None:
    running = make_average(SWA(start=0.25))
    assert running is not None
    assert running.average == SWA(start=0.25)
    assert not running.is_active
    assert make_average(None) is None


@pytest.mark.parametrize(("average", "found"), [("ema", "str"), (EMA, "type")])
def test_other_averages_are_errors(average: Any, found: str) -> None:
    message = f"`average` should be EMA(...), SWA(...) or None, found {found}."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make_average(average)


# Putting them into the model


def test_only_what_trains_is_copied_and_the_rest_stays(model: Classifier) -> None:
    model.freeze("backbone")
    before = bits(model.backbone)
    running = WeightAverage(EMA())
    running.start(model)
    running.update(model)
    assert set(running.weights) == {"head.weight", "head.bias"}
    with running.applied(model):
        assert bits(model.backbone) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_all_is_as_before_after_an_error(model: Classifier, error: type[BaseException]) -> None:
    running = WeightAverage(SWA())
    running.start(model)
    for step in range(3):
        move(model, step)
        running.update(model)
    before = bits(model)

    @running.applied(model)
    def fail() -> None:
        changed = {name for name, value in bits(model).items() if value != before[name]}
        assert {"head.weight", "backbone.conv1.bias"} <= changed
        refresh_batch_norm(model, batches())
        assert bits(model)["backbone.bn1.running_mean"] != before["backbone.bn1.running_mean"]
        raise error

    with pytest.raises(error):
        fail()
    assert bits(model) == before


def test_without_an_average_the_block_finds_the_model_as_it_is(model: Classifier) -> None:
    running = WeightAverage(EMA())
    running.start(model)
    before = bits(model)
    with running.applied(model):
        assert bits(model) == before


def test_the_best_weights_are_the_average_with_its_statistics(model: Classifier) -> None:
    running = WeightAverage(SWA())
    running.start(model)
    best = BestWeights(model, [name for name, _ in model.named_parameters()])
    for step in range(2):
        move(model, step)
        running.update(model)
    live = bits(model)
    with running.applied(model):
        refresh_batch_norm(model, batches())
        averaged = bits(model)
        best.offer(EpochRecord(1, 0.5, 0.5, 0.5, 0.5, 0.1, 1.0))
    move(model, 2)
    best.restore()
    assert bits(model) == averaged
    changed = {name for name in live if live[name] != averaged[name]}
    assert {"head.weight", "backbone.bn1.weight", "backbone.bn1.running_mean"} <= changed


def test_a_phase_begins_a_new_average_of_what_trains_in_it(model: Classifier) -> None:
    running, fresh = WeightAverage(EMA()), WeightAverage(EMA())
    running.start(model.freeze("backbone"))
    for step in range(5):
        move(model, step)
        running.update(model)
    running.start(model.freeze("none"))
    assert not running.is_active
    fresh.start(model)
    for step in range(3):
        move(model, step)
        running.update(model)
        fresh.update(model)
    assert set(running.weights) == {name for name, _ in model.named_parameters()}
    for name, value in fresh.weights.items():
        assert torch.equal(running.weights[name], value)


def test_half_precision_is_averaged_in_single(model: Classifier) -> None:
    model.to(torch.bfloat16)
    running = WeightAverage(EMA(decay=0.999))
    running.start(model)
    running.num_averaged = 10**6  # Past the rise of the decay.
    running.weights = {
        name: torch.ones_like(each, dtype=torch.float32) for name, each in model.named_parameters()
    }
    nn.init.zeros_(model.get_parameter("head.weight"))
    for _ in range(100):  # In bfloat16 none of these steps would be seen.
        running.update(model)
    before = bits(model)
    with running.applied(model):
        assert model.get_parameter("head.weight").dtype == torch.bfloat16
        assert model.get_parameter("head.weight")[0, 0].item() == pytest.approx(
            0.999**100, rel=2**-8
        )
    assert bits(model) == before


# BatchNorm's statistics


@pytest.mark.parametrize("training", [True, False])
def test_statistics_are_those_of_pytorchs_pass(model: Classifier, training: bool) -> None:
    expected = copy.deepcopy(model)
    with seeded_torch(0, torch.device("cpu")):
        update_bn(batches(), expected)
    for buffer in model.train(training).buffers():
        buffer.add_(1)
    refresh_batch_norm(model, batches())
    assert bits(model) == bits(expected)
    assert model.backbone.get_buffer("bn1.num_batches_tracked").item() == 3
    assert all(each.training is training for each in model.modules())


def test_statistics_are_the_mean_over_the_batches(model: Classifier) -> None:
    refresh_batch_norm(model, batches())
    conv = model.backbone.get_submodule("conv1")
    with torch.no_grad():
        outputs = [conv(batch.images) for batch in batches()]
    means = torch.stack([each.mean(dim=(0, 2, 3)) for each in outputs]).mean(dim=0)
    variances = torch.stack([each.var(dim=(0, 2, 3)) for each in outputs]).mean(dim=0)
    torch.testing.assert_close(model.backbone.get_buffer("bn1.running_mean"), means)
    torch.testing.assert_close(model.backbone.get_buffer("bn1.running_var"), variances)


@pytest.mark.parametrize(
    "plan",
    [FreezePlan(("backbone.*",)), FreezePlan(bn="fixed"), FreezePlan(("*.bn1.*", "*.layer1.*"))],
)
def test_layers_that_stand_still_take_no_pass(model: Classifier, plan: FreezePlan) -> None:
    model.freeze(plan)
    before = bits(model)
    refresh_batch_norm(model, no_batches_wanted())
    assert bits(model) == before


@pytest.mark.parametrize(
    ("plan", "following"),
    [
        (FreezePlan(("backbone.bn1.*",)), {"layer1.1"}),
        (FreezePlan(("backbone.*",), bn="adapt"), {"bn1", "layer1.1"}),
        (FreezePlan(("backbone.*",), bn="train"), {"bn1", "layer1.1"}),
    ],
)
def test_only_layers_that_follow_the_batches_change(
    model: Classifier, plan: FreezePlan, following: set[str]
) -> None:
    model.freeze(plan)
    before = bits(model)
    refresh_batch_norm(model, batches())
    changed = {name for name, value in bits(model).items() if value != before[name]}
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"backbone.{layer}.{each}" for layer in following for each in buffers}


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.BatchNorm2d(3, track_running_stats=False)])
def test_a_model_without_statistics_takes_no_pass(model: nn.Module) -> None:
    refresh_batch_norm(model, no_batches_wanted())


def test_modes_momenta_and_random_state_stay(model: Classifier) -> None:
    drop = model.backbone.get_submodule("drop").eval()
    model.backbone.get_submodule("bn1").momentum = 0.25  # type: ignore[assignment]
    state = torch.get_rng_state()
    refresh_batch_norm(model, batches())
    assert torch.equal(torch.get_rng_state(), state)
    assert not drop.training
    assert model.training
    assert model.backbone.get_submodule("bn1").momentum == 0.25
    assert model.backbone.get_submodule("layer1.1").momentum == 0.1
    assert all(each.grad is None for each in model.parameters())


def test_without_batches_is_an_error_and_the_statistics_stay(model: Classifier) -> None:
    move(model, 0)
    before = bits(model)
    message = "BatchNorm's statistics need at least one batch, found none."
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        refresh_batch_norm(model, [])
    assert bits(model) == before


def test_an_error_in_the_pass_leaves_the_statistics_and_momenta(model: Classifier) -> None:
    def interrupted() -> Iterator[Batch]:
        yield from batches()
        raise KeyboardInterrupt

    move(model, 0)
    before = bits(model)
    with pytest.raises(KeyboardInterrupt):
        refresh_batch_norm(model, interrupted())
    assert bits(model) == before
    assert model.backbone.get_submodule("bn1").momentum == 0.1


def test_images_come_in_the_memory_format_and_no_graph_is_kept(model: Classifier) -> None:
    seen: list[tuple[bool, bool]] = []

    def look(_: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
        is_last = inputs[0].is_contiguous(memory_format=torch.channels_last)
        seen.append((is_last, logits.requires_grad))

    model.register_forward_hook(look)
    refresh_batch_norm(model, batches(), memory_format=torch.channels_last)
    assert seen == [(True, False)] * 3


def test_activations_go_through_the_layers_that_are_left() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    inputs = torch.rand(5, 3)
    batch = Batch(inputs, torch.zeros(5, dtype=torch.int64), torch.arange(5))
    refresh_batch_norm(
        model, [batch], memory_format=torch.channels_last, logits_of=model.get_submodule("1")
    )
    torch.testing.assert_close(model.get_buffer("1.running_mean"), inputs.mean(dim=0))
