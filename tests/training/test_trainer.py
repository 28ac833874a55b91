from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from transferkit.artifacts.format import read_file
from transferkit.data import ImageDataset, ImageLoader, ImageSplits, load_folders
from transferkit.errors import ConfigError, FreezeError, ImageError, OutputError, UnknownNameError
from transferkit.images import Preprocess
from transferkit.models import BackboneSpec, Classifier, build_model
from transferkit.testing import make_image_folder
from transferkit.training import Callback, EpochRecord, History, Schedule, Trainer
from transferkit.training.fitting import Fit
from transferkit.training.schedulers import make_schedule

Make = Callable[..., Trainer]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_it_learns_what_is_easy(make: Make) -> None:
    trainer = make(lr=0.05)
    history = trainer.fit(10)
    assert history.best.val_accuracy == 1.0
    assert history[-1].train_loss < history[0].train_loss


def test_it_overfits_eight_pictures(tiny_spec: BackboneSpec, tmp_path: Path) -> None:
    # One class name, one colour: the noise alone tells these pictures apart.
    root = make_image_folder(tmp_path / "noise", num_train=4, num_val=4, class_names=("a", "aa"))
    data = load_folders(root)
    shuffled = ImageDataset(data.train.paths, [0, 1, 0, 1, 1, 0, 1, 0], class_names=("a", "aa"))
    model = build_model("resnet18", 2, weights=None, preprocess=tiny_spec.preprocess)
    trainer = Trainer(
        model, ImageSplits(shuffled, data.val), augmentation="none", optimizer="adamw",
        lr=0.001, batch_size=8, scheduler="none", verbose=False, device="cpu",
    )  # fmt: skip
    history = trainer.fit(20)
    assert history[-1].train_accuracy == 1.0
    assert history[-1].train_loss < 0.1


def plain_loop(
    model: Classifier, data: ImageSplits, *, epochs: int, batch_size: int, seed: int, lr: float
) -> list[tuple[float, float, float, float]]:
    """Train as the lesson does, in plain PyTorch, on the loader's batches."""
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    train = ImageLoader(data.train, model.preprocess.train("none"), shuffle=True, **options)
    val = ImageLoader(data.val, model.preprocess.eval(), **options)
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    scheduler = StepLR(optimizer, step_size=2, gamma=0.1)
    rows = []
    for epoch in range(1, epochs + 1):
        row = []
        for phase, loader in (("train", train), ("val", val)):
            model.train(phase == "train")
            loss_sum, hits, count = 0.0, 0, 0
            for images, targets, _ in loader.batches(epoch=epoch):
                optimizer.zero_grad()
                with torch.set_grad_enabled(phase == "train"):
                    logits = model(images)
                    loss = nn.functional.cross_entropy(logits, targets)
                    if phase == "train":
                        loss.backward()  # type: ignore[no-untyped-call]
                        optimizer.step()
                loss_sum += loss.item() * len(images)
                hits += int((logits.argmax(1) == targets).sum())
                count += len(images)
            row += [loss_sum / count, hits / count]
        scheduler.step()
        rows.append(tuple(row))
    return rows  # type: ignore[return-value]


@pytest.mark.parametrize(("freeze", "bn"), [("none", "frozen"), ("backbone", "adapt")])
def test_it_computes_what_a_plain_loop_computes(
    tiny_spec: BackboneSpec, tiny_splits: ImageSplits, freeze: str, bn: Any
) -> None:
    # Dropout draws from a generator that the two loops seed differently.
    spec = replace(tiny_spec, build=lambda: without_dropout(tiny_spec.build()))
    model = build_model(spec, 2, weights=None, freeze=freeze, bn=bn)
    expected = plain_loop(model, tiny_splits, epochs=4, batch_size=3, seed=5, lr=0.02)
    twin = build_model(spec, 2, weights=None, freeze=freeze, bn=bn)
    trainer = Trainer(
        twin, tiny_splits, optimizer="sgd", lr=0.02, backbone_lr_factor=1.0, scheduler="step",
        scheduler_options={"step_size": 2}, batch_size=3, seed=5, augmentation="none",
        verbose=False, device="cpu",
    )  # fmt: skip
    history = trainer.fit(4)
    found = [(r.train_loss, r.train_accuracy, r.val_loss, r.val_accuracy) for r in history]
    assert np.array(found) == pytest.approx(np.array(expected), rel=1e-4)
    assert history.column("lr") == pytest.approx([0.02, 0.02, 0.002, 0.002])


def without_dropout(network: nn.Module) -> nn.Module:
    network.drop = nn.Identity()
    return network


