from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, StepLR

from transferkit.data import load_folders
from transferkit.errors import ConfigError, DataError
from transferkit.models import build_model
from transferkit.testing import make_image_folder
from transferkit.training import FeatureCache, LRFind, Phase, Trainer, lr_sweep
from transferkit.training.cached_feed import CachedFeed
from transferkit.training.loading import mix

Make = Callable[..., Trainer]

LOW: dict[str, Any] = {"min_lr": 1e-5, "max_lr": 1.0, "num_steps": 12, "verbose": False}


class Recorder(SGD):
    """An optimizer that notes its rates; copies note them in the same place."""

    seen: list[list[float]]

    def step(self, closure: Any = None) -> Any:
        type(self).seen.append([float(group["lr"]) for group in self.param_groups])
        return super().step(closure)


@pytest.fixture
def recorder() -> type[Recorder]:
    return type("Fresh", (Recorder,), {"seen": []})


class FailsAt(nn.Module):
    """A criterion that raises at one of its calls, and knows how often it was called."""

    def __init__(self, call: int, error: BaseException) -> None:
        super().__init__()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))
        self.call = call
        self.error = error

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.call:
            raise self.error
        return nn.functional.cross_entropy(logits, targets)


def everything_of(trainer: Trainer, **others: Any) -> dict[str, Any]:
    """Return all that a sweep must not change, as values that can be compared to the bit."""
    job, model = trainer._job, trainer.model
    state = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    return {
        "weights": {name: each.clone() for name, each in model.state_dict().items()},
        "strides": {name: each.stride() for name, each in model.state_dict().items()},
        "places": {name: each.data_ptr() for name, each in model.state_dict().items()},
        "grads": [(id(each.grad), each.grad) for each in model.parameters()],
        "flags": [each.requires_grad for each in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "plan": model.freeze_plan,
        "random": state,
        "history": (id(trainer.history), trainer.history.to_dict()),
        "stops": (trainer.should_stop, trainer.should_stop_phase, trainer._has_started),
        "workers": [each._workers for each in (job.train_loader, job.val_loader)],
        "skipped": [each.skipped for each in (job.train_loader, job.val_loader)],
        "others": {name: plain(each.state_dict()) for name, each in others.items()},
    }


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name in before if not same(before[name], after[name])]


def test_what_tells_changes_apart_does(make: Make) -> None:
    trainer = make()
    before = everything_of(trainer)
    torch.rand(1)
    trainer.model.state_dict()["backbone.bn1.running_mean"].add_(1)
    trainer.model.head.eval()
    assert changed(before, everything_of(trainer)) == ["weights", "modes", "random"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"freeze": "backbone"},
        {"freeze": "backbone", "cache": False, "bn": "adapt"},
        {"freeze": "until:conv1", "recipe": "probe_then_finetune", "freeze_all": True},
        {"head_start": "ridge", "batch_augmentation": "mixup", "l2_sp": 0.1},
    ],
)
def test_nothing_is_changed(options: dict[str, Any], make: Make) -> None:
    if options.pop("freeze_all", False):
        options["freeze"] = "none"  # The recipe freezes by itself.
    trainer = make(**options)
    trainer.model.eval()
    trainer.model.head.train()
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = everything_of(trainer)
    found = trainer.lr_find(**LOW)
    assert len(found.losses) > 1
    assert changed(before, everything_of(trainer)) == []


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), ValueError("no loss")])
def test_objects_are_left_alone_whatever_ends_it(error: BaseException | None, make: Make) -> None:
    model, data = make().model, make().data
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = StepLR(optimizer, 1, 0.5)
    criterion = FailsAt(-1, error or ValueError())
    trainer = Trainer(
        model, data, optimizer=optimizer, scheduler=scheduler, criterion=criterion,
        verbose=False, device="cpu", batch_size=4, num_workers=1,
    )  # fmt: skip
    trainer.fit(2)
    if error is not None:
        criterion.call = int(criterion.calls) + 5
    objects = {"optimizer": optimizer, "scheduler": scheduler, "criterion": criterion}
    before = everything_of(trainer, **objects)
    assert before["others"]["optimizer"]["state"]
    if error is None:
        trainer.lr_find(**LOW)
    else:
        with pytest.raises(type(error)):
            trainer.lr_find(**LOW)
    assert changed(before, everything_of(trainer, **objects)) == []
    assert scheduler.get_last_lr() == [0.0025]


