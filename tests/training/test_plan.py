from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from transferkit.models import build_model
from transferkit.training import SWA, FeatureCache, FitPlan, Phase, Trainer

Make = Callable[..., Trainer]

PHASES = [
    Phase(name="head", epochs=2, freeze="backbone", lr=0.05),
    Phase(name="all", epochs=3, unfreeze="all", lr=0.01, backbone_lr_factor=0.5, warmup=0.5),
]


def test_a_plan_says_what_the_fit_then_does(make: Make) -> None:
    trainer = make(scheduler="cosine", batch_size=4)
    plan = trainer.plan(phases=PHASES, measure=False, verbose=False)
    history = trainer.fit(phases=PHASES)
    assert [phase.name for phase in plan.phases] == ["head", "all"]
    assert [phase.num_steps for phase in plan.phases] == [8, 12]
    starts = [
        phase.lrs["head"][phase.steps.index(epoch * phase.steps_per_epoch)]
        for phase in plan.phases
        for epoch in range(phase.num_epochs)
    ]
    assert history.column("lr") == pytest.approx(starts)
    head, everything = plan.phases
    assert list(head.lrs) == ["head"]
    assert set(everything.lrs) > {"head"}
    assert head.num_trainable == 34
    assert head.num_trainable + head.num_frozen == trainer.model.num_parameters
    assert everything.num_frozen == 0
    assert head.num_feature_images == 2 * 16 + 8
    assert everything.num_feature_images is None


def test_a_plan_changes_nothing(make: Make) -> None:
    model_state = {}
    trainer = make(recipe="gradual", head_start="ridge")
    model_state = {name: each.clone() for name, each in trainer.model.state_dict().items()}
    flags = [each.requires_grad for each in trainer.model.parameters()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    trainer.plan(verbose=False)
    assert torch.equal(torch.rand(1), expected)
    after = trainer.model.state_dict()
    assert all(torch.equal(each, after[name]) for name, each in model_state.items())
    assert [each.requires_grad for each in trainer.model.parameters()] == flags
    assert all(each.grad is None for each in trainer.model.parameters())
    assert len(trainer.history) == 0


def test_an_optimizer_object_is_left_alone(make: Make) -> None:
    model = make().model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = Trainer(
        model, make().data, optimizer=optimizer, scheduler="warmup_cosine", verbose=False,
        device="cpu", batch_size=4,
    )  # fmt: skip
    plan = trainer.plan(4, measure=False, verbose=False)
    (rates,) = plan.phases[0].lrs.values()
    assert max(rates) == pytest.approx(0.1)
    assert rates[0] < 0.1
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not optimizer.state
    assert "initial_lr" not in optimizer.param_groups[0]


def test_a_schedule_object_goes_on_from_where_it_is(make: Make) -> None:
    model = make().model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = StepLR(optimizer, 1, 0.5)
    trainer = Trainer(
        model, make().data, optimizer=optimizer, scheduler=scheduler, verbose=False, device="cpu"
    )
    plan = trainer.plan(4, measure=False, verbose=False)
    assert set(plan.phases[0].lrs["0"]) == {0.1}
    assert scheduler.last_epoch == 0


def test_long_fits_have_a_bounded_number_of_points(make: Make) -> None:
    phase = make(freeze="backbone").plan(900, measure=False, verbose=False).phases[0]
    assert phase.num_steps == 3600
    assert len(phase.steps) <= 501
    assert phase.steps[-1] == 3599


def test_a_solved_phase_has_no_steps(make: Make) -> None:
    trainer = make(freeze="backbone", solver="lbfgs", cache=FeatureCache(views=3))
    (phase,) = trainer.plan(9, verbose=False).phases
    assert (phase.num_steps, phase.lrs, phase.num_feature_images) == (0, {}, 3 * 16 + 8)
    assert "  solver    lbfgs" in list(phase.lines())


@pytest.mark.parametrize("options", [{}, {"freeze": "backbone"}, {"freeze": "until:conv1"}])
def test_estimates_are_of_the_right_order(options: dict[str, Any], make: Make) -> None:
    trainer = make(**options, optimizer="adamw")
    plan = trainer.plan(3, verbose=False)
    assert plan.seconds is not None
    assert plan.memory_bytes is not None
    assert 0 < plan.seconds < 60
    weights = 4 * trainer.model.num_parameters
    assert weights < plan.memory_bytes < 100 * 2**20


def test_what_a_phase_left_in_the_cache_is_not_counted_again(make: Make) -> None:
    phases = [
        Phase("fast", 3, freeze="backbone", lr=0.1),
        Phase("slow", 4, lr=0.01),
        Phase("all", 1, unfreeze="all"),
        Phase("head again", 1, freeze="backbone"),
    ]
    plan = make().plan(phases=phases, measure=False, verbose=False)
    assert [each.num_feature_images for each in plan.phases] == [3 * 16 + 8, 16, None, 16 + 8]


def test_a_plan_without_measuring_has_no_estimate(make: Make) -> None:
    plan = make().plan(measure=False, verbose=False)
    assert (plan.seconds, plan.memory_bytes) == (None, None)
    assert plan.phases[0].estimate is None


def test_the_text_of_a_plan(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make(scheduler="none")
    plan = trainer.plan(phases=PHASES, measure=False)
    printed = capsys.readouterr().out
    assert printed == f"{plan}\n"
    device = plan.device
    assert printed.splitlines() == [
        f"tiny on {device}: 16 training and 8 validation pictures, in batches of 4",
        "head: epochs 1 to 2",
        "  trains    34 parameters, 1,440 are frozen (backbone.*, bn=frozen)",
        "  steps     8, 4 in an epoch",
        "  lr        head: 0.05",
        "  features  of the backbone, once: 2 augmented views of each training picture, by pytorch "
        "in float32",
        "            computed of 40 pictures",
        "all: epochs 3 to 5",
        "  trains    1,474 parameters, 0 are frozen (nothing is frozen, bn=frozen)",
        "  steps     12, 4 in an epoch",
        "  lr        head: 0.00143 to 0.01",
        "            layer1: 0.000714 to 0.005",
        "            conv1: 0.000714 to 0.005",
        "  features  computed live: the first stage of the backbone trains",
        "execution: the memory format is chosen as the fit starts",
    ]


def test_a_plan_names_what_comes_before_and_after(make: Make) -> None:
    trainer = make(head_start="ridge", wise_ft=True, average=SWA())
    assert trainer.plan(1, verbose=False).notes == (
        "execution: channels_last (too short to measure)",
        "before: the head is fitted (ridge) to features of 16 pictures, in the first fit",
        "after each averaged epoch: a pass for BatchNorm's statistics, where they move",
        "after: 11 passes over 8 validation pictures (WiSE-FT)",
    )
    assert make(channels_last=True).plan(1, measure=False, verbose=False).notes == (
        "execution: channels_last (given)",
    )


def test_a_plan_is_json(make: Make) -> None:
    plan = make(freeze="backbone").plan(2, verbose=False)
    data = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert data["phases"][0]["freeze_plan"] == {
        "patterns": ["backbone.*"], "bn": "frozen", "until": None,
    }  # fmt: skip
    assert data["phases"][0]["estimate"].keys() == {"seconds", "memory_bytes"}


def test_a_plan_of_a_large_network_at_a_stage(make: Make) -> None:
    model = build_model("resnet18", 2, weights=None, freeze="until:layer3")
    trainer = Trainer(model, make().data, verbose=False, device="cpu", batch_size=2)
    plan: FitPlan = trainer.plan(1, measure=False, verbose=False)
    assert plan.phases[0].features.startswith("up to layer3, once: ")