def test_frozen_state_is_byte_identical_after_a_fit(make: Make) -> None:
    trainer = make(freeze="backbone", lr=0.1)
    before, head = state(trainer.model.backbone), state(trainer.model.head)
    trainer.fit(3)
    assert same(before, state(trainer.model.backbone))
    assert not same(head, state(trainer.model.head))


def test_adapting_batchnorm_moves_its_statistics_only(make: Make) -> None:
    trainer = make(freeze="backbone", bn="adapt")
    before = state(trainer.model.backbone)
    trainer.fit(1)
    after = state(trainer.model.backbone)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.split(".")[-1].startswith(("running_", "num_batches")) for name in changed)


def test_fixed_batchnorm_keeps_its_statistics_while_all_weights_train(make: Make) -> None:
    trainer = make(bn="fixed", backbone_lr_factor=1.0)
    before = state(trainer.model.backbone)
    trainer.fit(2)
    after = state(trainer.model.backbone)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"bn1.weight", "conv1.weight"} <= changed
    assert not any(name.split(".")[-1].startswith(("running_", "num_b")) for name in changed)


def test_two_runs_of_one_seed_agree_and_workers_do_not_matter(make: Make) -> None:
    first, second = make(seed=3), make(seed=3, num_workers=2)
    first.fit(2)
    second.fit(2)
    assert same(state(first.model), state(second.model))
    other = make(seed=4)
    other.fit(2)
    assert not same(state(first.model), state(other.model))


class Scripted(Callback):
    """Give each epoch the validation accuracy of a script, and note the weights."""

    def __init__(self, accuracies: list[float]) -> None:
        self.accuracies = accuracies
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        self.weights.append(state(trainer.model))


def test_the_best_epochs_weights_return(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted([0.5, 0.9, 0.7])
    trainer = make(callbacks=[script], lr=0.05)
    record = Fit._record

    def scripted(fit: Fit, epoch: int, *rest: Any, **named: Any) -> EpochRecord:
        found = record(fit, epoch, *rest, **named)
        return replace(found, val_accuracy=script.accuracies[epoch - 1])

    monkeypatch.setattr(Fit, "_record", scripted)
    history = trainer.fit(3)
    assert history.best.epoch == 2
    assert same(state(trainer.model), script.weights[1])
    assert not same(state(trainer.model), script.weights[2])


class Stop(Callback):
    """Raise at the given step of the given epoch."""

    def __init__(self, error: BaseException, epoch: int) -> None:
        self.error, self.epoch, self.now, self.ended = error, epoch, 0, False

    def on_epoch_start(self, trainer: Trainer, epoch: int) -> None:
        self.now = epoch

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        if self.now == self.epoch and step == 2:
            raise self.error

    def on_fit_end(self, trainer: Trainer, history: History) -> None:
        self.ended = True


def test_ctrl_c_keeps_the_best_weights_so_far(make: Make) -> None:
    stop, script = Stop(KeyboardInterrupt(), epoch=3), Scripted([])
    trainer = make(callbacks=[script, stop])
    history = trainer.fit(5)
    assert history.status == "interrupted"
    assert len(history) == 2
    assert same(state(trainer.model), script.weights[history.best.epoch - 1])
    assert stop.ended


def test_ctrl_c_in_the_first_epoch_changes_nothing(make: Make) -> None:
    trainer = make(callbacks=[Stop(KeyboardInterrupt(), epoch=1)])
    before = state(trainer.model)
    history = trainer.fit(5)
    assert (len(history), history.status) == (0, "interrupted")
    assert same(before, state(trainer.model))


def test_an_error_keeps_the_best_weights_and_comes_through(make: Make) -> None:
    script = Scripted([])
    trainer = make(callbacks=[script, Stop(RuntimeError("boom"), epoch=2)])
    with pytest.raises(RuntimeError, match=r"^boom$"):
        trainer.fit(3)
    assert trainer.history.status == "failed"
    assert same(state(trainer.model), script.weights[0])


def test_a_broken_picture_is_named(make: Make, tiny_splits: ImageSplits) -> None:
    bad = tiny_splits.train.paths[5]
    bad.write_bytes(b"this is no picture")
    message = (
        f"Cannot read the picture `{bad}`: it is not a JPEG, PNG, WEBP, BMP, GIF or TIFF file, "
        f"whatever its name says."
    )
    for num_workers in (0, 1):
        trainer = make(num_workers=num_workers)
        with pytest.raises(ImageError, match=f"^{re.escape(message)}$"):
            trainer.fit(1)


def test_the_callers_random_state_and_mode_are_left_alone(make: Make) -> None:
    trainer = make()
    trainer.model.eval()
    seed_all()
    expected = draw_from_all()
    seed_all()
    trainer.fit(1)
    assert draw_from_all() == expected
    assert not trainer.model.training


def seed_all() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


def draw_from_all() -> tuple[float, float, float]:
    return torch.rand(1).item(), random.random(), np.random.rand()


def test_a_callback_may_end_the_fit(make: Make) -> None:
    class Enough(Callback):
        def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
            trainer.should_stop = record.epoch == 2

    history = make(callbacks=[Enough()]).fit(5)
    assert (len(history), history.status) == (2, "stopped")


def test_events_come_in_order(make: Make) -> None:
    events: list[str] = []

    class Note(Callback):
        def __getattribute__(self, name: str) -> Any:
            if name.startswith("on_"):
                events.append(name)
            return super().__getattribute__(name)

    make(callbacks=[Note()], batch_size=8).fit(1)
    assert events == [
        "on_fit_start", "on_phase_start", "on_epoch_start", "on_step_end", "on_step_end",
        "on_best", "on_epoch_end", "on_fit_end",
    ]  # fmt: skip


def test_recipe_follows_what_is_frozen(make: Make) -> None:
    assert make(freeze="backbone").recipe.name == "probe"
    assert make().recipe.name == "finetune"
    assert make(recipe="tutorial").recipe.name == "tutorial"


def test_optimizer_and_scheduler_as_objects(
    make: Make, tiny_spec: BackboneSpec, tiny_splits: ImageSplits
) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = StepLR(optimizer, 1, 0.5)
    trainer = Trainer(
        model, tiny_splits, optimizer=optimizer, scheduler=scheduler, verbose=False, device="cpu"
    )
    assert trainer.fit(3).column("lr") == pytest.approx([0.01, 0.005, 0.0025])
    assert trainer.history.settings["optimizer"] == "Adam"


def test_a_second_fit_with_an_optimizer_object_starts_at_its_rate(
    tiny_spec: BackboneSpec, tiny_splits: ImageSplits
) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    trainer = Trainer(
        model, tiny_splits, optimizer=optimizer, scheduler="cosine", verbose=False, device="cpu"
    )
    assert trainer.fit(2)[0].lr == 0.01
    assert trainer.fit(2)[0].lr == 0.01


def test_scheduler_by_factory(make: Make) -> None:
    trainer = make(
        lr=0.1,
        scheduler=lambda optimizer, *, num_epochs, steps_per_epoch: Schedule(
            torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_epochs * steps_per_epoch),
            interval="step",
        ),
    )
    assert trainer.fit(2).column("lr") == pytest.approx([0.1, 0.05])