@pytest.mark.parametrize(
    "options",
    [{}, {"freeze": "backbone"}, {"average": None, "head_start": "ridge", "num_workers": 2}],
)
def test_a_fit_after_a_sweep_is_a_fit_without_one(options: dict[str, Any], make: Make) -> None:
    torch.manual_seed(1)
    one, other = make(**options), make(**options)
    other.model.load_state_dict(one.model.state_dict())
    one.lr_find(**LOW)
    for trainer in (one, other):
        trainer.fit(2)
        trainer.history.seconds = 0.0
    weights = other.model.state_dict()
    assert all(torch.equal(each, weights[name]) for name, each in one.model.state_dict().items())
    assert one.history.column("val_loss") == other.history.column("val_loss")


@pytest.mark.parametrize("mixing", [None, "mixup"])
def test_the_steps_are_those_of_a_loop_over_the_batches_of_the_fit(
    mixing: str | None, make: Make
) -> None:
    trainer = make(
        lr=0.05, backbone_lr_factor=0.5, stage_lr_factor=0.1, momentum=0.9, weight_decay=0.01,
        batch_augmentation=mixing,
    )  # fmt: skip
    found = trainer.lr_find(min_lr=1e-3, max_lr=0.1, num_steps=10, verbose=False)
    model, job = trainer.model.train(), trainer._job
    stages: list[Any] = list(model.backbone.children())
    groups = [model.head, stages[2], nn.Sequential(*stages[:2])]
    optimizer = SGD(
        [{"params": list(each.parameters())} for each in groups],
        lr=1, momentum=0.9, weight_decay=0.01,
    )  # fmt: skip
    torch.manual_seed(0)
    losses: list[float] = []
    for epoch in (1, 2, 3):
        for batch in job.train_loader.batches(epoch=epoch):
            if len(losses) == 10:
                break
            inputs, targets = (
                batch.images.contiguous(memory_format=job.memory_format),
                batch.targets,
            )
            if job.mixing is not None:
                inputs, targets = mix(job.mixing, batch, seed=0, epoch=epoch)
            loss = nn.functional.cross_entropy(model(inputs), targets)
            for group, factor in zip(optimizer.param_groups, (1, 0.5, 0.05), strict=True):
                group["lr"] = found.lrs[len(losses)] * factor
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
    assert found.losses == pytest.approx(losses, rel=1e-4)
    assert found.lrs[0] == pytest.approx(1e-3)
    assert found.lrs[-1] == pytest.approx(0.1)
    assert np.diff(np.log(found.lrs)) == pytest.approx([np.log(100) / 9] * 9)


def test_all_groups_of_an_object_keep_their_proportions(
    make: Make, recorder: type[Recorder]
) -> None:
    model, data = make().model, make().data
    backbone: dict[str, Any] = {
        "params": list(model.backbone.parameters()), "lr": torch.tensor(0.02),
    }  # fmt: skip
    optimizer = recorder([backbone, {"params": list(model.head.parameters())}], lr=0.1)
    trainer = Trainer(model, data, optimizer=optimizer, verbose=False, device="cpu", batch_size=4)
    trainer.lr_find(**LOW)
    assert np.asarray(recorder.seen)[[0, -1]] == pytest.approx(np.array([[2e-6, 1e-5], [0.2, 1]]))
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.02, 0.1])


def test_a_warm_up_from_zero_is_no_hindrance(make: Make, recorder: type[Recorder]) -> None:
    model, data = make().model, make().data
    optimizer = recorder(model.parameters(), lr=0.1)
    scheduler = LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0
    trainer = Trainer(
        model, data, optimizer=optimizer, scheduler=scheduler, verbose=False, device="cpu"
    )
    trainer.lr_find(**LOW)
    assert [recorder.seen[0], recorder.seen[-1]] == [[pytest.approx(1e-5)], [pytest.approx(1)]]


def test_a_factory_may_know_the_model(make: Make, recorder: type[Recorder]) -> None:
    model, data = make().model, make().data

    def factory(params: Any) -> Recorder:
        backbone: dict[str, Any] = {"params": list(model.backbone.parameters()), "lr": 0.02}
        return recorder([{"params": list(model.head.parameters())}, backbone], lr=0.1)

    trainer = Trainer(model, data, optimizer=factory, verbose=False, device="cpu", batch_size=4)
    before = everything_of(trainer)
    trainer.lr_find(**LOW)
    assert changed(before, everything_of(trainer)) == []
    assert recorder.seen[-1] == pytest.approx([1, 0.2])


