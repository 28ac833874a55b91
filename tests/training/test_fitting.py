from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from transferkit.data import ImageLoader, ImageSplits
from transferkit.errors import ConfigError, FreezeError
from transferkit.models import BackboneSpec, HeadSpec, build_model, engines
from transferkit.training import (
    EMA,
    SWA,
    Callback,
    EarlyStopping,
    FeatureCache,
    Phase,
    Trainer,
    cached_feed,
)
from transferkit.training.history import EpochRecord

Make = Callable[..., Trainer]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


class Note(Callback):
    """Note what each epoch ends with."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.states: list[dict[str, torch.Tensor]] = []

    def on_phase_start(self, trainer: Trainer, phase: Phase) -> None:
        self.phases.append(phase.name)

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        self.states.append(state(trainer.model))


TWO_PHASES = [
    Phase(name="head", epochs=2, freeze="backbone", lr=0.05),
    Phase(name="all", epochs=2, unfreeze="all", lr=0.01, backbone_lr_factor=0.5, warmup=0.5),
]


def test_phases_run_one_after_the_other(make: Make) -> None:
    note = Note()
    trainer = make(callbacks=[note], scheduler="none")
    before = state(trainer.model)
    history = trainer.fit(phases=TWO_PHASES)
    assert note.phases == ["head", "all"]
    assert [record.epoch for record in history] == [1, 2, 3, 4]
    assert [record.phase for record in history] == ["head", "head", "all", "all"]
    assert history.column("lr") == pytest.approx([0.05, 0.05, 0.01 / 5, 0.01])
    assert changed(before, note.states[1]) == {"head.weight", "head.bias"}
    assert set(before) <= changed(note.states[1], note.states[3])
    assert history.settings["phases"] == [phase.to_dict() for phase in TWO_PHASES]
    assert history.settings["epochs"] == 4
    assert [each["cached"] for each in history.settings["features"].values()] == [True, False]
    assert trainer.model.freeze_plan.freezes is False


def test_two_phases_are_what_a_plain_loop_computes(
    tiny_spec: BackboneSpec, tiny_splits: ImageSplits
) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    without_dropout(model)  # It draws from a generator that the loops seed differently.
    expected = plain_loop(model, tiny_splits)
    twin = build_model(tiny_spec, 2, weights=None)
    without_dropout(twin)
    trainer = Trainer(
        twin, tiny_splits, optimizer="sgd", scheduler="none", batch_size=3, seed=5,
        augmentation="none", weight_decay=0.01, verbose=False, device="cpu", cache=False,
    )  # fmt: skip
    history = trainer.fit(phases=TWO_PHASES)
    assert history.column("train_loss") == pytest.approx(expected, rel=1e-5)


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def plain_loop(model: Any, data: ImageSplits) -> list[float]:
    """Train the head, then all, in plain PyTorch; return the mean losses."""
    loader = ImageLoader(
        data.train, model.preprocess.train("none"), shuffle=True, batch_size=3, seed=5
    )
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    means = []
    for epoch in range(1, 5):
        model.train()
        if epoch <= 2:
            model.backbone.eval().requires_grad_(False)
        if epoch == 3:
            model.backbone.requires_grad_(True)
            optimizer.param_groups[0]["lr"] = 0.01
            optimizer.add_param_group({"params": list(model.backbone.parameters()), "lr": 0.005})
        total = 0.0
        for step, (images, targets, _) in enumerate(loader.batches(epoch=epoch)):
            factor = 1.0
            if epoch == 3:  # The warm-up goes over half of the 2 x 6 steps.
                factor = (step + 1) / 7
            rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] *= factor
            logits = model.head(model.backbone(images))
            loss = nn.functional.cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            total += loss.item() * len(images)
        means.append(total / len(data.train))
    model.requires_grad_(True)
    return means


def test_the_best_epoch_of_all_phases_is_kept(make: Make) -> None:
    note = Note()
    trainer = make(callbacks=[note], lr=0.05)
    history = trainer.fit(phases=TWO_PHASES)
    assert changed(note.states[history.best.epoch - 1], state(trainer.model)) == set()


@pytest.mark.parametrize("recipe", ["probe", "finetune", "probe_then_finetune", "gradual"])
def test_recipes_run(recipe: str, make: Make, tiny_splits: ImageSplits) -> None:
    freeze = "backbone" if recipe == "probe" else "none"
    trainer = make(recipe=recipe, freeze=freeze)
    history = trainer.fit(8)
    assert len(history) == 8
    assert np.isfinite(history.column("train_loss")).all()
    if recipe != "probe":
        assert not trainer.model.freeze_plan.freezes


def test_the_recipe_for_probing_freezes_the_backbone(make: Make) -> None:
    trainer = make(recipe="probe")
    before = state(trainer.model.backbone)
    trainer.fit(1)
    assert changed(before, state(trainer.model.backbone)) == set()
    assert trainer.model.is_backbone_frozen


def test_the_recipe_for_probing_keeps_what_else_is_frozen(make: Make) -> None:
    trainer = make(recipe="probe", freeze=["backbone.*", "head.bias"])
    trainer.fit(1)
    assert trainer.model.num_trainable_parameters == 32


def test_fine_tuning_a_frozen_backbone_is_an_error(make: Make) -> None:
    message = (
        "The recipe `finetune` trains the backbone, all of which is frozen. Build the model with "
        'freeze="none", or take recipe="probe".'
    )
    trainer = make(recipe="finetune", freeze="backbone")
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        trainer.fit(1)
    assert len(trainer.fit(phases=[Phase("all", 1, unfreeze="all")])) == 1


@pytest.mark.parametrize("recipe", ["probe_then_finetune", "gradual"])
def test_a_recipe_that_would_undo_the_freezing_is_an_error(recipe: str, make: Make) -> None:
    message = (
        f"A part of the model is frozen, and the recipe `{recipe}` would not keep it so: it "
        'freezes and unfreezes by itself. Build the model with freeze="none", or say what each '
        "phase freezes by `fit(phases=[...])`."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(recipe=recipe, freeze="until:conv1").fit()


def test_the_backbone_has_its_own_rate_when_it_is_unfrozen_later(make: Make) -> None:
    trainer = make(freeze="backbone", scheduler="none")
    plan = trainer.plan(
        phases=[Phase("head", 1), Phase("all", 1, unfreeze="all")], measure=False, verbose=False
    )
    rates = plan.phases[1].lrs
    assert rates["head"][0] == 0.01
    assert rates["layer1"][0] == pytest.approx(0.0003)


def test_early_stopping_ends_a_phase_and_not_the_fit(make: Make) -> None:
    stop = EarlyStopping(monitor="train_loss", patience=1, min_delta=1e9)
    history = make(callbacks=[stop], recipe="probe_then_finetune").fit(12)
    assert [record.phase for record in history] == ["probe"] * 2 + ["finetune"] * 2
    assert history.status == "stopped"


def test_a_second_fit_goes_on_from_the_trained_head(make: Make) -> None:
    trainer = make(freeze="backbone", head_start="ridge", lr=0.05)
    trainer.fit(3)
    before = trainer.evaluate("val").loss
    again = trainer.fit(1)
    assert again.settings["head_start"] is None
    started = make(freeze="backbone", head_start="ridge")
    started.start_head()
    assert before < started.evaluate("val").loss
    assert trainer.evaluate("val").loss < started.evaluate("val").loss


def test_epochs_and_phases_are_one_too_many(make: Make) -> None:
    message = (
        "`epochs` is 3 and `phases` are given, which have epochs of their own. "
        "Leave one of them out."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make().fit(3, phases=TWO_PHASES)


def test_freezing_past_the_plan_is_an_error(make: Make) -> None:
    trainer = make()
    for parameter in trainer.model.backbone.parameters():
        parameter.requires_grad = False
    message = (
        "`requires_grad` of 6 parameters, such as `backbone.bn1.bias`, is not what the model's "
        "freeze plan says. Freeze by `model.freeze(...)`, which keeps their modules in eval mode "
        "too, not by `requires_grad`."
    )
    message = message.replace("of 6", f"of {len(list(trainer.model.backbone.parameters()))}")
    with pytest.raises(FreezeError, match=f"^{re.escape(message)}$"):
        trainer.fit(1)


def test_unfreezing_within_a_phase_is_an_error(make: Make) -> None:
    class Thaw(Callback):
        def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
            trainer.model.freeze("none")

    trainer = make(freeze="backbone", callbacks=[Thaw()])
    message = (
        "What is frozen changed within the phase `probe`: the optimizer and cached features would "
        'not follow. Unfreeze by phases: trainer.fit(phases=[Phase(..., unfreeze="all")]).'
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        trainer.fit(2)


def test_label_smoothing_changes_the_loss(make: Make) -> None:
    options: dict[str, Any] = {"lr": 1e-12, "freeze": "backbone", "cache": FeatureCache(views=0)}
    plain = make(**options).fit(1)[0].train_loss
    smooth = make(**options, label_smoothing=0.5).fit(1)[0].train_loss
    assert abs(plain - smooth) > 1e-4


@pytest.mark.parametrize("average", [EMA(decay=0.9), SWA(start=0.0)])
def test_averaged_weights_are_evaluated_and_kept(average: Any, make: Make) -> None:
    note = Note()
    trainer = make(average=average, callbacks=[note], lr=0.05, scheduler="none")
    history = trainer.fit(3)
    assert history.settings["average"] == average.to_dict()
    # The live weights go on from the last step; what is kept lies between them.
    assert changed(note.states[-1], state(trainer.model))
    found = trainer.evaluate("val")
    assert (found.accuracy, found.loss) == pytest.approx(
        (history.best.val_accuracy, history.best.val_loss), abs=1e-5
    )
    again = trainer.fit(1)
    assert len(again) == 1


def test_l2_sp_keeps_the_backbone_near(make: Make) -> None:
    distances = []
    for strength in (0.0, 5.0):
        trainer = make(l2_sp=strength, lr=0.05, backbone_lr_factor=1.0, scheduler="none")
        start = state(trainer.model.backbone)
        trainer.fit(4)
        weight = trainer.model.backbone.get_parameter("conv1.weight").detach()
        distances.append(float((weight - start["conv1.weight"]).norm()))
    assert distances[1] < 0.5 * distances[0]


@pytest.mark.parametrize("option", ["l2_sp", "wise_ft"])
def test_what_needs_fine_tuning_is_an_error_without(option: str, make: Make) -> None:
    message = (
        f"`{option}` goes back to the backbone's weights from before the fine-tuning, and in no "
        "phase does the backbone train. Leave it out, or freeze less."
    )
    trainer = make(freeze="backbone", **{option: True if option == "wise_ft" else 0.1})
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        trainer.fit(1)
    assert len(trainer.fit(phases=[Phase("all", 1, unfreeze="all")])) == 1


def test_wise_ft_picks_between_before_and_after(make: Make) -> None:
    trainer = make(wise_ft=True, lr=0.05)
    history = trainer.fit(phases=TWO_PHASES)
    report = history.settings["wise_ft_result"]
    assert [each["factor"] for each in report["scores"]] == [number / 10 for number in range(11)]
    chosen = next(each for each in report["scores"] if each["factor"] == report["factor"])
    found = trainer.evaluate("val")
    assert found.accuracy == chosen["val_accuracy"]
    assert found.loss == pytest.approx(chosen["val_loss"], abs=1e-6)
    assert found.accuracy >= history.best.val_accuracy


def test_a_flag_that_is_none_is_an_error(make: Make) -> None:
    message = "`wise_ft` should be True or False, found 'yes'."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(wise_ft="yes")


def test_lbfgs_solves_the_head(make: Make) -> None:
    trainer = make(freeze="backbone", solver="lbfgs", cache=FeatureCache(views=2))
    history = trainer.fit(25)
    assert len(history) == 1
    assert history.settings["lr"] is None
    (report,) = history.settings["solver_reports"]
    assert report["num_features"] == 32
    assert history[0].val_accuracy == trainer.evaluate("val").accuracy == 1.0
    gradient = head_gradient(trainer, strength=report["strength"])
    assert gradient < 0.05


def head_gradient(trainer: Trainer, *, strength: float) -> float:
    """Return how large the gradient of the training loss is, which the solver brings near 0."""
    model = trainer.model
    model.zero_grad()
    loader = ImageLoader(trainer.data.train, model.preprocess.eval(), batch_size=16)
    (batch,) = loader.batches()
    model.eval()
    loss = nn.functional.cross_entropy(model(batch.images), batch.targets)
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = model.head.get_parameter("weight").grad
    assert gradient is not None
    return float(gradient.abs().max())


def test_lbfgs_then_fine_tuning(make: Make) -> None:
    trainer = make(recipe="probe_then_finetune", solver="lbfgs")
    history = trainer.fit(6)
    assert [record.phase for record in history] == ["probe", *["finetune"] * 3]
    assert [record.epoch for record in history] == [1, 2, 3, 4]


LBFGS_ERRORS: list[tuple[dict[str, Any], str]] = [
    (
        {"freeze": "none"},
        'solver="lbfgs" fits the head of a frozen backbone, and in no phase does the head train '
        'alone. Freeze the backbone by freeze="backbone", or take solver="sgd".',
    ),
    (
        {"head": HeadSpec(kind="cosine")},
        "solver=\"lbfgs\" fits a linear head without dropout, found HeadSpec(kind='cosine', "
        'dropout=0.0, hidden=(), scale=16.0). Build the model with head="linear", or take '
        'solver="sgd".',
    ),
    (
        {"label_smoothing": 0.1, "balance": "weights"},
        'solver="lbfgs" would ignore `label_smoothing`, `balance`. Leave that out, or take '
        'solver="sgd".',
    ),
    (
        {"head_start": "ridge", "lr": 0.1, "average": EMA()},
        'solver="lbfgs" would ignore `head_start`, `lr`, `average`. Leave that out, or take '
        'solver="sgd".',
    ),
    (
        {"cache": FeatureCache(views="epochs")},
        'solver="lbfgs" fits the head to all views at once and needs their number, found '
        'views="epochs". Take FeatureCache(views=4), say.',
    ),
    (
        {"cache": False},
        'solver="lbfgs" needs cached features, and there are none: switched off by cache=False.',
    ),
]


@pytest.mark.parametrize(("options", "message"), LBFGS_ERRORS)
def test_where_lbfgs_cannot_be_used(options: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(**({"freeze": "backbone", "solver": "lbfgs"} | options)).fit(1)


def test_lbfgs_would_ignore_the_rates_of_a_phase(make: Make) -> None:
    message = (
        'solver="lbfgs" takes over the phase `head`, and would ignore its `lr`, `warmup`. Leave '
        'that out, or take solver="sgd".'
    )
    phases = [Phase("head", 2, freeze="backbone", lr=0.1, warmup=0.5), Phase("all", 1)]
    trainer = make(freeze="backbone", solver="lbfgs")
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        trainer.fit(phases=phases)


def test_a_solver_that_is_none_is_an_error(make: Make) -> None:
    message = '`solver` should be "sgd" or "lbfgs", found \'adam\'.'
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(freeze="backbone", solver="adam")


@pytest.mark.parametrize("kind", ["linear", "mlp", "cosine"])
def test_every_head_trains(kind: Any, make: Make) -> None:
    trainer = make(head=HeadSpec(kind=kind, dropout=0.1), freeze="backbone", lr=0.05)
    before = state(trainer.model)
    history = trainer.fit(5)
    assert history[-1].train_loss < history[0].train_loss
    moved = changed(before, state(trainer.model))
    assert moved == {name for name in before if name.startswith("head.")}


def test_phases_share_cached_features(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    def make_engine(*args: Any, **options: Any) -> Any:
        made.append(args)
        return engines.make_engine(*args, **options)

    monkeypatch.setattr(cached_feed, "make_engine", make_engine)
    phases = [
        Phase(name="fast", epochs=2, freeze="backbone", lr=0.1),
        Phase(name="slow", epochs=2, lr=0.01),
    ]
    history = make().fit(phases=phases)
    assert [each["cached"] for each in history.settings["features"].values()] == [True, True]
    assert len(made) == 1