def test_plateau_sees_the_record(make: Make) -> None:
    trainer = make(
        scheduler="plateau",
        scheduler_options={"patience": 0},
        lr=0.1,
        criterion=lambda logits, targets: logits.sum() * 0,
    )
    assert trainer.fit(3).column("lr") == pytest.approx([0.1, 0.1, 0.01])


def test_history_holds_the_settings(make: Make) -> None:
    settings = make(freeze="backbone", seed=7).fit(1).settings
    assert settings["seed"] == 7
    assert settings["freeze_plan"] == {"patterns": ["backbone.*"], "bn": "frozen", "until": None}
    assert (settings["num_train"], settings["num_val"], settings["epochs"]) == (16, 8, 1)


def test_evaluate_splits_and_data_sets(make: Make, tiny_splits: ImageSplits) -> None:
    trainer = make()
    assert trainer.evaluate().num_images == 8
    assert trainer.evaluate("train").num_images == 16
    assert trainer.evaluate(tiny_splits.val).to_dict() == trainer.evaluate("val").to_dict()
    message = "There is no split `test`; there are train, val."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        trainer.evaluate("test")
    other = ImageDataset(
        tiny_splits.val.paths, tiny_splits.val.targets.tolist(), class_names=("red", "blue")
    )
    message = (
        "The data set has the classes ['red', 'blue'], the model was trained on "
        "['blue', 'red']. They should be the same in the same order."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        trainer.evaluate(other)


def test_custom_augmentation(make: Make) -> None:
    seen: list[tuple[int, ...]] = []

    def crop(image: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(image.shape))
        return image[:, :32, :32]

    make(augmentation=crop).fit(1)
    assert seen == [(3, 32, 40)] * 16


def test_classes_of_data_and_model_must_fit(
    tiny_spec: BackboneSpec, tiny_splits: ImageSplits
) -> None:
    message = (
        "The data has 2 classes (blue, red) and the model 3. "
        "Build it with `num_classes=len(data.class_names)`."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        Trainer(build_model(tiny_spec, 3, weights=None), tiny_splits)


@pytest.mark.parametrize("epochs", [0, -1, 1.5, True])
def test_epochs_are_checked(make: Make, epochs: Any) -> None:
    message = f"`epochs` should be an integer of at least 1, found {epochs!r}."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make().fit(epochs)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"scheduler": "cosin"}, UnknownNameError),
        ({"optimizer": "sdg"}, UnknownNameError),
        ({"augmentation": "tutorail"}, UnknownNameError),
        ({"recipe": "prob"}, UnknownNameError),
        ({"freeze": "*"}, FreezeError),
        ({"batch_size": 0}, ConfigError),
        ({"seed": -1}, ConfigError),
        ({"device": "cuda:99"}, ConfigError),
        ({"num_workers": -1}, ConfigError),
        ({"scheduler_options": {"nope": 1}, "scheduler": "step"}, ConfigError),
    ],
)
def test_bad_settings_are_found_before_anything_runs(
    make: Make, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        make(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"criterion": "ce"},
            "`criterion` should be a callable from (logits, targets) to the loss, found 'ce'.",
        ),
        ({"augmentation": 3}, "`augmentation` should be a preset's name or a callable, found 3."),
        ({"callbacks": [3]}, "`callbacks` should be a list of Callbacks, found [3]."),
        ({"recipe": 3}, "`recipe` should be a recipe or the name of one, found int."),
        (
            {"optimizer": 3},
            "`optimizer` should be a name, a factory or a torch.optim.Optimizer, found 3.",
        ),
        (
            {"scheduler": 3},
            "`scheduler` should be a name, a factory, a Schedule or a scheduler, found 3.",
        ),
        (
            {"data": "folder"},
            "`data` should be ImageSplits, as `load_folders` gives them, found str.",
        ),
    ],
)
def test_arguments_of_another_kind(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(**options)


@pytest.mark.parametrize(
    ("criterion", "found"),
    [
        (nn.CrossEntropyLoss(reduction="none"), "(4,)"),
        (lambda logits, targets: 0.5, "float"),
    ],
)
def test_criterion_that_gives_no_scalar(make: Make, criterion: Any, found: str) -> None:
    message = (
        f"The criterion should return the mean loss of the batch as a scalar tensor, found {found}."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(criterion=criterion).fit(1)


class Viewing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.conv(images)
        if features.shape[0] == 13:
            raise RuntimeError("thirteen")
        flat: torch.Tensor = features.view(len(images), -1)
        return flat


def test_network_that_needs_channels_first_is_told_so(tiny_splits: ImageSplits) -> None:
    preprocess = Preprocess(crop_size=32, resize_size=32)
    model = build_model(Viewing(), 2, num_features=32, preprocess=preprocess)
    options: dict[str, Any] = {"verbose": False, "device": "cpu", "batch_size": 4}
    message = (
        "The backbone `Viewing` calls `view` on activations, which works with the channels "
        "first only. Pass `channels_last=False`."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        Trainer(model, tiny_splits, **options).fit(1)
    assert len(Trainer(model, tiny_splits, channels_last=False, **options).fit(1)) == 1
    with pytest.raises(RuntimeError, match=r"^thirteen$"):
        Trainer(model, tiny_splits, **(options | {"batch_size": 13})).fit(1)


def test_settings_tell_the_optimizers_own_rates(make: Make) -> None:
    adam = make(optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.0005))
    settings = adam.fit(1).settings
    assert (settings["lr"], settings["momentum"]) == (0.0005, None)


def test_an_optimizer_object_is_left_at_its_rate(
    tiny_spec: BackboneSpec, tiny_splits: ImageSplits
) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options: dict[str, Any] = {"optimizer": optimizer, "verbose": False, "device": "cpu"}
    Trainer(model, tiny_splits, scheduler="one_cycle", **options).fit(2)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.1, 0.9)
    optimizer.param_groups[0]["lr"] = 0.02
    second = Trainer(model, tiny_splits, scheduler="none", **options).fit(1)
    assert second.column("lr") == [0.02]


def test_a_failed_fit_leaves_an_optimizer_object_at_its_rate(
    tiny_spec: BackboneSpec, tiny_splits: ImageSplits
) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stop = Stop(RuntimeError("boom"), epoch=3)
    trainer = Trainer(model, tiny_splits, optimizer=optimizer, scheduler="cosine",
                      callbacks=[stop], batch_size=4, verbose=False, device="cpu")  # fmt: skip
    with pytest.raises(RuntimeError, match=r"^boom$"):
        trainer.fit(4)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_numpys_numbers_can_be_saved(make: Make, tmp_path: Path) -> None:
    trainer = make(batch_size=np.int64(4), scheduler="step",
                   scheduler_options={"step_size": np.int64(3)})  # fmt: skip
    trainer.fit(1)
    assert trainer.save(tmp_path / "m.safetensors").exists()


def test_one_cycle_keeps_the_momentum(make: Make) -> None:
    seen: set[float] = set()
    optimizers: list[torch.optim.Optimizer] = []

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        optimizers.append(torch.optim.SGD(parameters, lr=0.01, momentum=0.5))
        return optimizers[-1]

    class Note(Callback):
        def on_step_end(self, trainer: Trainer, step: int) -> None:
            seen.add(optimizers[-1].param_groups[0]["momentum"])

    make(optimizer=sgd, scheduler="one_cycle", callbacks=[Note()]).fit(2)
    assert seen == {0.5}


def test_a_network_that_keeps_a_constant_trains_after_an_evaluation(make: Make) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.scale: torch.Tensor | None = None

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            features = self.conv(images).mean(dim=(2, 3))
            if self.scale is None:
                self.scale = torch.ones_like(features[:1])
            scaled: torch.Tensor = features * self.scale
            return scaled

    data = make().data
    preprocess = Preprocess(crop_size=32, resize_size=32)
    model = build_model(Scaled(), 2, num_features=4, preprocess=preprocess)
    trainer = Trainer(model, data, verbose=False, device="cpu")
    trainer.evaluate()
    assert len(trainer.fit(1)) == 1


def test_lbfgs_is_refused(make: Make) -> None:
    message = (
        "LBFGS evaluates the loss several times in a step, which the training loop does not. "
        "Take a first-order optimizer, such as SGD or AdamW."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(optimizer=torch.optim.LBFGS)


def test_model_of_another_kind(tiny_splits: ImageSplits) -> None:
    message = "`model` should be a Classifier, as `build_model` makes one, found Linear."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        Trainer(nn.Linear(2, 2), tiny_splits)  # type: ignore[arg-type]


def test_channels_last_changes_the_last_bits_only(make: Make) -> None:
    first = make(channels_last=True).fit(2)
    second = make(channels_last=False).fit(2)
    assert first.column("train_loss") == pytest.approx(second.column("train_loss"), rel=1e-3)


def test_a_fit_with_a_broken_epoch_can_be_saved(make: Make, tmp_path: Path) -> None:
    trainer = make()
    trainer.fit(1)
    broken_epoch = replace(trainer.history[0], epoch=2, val_loss=float("nan"))
    trainer.history.records.append(broken_epoch)
    path = trainer.save(tmp_path / "m.safetensors")
    _, data = read_file(path)
    assert [record["val_loss"] is None for record in data["history"]["records"]] == [False, True]


def test_save_into_a_missing_folder(make: Make, tmp_path: Path) -> None:
    target = tmp_path / "none" / "model.safetensors"
    message = (
        f"Cannot write `{target}`: the folder `{target.parent}` does not exist. Create it first."
    )
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        make().save(target)


@pytest.mark.gpu
def test_fit_on_an_accelerator(make: Make) -> None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        pytest.skip("PyTorch finds no accelerator")
    trainer = make(device="auto", lr=0.05)
    assert trainer.device.type == accelerator.type
    assert trainer.fit(5).best.val_accuracy == 1.0


def test_schedule_error_names_the_factory() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(
        ConfigError, match=r"^The scheduler 'broken' cannot be built with the options \{\}: no\.$"
    ):
        make_schedule(broken, optimizer, num_epochs=1, steps_per_epoch=1, options={})


def broken(optimizer: torch.optim.Optimizer, *, num_epochs: int, steps_per_epoch: int) -> Schedule:
    raise ValueError("no")


def test_pictures_are_read_as_the_model_wants_unless_the_user_reads_them(
    make: Make, tiny_splits: ImageSplits
) -> None:
    calls: list[object] = []

    def decode(source: Any) -> torch.Tensor:
        calls.append(source)
        return torch.zeros(3, 40, 40, dtype=torch.uint8)

    splits = replace(tiny_splits, train=tiny_splits.train.with_decode(decode))
    trainer = make(data=splits)
    trainer.fit(1)
    assert len(calls) == len(tiny_splits.train)
    assert trainer._job.val_loader.dataset.decode == trainer.model.preprocess.decode