def test_a_head_that_is_frozen_leaves_the_first_group(make: Make, recorder: type[Recorder]) -> None:
    trainer = make(freeze="head.*", optimizer=lambda params: recorder(params, lr=0.3))
    trainer.lr_find(**LOW)
    assert recorder.seen[-1] == pytest.approx([1])


def test_the_phase_has_its_own_rates(make: Make) -> None:
    trainer = make(freeze="backbone")
    head = Phase("head", 1, lr=7.0)
    everything = Phase("everything", 1, unfreeze="all", backbone_lr_factor=1e-9)
    assert trainer.lr_find(**LOW).phase == "probe"
    found = [trainer.lr_find(phases=[each], **LOW) for each in (head, everything)]
    assert [each.phase for each in found] == ["head", "everything"]
    assert found[0].lrs == found[1].lrs  # What a phase sets is not what is tried.


def test_the_head_starts_as_in_the_first_fit_only(make: Make) -> None:
    trainer = make(freeze="backbone", head_start="ridge", augmentation="light")
    nowhere: dict[str, Any] = {"min_lr": 1e-12, "max_lr": 1e-11, "num_steps": 12, "verbose": False}
    started = trainer.lr_find(**nowhere)
    assert np.mean(started.losses) < 0.5 * np.log(2)
    trainer.fit(1)
    with torch.no_grad():
        for parameter in trainer.model.head.parameters():
            parameter.zero_()
    assert trainer.lr_find(**nowhere).losses == pytest.approx([np.log(2)] * 12)


@pytest.mark.parametrize(
    ("options", "num_steps", "is_cached"),
    [
        ({}, 16, True),
        ({}, 10, False),  # Two and a half epochs: three views are of more pictures.
        ({"cache": FeatureCache(views=2)}, 10, True),
        ({"cache": FeatureCache(views=0)}, 10, True),
        ({"cache": FeatureCache(views="epochs")}, 16, True),
        ({"cache": False}, 16, False),
        ({"recipe": "finetune", "freeze": "none"}, 16, False),
    ],
)
def test_features_are_cached_where_that_is_no_more_work(
    options: dict[str, Any],
    num_steps: int,
    is_cached: bool,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    feeds: list[CachedFeed] = []

    class Spy(CachedFeed):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            feeds.append(self)

        def close(self) -> None:
            super().close()
            self.is_closed = True

    monkeypatch.setattr(lr_sweep, "CachedFeed", Spy)
    trainer = make(**({"freeze": "backbone"} | options))
    trainer.lr_find(**LOW | {"num_steps": num_steps})
    assert len(feeds) == is_cached
    assert all(each.is_closed for each in feeds)  # type: ignore[attr-defined]
    assert all(set(each.loaders) == {"train"} for each in feeds)


def test_cached_features_give_the_losses_of_live_ones(make: Make) -> None:
    torch.manual_seed(2)
    trainers = [
        make(freeze="backbone", cache=each) for each in (FeatureCache(views="epochs"), False)
    ]
    trainers[1].model.load_state_dict(trainers[0].model.state_dict())
    cached, live = (each.lr_find(**LOW | {"num_steps": 16}) for each in trainers)
    assert cached.losses == pytest.approx(live.losses, rel=1e-4)


def test_it_ends_where_the_loss_diverges(make: Make) -> None:
    trainer = make(cache=False)
    found = trainer.lr_find(min_lr=1e-3, max_lr=1e6, num_steps=60, verbose=False)
    assert found.end == "diverged"
    assert 3 < len(found.losses) < 60
    assert found.smoothed[-1] > 4 * min(found.smoothed)
    assert all(each <= 4 * min(found.smoothed) for each in found.smoothed[:-1])
    assert len(found.lrs) == len(found.smoothed) == len(found.smoothed_lrs) == len(found.losses)


@pytest.mark.parametrize("call", [1, 6])
def test_it_ends_where_the_loss_is_not_finite(call: int, make: Make) -> None:
    calls: list[int] = []

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        loss = nn.functional.cross_entropy(logits, targets)
        return loss * float("nan") if len(calls) == call else loss

    found = make(criterion=criterion).lr_find(**LOW)
    assert (found.end, len(found.losses), len(calls)) == ("not_finite", call - 1, call)


def test_losses_below_zero_are_no_divergence(make: Make) -> None:
    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, targets) - 5

    assert make(criterion=criterion).lr_find(**LOW).end == "max_lr"


