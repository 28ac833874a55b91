from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from transferkit.data import load_folders
from transferkit.errors import BackboneError, ConfigError, OutputError
from transferkit.images import Preprocess
from transferkit.models import BackboneSpec, get_backbone
from transferkit.models.stages import Stage
from transferkit.testing import (
    check_backbone,
    check_callback,
    check_scheduler,
    make_image_folder,
)
from transferkit.training import Callback, EpochRecord, History, Trainer

# check_backbone


class Body(nn.Module):
    """Features of 3 means, through a layer and what `change` does to them."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda features: features) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.register_buffer("counter", torch.zeros(()))
        self.change = change

    def forward(self, images: Tensor) -> Tensor:
        return self.change(self.layer(images.mean(dim=(2, 3))))


class Counting(Body):
    """Counts its passes, whatever its mode."""

    counter: Tensor

    def forward(self, images: Tensor) -> Tensor:
        self.counter += 1
        return super().forward(images)


class Deaf(Body):
    """Takes no gradients."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


def make_spec(build: Callable[[], nn.Module], num_features: int = 5) -> BackboneSpec:
    return BackboneSpec(
        name="body",
        build=build,
        num_features=num_features,
        preprocess=Preprocess(crop_size=8, resize_size=8),
    )


def test_good_backbones_pass(tiny_spec: BackboneSpec) -> None:
    check_backbone(make_spec(Body))
    check_backbone(tiny_spec)
    check_backbone(tiny_spec, image_size=48)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18", "timm:convnext_atto"])
def test_built_in_backbones_pass(name: str) -> None:
    check_backbone(get_backbone(name), image_size=64)


def test_a_backbone_without_parameters_passes() -> None:
    check_backbone(make_spec(nn.Flatten, 3 * 8 * 8))


def expect(build: Callable[[], nn.Module], problem: str) -> None:
    with pytest.raises(BackboneError) as error:
        check_backbone(make_spec(build))
    assert str(error.value) == f"Backbone `body` breaks its contract: {problem}."


def test_features_that_are_not_finite_are_found() -> None:
    expect(lambda: Body(lambda features: features / 0), "its logits are not finite")


def test_features_of_another_type_are_found() -> None:
    expect(
        lambda: Body(lambda features: features.double()), "features are torch.float64, not float32"
    )


def test_features_of_another_shape_are_found() -> None:
    with pytest.raises(BackboneError, match=r"^Backbone `body` should give features of the shape"):
        check_backbone(make_spec(lambda: Body(lambda features: features[:, :, None])))


def test_a_backbone_that_no_gradient_reaches_is_found() -> None:
    expect(Deaf, "no gradient reaches its parameters")


def test_a_backbone_that_changes_when_frozen_is_found() -> None:
    expect(Counting, "frozen tensors changed in training: ['counter']")


def test_a_backbone_whose_builds_differ_is_found() -> None:
    counter = itertools.count()

    def build() -> nn.Module:
        body = Body()
        nn.init.constant_(body.layer.bias, float(next(counter)))
        return body

    expect(build, "two builds with the same seed give other weights")


def test_features_that_depend_on_the_batch_are_found() -> None:
    expect(
        lambda: Body(lambda features: features - features.mean(dim=0)),
        "the features of an image depend on the others in the batch",
    )


