from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from transferkit.errors import ConfigError, FreezeError, UnknownNameError
from transferkit.models import BackboneSpec, Classifier, build_model
from transferkit.training.groups import Rates
from transferkit.training.optimizers import group_options, list_optimizers, make_optimizer


@pytest.fixture
def model(tiny_spec: BackboneSpec) -> Classifier:
    return build_model(tiny_spec, 2, weights=None, freeze="backbone")


def make(optimizer: Any, model: Classifier) -> torch.optim.Optimizer:
    rates = Rates(lr=0.5, backbone_lr_factor=0.1, stage_lr_factor=0.5)
    return make_optimizer(optimizer, model, rates=rates, momentum=0.8, weight_decay=0.01)


@pytest.mark.parametrize("name", list_optimizers())
def test_named_ones_hold_only_what_trains(name: str, model: Classifier) -> None:
    optimizer = make(name, model)
    held = [each for group in optimizer.param_groups for each in group["params"]]
    assert [id(each) for each in held] == [id(each) for each in model.head.parameters()]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["weight_decay"] == 0.01


def test_sgd_has_momentum(model: Classifier) -> None:
    assert make("sgd", model).param_groups[0]["momentum"] == 0.8


@pytest.mark.parametrize("name", list_optimizers())
def test_each_stage_has_a_rate_of_its_own(name: str, model: Classifier) -> None:
    model.freeze("none")
    groups = make(name, model).param_groups
    assert [group["name"] for group in groups] == ["head", "layer1", "conv1"]
    assert [group["lr"] for group in groups] == [0.5, 0.5 * 0.1, 0.5 * 0.1 * 0.5]


def test_without_rates_it_has_pytorchs_own(model: Classifier) -> None:
    optimizer = make_optimizer("adam", model, rates=None, momentum=0.8, weight_decay=0.0)
    assert optimizer.param_groups[0]["lr"] == torch.optim.Adam(model.parameters()).defaults["lr"]


def test_factory_and_object(model: Classifier) -> None:
    built = make(lambda parameters: torch.optim.RMSprop(parameters, lr=0.1), model)
    assert isinstance(built, torch.optim.RMSprop)
    assert make(built, model) is built


def test_unknown_name(model: Classifier) -> None:
    message = (
        "Unknown optimizer `adamww`. Did you mean `adamw`? "
        "`transferkit.training.list_optimizers()` names all 3."
    )
    with pytest.raises(UnknownNameError, match=f"^{re.escape(message)}$"):
        make("adamww", model)


def test_object_over_other_parameters(model: Classifier) -> None:
    message = (
        "The optimizer should hold the model's 2 trainable parameters; it lacks 0 of them and "
        "holds 8 others (frozen, or of another model). Build it from "
        "`model.trainable_parameters()`, after freezing."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(torch.optim.SGD(model.parameters(), lr=0.1), model)


def test_factory_that_returns_something_else(model: Classifier) -> None:
    message = "The optimizer factory should return a torch.optim.Optimizer, found int."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(lambda parameters: 3, model)


def test_something_that_cannot_be_called(model: Classifier) -> None:
    message = "`optimizer` should be a name, a factory or a torch.optim.Optimizer, found 3."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(3, model)


@pytest.mark.parametrize("as_factory", [False, True])
def test_lbfgs_is_no_optimizer_for_steps(as_factory: bool, model: Classifier) -> None:
    message = (
        "LBFGS evaluates the loss several times in a step, which the training loop does not. "
        "Take a first-order optimizer, such as SGD or AdamW."
    )
    built = torch.optim.LBFGS(model.head.parameters())
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(torch.optim.LBFGS if as_factory else built, model)


def test_options_are_plain_and_hold_no_parameters(model: Classifier) -> None:
    rate = torch.tensor(0.25)
    optimizer = torch.optim.Adam(model.head.named_parameters(), lr=rate)
    optimizer.param_groups[0]["initial_lr"] = 0.1
    (options,) = group_options(optimizer)
    rate.fill_(0.5)
    assert options["lr"] == 0.25
    assert options["betas"] == (0.9, 0.999)
    assert not {"params", "param_names", "initial_lr"} & options.keys()


def test_nothing_to_train(model: Classifier) -> None:
    model.freeze("*")
    message = (
        "All parameters are frozen: nothing is left to train. "
        'Freeze less, such as freeze="backbone".'
    )
    with pytest.raises(FreezeError, match=f"^{re.escape(message)}$"):
        make("sgd", model)