def test_a_criterion_may_know_the_model(make: Make) -> None:
    class Decays(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
            return sum((each**2).sum() for each in self.model.parameters()) + 0 * logits.sum()

    trainer = make()
    criterion = Decays(trainer.model)
    trainer = Trainer(trainer.model, trainer.data, criterion=criterion, verbose=False, device="cpu")
    before = everything_of(trainer)
    found = trainer.lr_find(min_lr=0.01, max_lr=0.1, num_steps=12, verbose=False)
    assert found.losses[-1] < 0.9 * found.losses[0]
    assert changed(before, everything_of(trainer)) == []


def test_what_a_criterion_draws_is_not_the_callers(make: Make) -> None:
    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        scale = 1 + random.random() + np.random.rand()
        return nn.functional.cross_entropy(logits, targets) * scale

    trainer = make(criterion=criterion)
    before = everything_of(trainer)
    first, second = trainer.lr_find(**LOW), trainer.lr_find(**LOW)
    assert first == second
    assert changed(before, everything_of(trainer)) == []


def test_the_result_is_printed_unless_that_is_not_wanted(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make()
    found = trainer.lr_find(**LOW)
    assert capsys.readouterr().out == ""
    assert trainer.lr_find(**LOW | {"verbose": True}) == found
    assert capsys.readouterr().out == f"{found}\n"


def test_pictures_that_cannot_be_read_are_left_out_as_in_a_fit(make: Make, tmp_path: Path) -> None:
    data = load_folders(make_image_folder(tmp_path / "more"))
    trainer = make(data=data, on_error="skip", max_skipped=1.0)
    data.train.paths[0].write_bytes(b"no picture")
    assert len(trainer.lr_find(**LOW).losses) == 12
    assert trainer._job.train_loader.skipped == ()
    for path in data.train.paths:
        path.write_bytes(b"no picture")
    message = "No picture of the train split can be read."
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        trainer.lr_find(**LOW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_lr": 0}, "`min_lr` should be a finite number above 0, found 0."),
        ({"max_lr": float("inf")}, "`max_lr` should be a finite number above 0, found inf."),
        ({"min_lr": 1, "max_lr": 1}, "`min_lr` should be below `max_lr`, found 1.0 and 1.0."),
        ({"num_steps": 9}, "`num_steps` should be an integer of at least 10, found 9."),
    ],
)
def test_values_that_cannot_work(options: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make().lr_find(**options)


def test_a_solver_has_no_rate(make: Make) -> None:
    message = (
        'The phase `probe` has no learning rate to find: solver="lbfgs" fits the head without '
        'one. Take solver="sgd", or just fit.'
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(freeze="backbone", solver="lbfgs").lr_find()


def test_few_pictures(make: Make, tmp_path: Path) -> None:
    data = load_folders(make_image_folder(tmp_path / "few", num_train=3))
    message = (
        "Finding a learning rate takes at least 8 training pictures, found 6. Take the rate of "
        "the recipe."
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        make(data=data).lr_find()


def test_an_optimizer_without_a_rate(make: Make) -> None:
    message = (
        "The optimizer should have a learning rate above 0 for the head, which those of its other "
        "groups are scaled with, found 0. Any will do."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(optimizer=lambda params: SGD(params, lr=0.0)).lr_find()


def test_what_a_fit_would_not_take(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"^The recipe `finetune` trains the backbone,"):
        make(freeze="backbone", recipe="finetune").lr_find()


@pytest.mark.slow
def test_photographs(photographs: Path) -> None:
    data = load_folders(photographs)
    model = build_model("efficientnet_lite0", 2, seed=0)
    trainer = Trainer(model, data, recipe="probe", batch_size=8, verbose=False)
    found: LRFind = trainer.lr_find(min_lr=1e-5, max_lr=1.0, num_steps=40, verbose=False)
    assert found.suggestion is not None
    assert 3e-4 < found.suggestion < 0.1
