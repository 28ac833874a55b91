from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from transferkit.errors import ConfigError, FreezeError, UnknownNameError
from transferkit.models import BackboneSpec, Classifier, build_model
from transferkit.training.optimizers import list_optimizers, make_optimizer


@pytest.fixture
def model(tiny_spec: BackboneSpec) -> Classifier:
    return build_model(tiny_spec, 2, weights=None, freeze="backbone")


def make(optimizer: Any, model: Classifier) -> torch.optim.Optimizer:
    return make_optimizer(
        optimizer, model, lr=0.5, backbone_lr_factor=0.1, momentum=0.8, weight_decay=0.01
    )


@pytest.mark.parametrize("name", list_optimizers())
def test_named_ones_hold_only_what_trains(name: str, model: Classifier) -> None:
    optimizer = make(name, model)
    held = [each for group in optimizer.param_groups for each in group["params"]]
    assert [id(each) for each in held] == [id(each) for each in model.head.parameters()]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["weight_decay"] == 0.01


def test_sgd_has_momentum(model: Classifier) -> None:
    assert make("sgd", model).param_groups[0]["momentum"] == 0.8


def test_the_backbone_has_a_rate_of_its_own(model: Classifier) -> None:
    model.freeze("backbone.conv1.*")
    head, backbone = make("sgd", model).param_groups
    assert (head["name"], head["lr"]) == ("head", 0.5)
    assert (backbone["name"], backbone["lr"]) == ("backbone", pytest.approx(0.05))
    trainable = {id(each) for each in model.backbone.parameters() if each.requires_grad}
    assert {id(each) for each in backbone["params"]} == trainable


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


def test_nothing_to_train(model: Classifier) -> None:
    model.freeze("*")
    message = (
        "All parameters are frozen: nothing is left to train. "
        'Freeze less, such as freeze="backbone".'
    )
    with pytest.raises(FreezeError, match=f"^{re.escape(message)}$"):
        make("sgd", model)