class Drifting(Body):
    """Changes its first layer whenever the network as a whole is in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(5, 5)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.layer.bias.add_(1)
        features: Tensor = self.last(super().forward(images))
        return features


def test_a_stage_that_changes_while_later_ones_train_is_found() -> None:
    expect(Drifting, "frozen tensors changed in training: ['layer.bias']")


def test_stages_that_leave_a_parameter_out_are_found() -> None:
    class Partial(BackboneSpec):
        def find_stages(self, network: nn.Module) -> tuple[Stage, ...]:
            return (Stage("layer", (), ("layer.weight",)),)

    spec = Partial(
        name="body", build=Body, num_features=5, preprocess=Preprocess(crop_size=8, resize_size=8)
    )
    with pytest.raises(BackboneError) as error:
        check_backbone(spec)
    assert str(error.value) == (
        "Backbone `body` breaks its contract: its parameter `layer.bias` lies in 0 stages."
    )


# check_scheduler


def test_good_scheduler_gives_its_rates() -> None:
    def factory(optimizer: Any, *, num_epochs: int, steps_per_epoch: int) -> Any:
        return LambdaLR(optimizer, lambda epoch: 1 - epoch / num_epochs)

    assert check_scheduler(factory, num_epochs=2, steps_per_epoch=3) == [1.0] * 3 + [0.5] * 3


@pytest.mark.parametrize("rate", [-0.5, float("inf"), float("nan")])
def test_rate_that_cannot_work_is_found(rate: float) -> None:
    def factory(optimizer: Any, *, num_epochs: int, steps_per_epoch: int) -> Any:
        return LambdaLR(optimizer, lambda epoch: 1.0 if epoch == 0 else rate)

    with pytest.raises(ConfigError) as error:
        check_scheduler(factory)
    assert str(error.value) == f"The scheduler gives the learning rate {rate}; expected at least 0."


# make_image_folder


def read_all(root: Path) -> dict[str, Any]:
    return {
        path.relative_to(root).as_posix(): np.asarray(Image.open(path))
        for path in sorted(root.rglob("*.png"))
    }


def test_folder_has_the_pictures_that_were_asked_for(tmp_path: Path) -> None:
    root = make_image_folder(
        str(tmp_path / "a" / "b"), class_names=["x", "y", "z"], num_train=3, num_val=1, size=(9, 5)
    )
    assert root == tmp_path / "a" / "b"
    assert load_folders(root).describe() == "train 9 (3 x, 3 y, 3 z); val 3 (1 x, 1 y, 1 z)"
    assert {pixels.shape for pixels in read_all(root).values()} == {(5, 9, 3)}


def test_seed_rules_the_pixels(tmp_path: Path) -> None:
    first, second, other = (
        read_all(make_image_folder(tmp_path / name, num_train=2, num_val=2, seed=seed))
        for name, seed in (("first", 1), ("second", 1), ("other", 2))
    )
    assert first.keys() == second.keys() == other.keys()
    for name in first:
        assert np.array_equal(first[name], second[name])
        assert not np.array_equal(first[name], other[name])
    pixels = [each.tobytes() for each in first.values()]
    assert len(set(pixels)) == len(pixels)


def test_each_class_has_a_colour_of_its_own(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, class_names=["blue", "red", "other", "another"])
    means: dict[str, list[Any]] = {}
    for name, pixels in read_all(root).items():
        means.setdefault(name.split("/")[1], []).append(pixels.mean(axis=(0, 1)))
    centres = {name: np.mean(values, axis=0) for name, values in means.items()}
    assert int(np.argmax(centres["blue"])) == 2
    assert int(np.argmax(centres["red"])) == 0
    for one, two in itertools.combinations(centres, 2):
        assert float(np.abs(centres[one] - centres[two]).max()) > 20


def test_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "train" / "blue"
    with pytest.raises(OutputError) as error:
        make_image_folder(tmp_path / "file")
    assert str(error.value) == (
        f"Cannot write into the folder `{folder}`: not a directory. "
        f"Choose a folder that exists or can be created and that you may write to."
    )


# check_callback


class Eager(Callback):
    """Do something to the trainer whenever an event comes."""

    def __init__(self, event: str, act: Callable[..., object]) -> None:
        setattr(self, event, act)


def expect_of_callback(callback: Callback, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_callback(callback)
    assert (
        str(error.value) == f"Callback `{type(callback).__name__}` breaks its contract: {problem}."
    )


def test_a_good_callback_passes() -> None:
    class Halve(Callback):
        def __init__(self) -> None:
            self.first: float | None = None

        def on_fit_start(self, trainer: Trainer, num_epochs: int) -> None:
            self.first = None

        def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
            self.first = record.train_loss if self.first is None else self.first
            trainer.should_stop |= record.train_loss < self.first / 2

        def state_dict(self) -> dict[str, Any]:
            return {"first": self.first}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.first = state["first"]

    check_callback(Halve())


def test_what_is_no_callback_is_found() -> None:
    wrong: Any = print
    message = "`callback` should be a Callback, found builtin_function_or_method."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_callback(wrong)


def fill_weights(trainer: Trainer, *_: object) -> None:
    with torch.no_grad():
        for parameter in trainer.model.head.parameters():
            parameter.fill_(0.5)


@pytest.mark.parametrize(
    ("event", "act", "problem"),
    [
        ("on_step_end", fill_weights, "the results of epoch 1"),
        ("on_step_end", lambda trainer, _: trainer.model.eval(), "the results of epoch 3"),
        ("on_epoch_end", fill_weights, "the weights in epoch 1"),
        ("on_fit_end", fill_weights, "the weights that are kept"),
    ],
)
def test_a_callback_that_changes_the_fit_is_found(event: str, act: Any, problem: str) -> None:
    expect_of_callback(Eager(event, act), f"it changes {problem}")


def test_a_callback_that_remembers_a_fit_is_found() -> None:
    class Patient(Callback):
        num_epochs = 0

        def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
            self.num_epochs += 1
            trainer.should_stop = self.num_epochs >= 3

    expect_of_callback(
        Patient(),
        "its first fit has 3 epochs and its second 1: something is left from the first",
    )


class Odd(Callback):
    """Has a state that is no plain JSON data."""

    def __init__(self, value: object) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}


@pytest.mark.parametrize("value", [float("-inf"), Path("a"), {1, 2}])
def test_a_state_that_is_no_json_is_found(value: object) -> None:
    with pytest.raises((TypeError, ValueError)) as words:
        json.dumps({"value": value}, allow_nan=False)
    expect_of_callback(Odd(value), f"its state is no JSON data ({words.value})")


def test_a_state_that_json_changes_is_found() -> None:
    problem = "its state {'value': (1, 2)} is {'value': [1, 2]} after JSON"
    expect_of_callback(Odd((1, 2)), problem)


def test_a_state_that_is_not_loaded_is_found() -> None:
    class Deaf(Callback):
        num_steps = 0

        def on_fit_start(self, trainer: Trainer, num_epochs: int) -> None:
            self.num_steps = 0

        def on_step_end(self, trainer: Trainer, step: int) -> None:
            self.num_steps += 1

        def state_dict(self) -> dict[str, Any]:
            return {"num_steps": self.num_steps}

    expect_of_callback(Deaf(), "it loads {'num_steps': 2} and then has another state")


def test_a_callback_that_ends_without_a_start_is_found() -> None:
    class Needy(Callback):
        has_started = False

        def on_fit_start(self, trainer: Trainer, num_epochs: int) -> None:
            self.has_started = True

        def on_fit_end(self, trainer: Trainer, history: History) -> None:
            if not self.has_started:
                raise ValueError("what?")
            self.has_started = False

    expect_of_callback(Needy(), "`on_fit_end` fails after `Z` (ValueError('what?'))")


def test_an_error_of_a_callback_comes_through() -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match=r"^boom$"):
        check_callback(Eager("on_best", fail))
