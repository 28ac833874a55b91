from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transferkit.errors import BackboneError, FreezeError
from transferkit.images import Preprocess
from transferkit.models import BackboneSpec, Classifier, FreezePlan, build_model
from transferkit.models.splitting import Split

PREPROCESS = Preprocess(crop_size=4, resize_size=4)


def make_flat(backbone: nn.Module | None = None, num_features: int = 48) -> Classifier:
    return Classifier(
        backbone or nn.Flatten(),
        num_features=num_features,
        num_classes=2,
        backbone_name="flat",
        preprocess=PREPROCESS,
    )


@pytest.fixture
def model(tiny_spec: BackboneSpec) -> Classifier:
    return build_model(tiny_spec, 2, weights=None)


@pytest.fixture
def frozen(tiny_spec: BackboneSpec) -> Classifier:
    return build_model(tiny_spec, 2, weights=None, freeze="backbone")


def test_logits_are_the_head_over_the_features() -> None:
    model = make_flat()
    images = torch.rand(5, 3, 4, 4)
    assert torch.equal(model.features(images), images.flatten(1))
    weight, bias = model.head.parameters()
    torch.testing.assert_close(model(images), images.flatten(1) @ weight.T + bias)
    assert model(images).shape == (5, 2)


def test_parameters_are_those_of_backbone_and_head(model: Classifier) -> None:
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"backbone", "head"}
    assert model.freeze_plan == FreezePlan()


class Lister(nn.Module):
    def forward(self, images: Tensor) -> Any:
        return [images]


@pytest.mark.parametrize(
    ("backbone", "found"),
    [
        (nn.Flatten(), "(2, 48)"),
        (nn.Identity(), "(2, 3, 4, 4)"),
        (Lister(), "<class 'list'>"),
    ],
)
def test_features_of_another_shape_are_an_error(backbone: nn.Module, found: str) -> None:
    with pytest.raises(BackboneError) as error:
        make_flat(backbone, num_features=7)(torch.rand(2, 3, 4, 4))
    assert str(error.value) == (
        f"Backbone `flat` should give features of the shape (2, 7), found {found}. "
        f"Check its `num_features` and that it ends in a flat vector."
    )


@pytest.mark.parametrize("number", [1, 2])
def test_features_from_activations_are_those_of_the_images(model: Classifier, number: int) -> None:
    images = torch.rand(5, 3, 32, 32)
    split = model.split(number)
    assert split is not None
    for _ in range(2):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        torch.manual_seed(0)
        features = model.features(images)
        model.load_state_dict(state)
        torch.manual_seed(0)
        assert torch.equal(model.features_from(split.prefix(images), split), features)
        model.eval()


def test_features_from_activations_need_their_shape(model: Classifier) -> None:
    split = Split(nn.Identity(), nn.Identity(), 1)
    with pytest.raises(BackboneError) as error:
        model.features_from(torch.rand(2, 5), split)
    assert str(error.value) == (
        "Backbone `tiny` should give features of the shape (2, 16), found (2, 5). "
        "Check its `num_features` and that it ends in a flat vector."
    )


def test_frozen_modules_are_in_eval_in_every_pass_from_activations(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze=["backbone.layer1.*"])
    split = model.split(1)
    assert split is not None
    model.train()
    model.backbone.train()
    model.features_from(torch.rand(4, 8, 15, 15), split)
    layer = model.backbone.get_submodule("layer1")
    assert not any(module.training for module in layer.modules())
    assert model.backbone.get_submodule("bn1").training


def test_train_and_eval_set_the_mode(model: Classifier) -> None:
    assert model.eval() is model
    assert not any(module.training for module in model.modules())
    assert model.train() is model
    assert all(module.training for module in model.modules())


def test_frozen_modules_stay_in_eval_through_train(frozen: Classifier) -> None:
    frozen.train()
    assert frozen.training
    assert frozen.head.training
    assert not any(module.training for module in frozen.backbone.modules())
    frozen.eval()
    assert not any(module.training for module in frozen.modules())


@pytest.mark.parametrize("mode", [True, False])
def test_frozen_modules_are_in_eval_in_every_forward_pass(frozen: Classifier, mode: bool) -> None:
    frozen.train(mode)
    before = copy.deepcopy(frozen.backbone.state_dict())
    frozen.backbone.train()
    frozen(torch.rand(2, 3, 32, 32))
    assert not any(module.training for module in frozen.backbone.modules())
    for name, value in frozen.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_adapting_keeps_only_batchnorm_in_training(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze="backbone", bn="adapt").train()
    for module in model.backbone.modules():
        assert module.training is isinstance(module, nn.BatchNorm2d)
    model.eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("mode", [True, False])
def test_freezing_keeps_the_mode(model: Classifier, mode: bool) -> None:
    model.train(mode).freeze("backbone")
    assert model.training is mode
    assert model.head.training is mode


@pytest.mark.parametrize("mode", [True, False])
def test_unfreezing_keeps_the_mode(frozen: Classifier, mode: bool) -> None:
    assert frozen.train(mode).unfreeze("layer1") is frozen
    assert frozen.training is mode
    assert frozen.backbone.get_submodule("layer1").training is mode
    assert not frozen.backbone.get_submodule("conv1").training
    assert not frozen.backbone.get_submodule("bn1").training


def test_pins_hold_for_stages_through_train(model: Classifier) -> None:
    model.freeze("until:layer1")
    for act in (model.train, model.backbone.train):
        act()
        model(torch.rand(2, 3, 32, 32))
        for name, module in model.named_modules():
            if name.startswith("backbone."):
                assert not module.training, name
    model.freeze("until:conv1")
    for act in (model.train, model.backbone.train):
        act()
        model(torch.rand(2, 3, 32, 32))
        still = [name for name, module in model.named_modules() if not module.training]
        assert still == ["backbone.conv1", "backbone.bn1"]


def test_adapting_until_a_stage_keeps_only_its_batchnorm_in_training(model: Classifier) -> None:
    model.freeze("until:conv1", bn="adapt")
    for act in (model.train, model.backbone.train):
        act()
        model(torch.rand(2, 3, 32, 32))
        still = [name for name, module in model.named_modules() if not module.training]
        assert still == ["backbone.conv1"]
    model.eval()
    model.backbone.train()
    model(torch.rand(2, 3, 32, 32))
    assert not model.backbone.get_submodule("bn1").training


def test_copy_is_frozen_like_the_original(frozen: Classifier) -> None:
    twin = copy.deepcopy(frozen).eval().train()
    assert twin.is_backbone_frozen
    assert not any(module.training for module in twin.backbone.modules())


def test_trainable_parameters_are_those_that_are_not_frozen(frozen: Classifier) -> None:
    assert list(frozen.trainable_parameters()) == list(frozen.head.parameters())
    frozen.freeze("none")
    assert list(frozen.trainable_parameters()) == list(frozen.parameters())


def test_nothing_left_to_train_is_an_error(model: Classifier) -> None:
    model.freeze("*")
    with pytest.raises(FreezeError) as error:
        model.trainable_parameters()
    assert str(error.value) == (
        "All parameters are frozen: nothing is left to train. "
        'Freeze less, such as freeze="backbone".'
    )


def test_counts_follow_the_freezing(model: Classifier) -> None:
    total = sum(each.numel() for each in model.parameters())
    assert model.num_parameters == model.num_trainable_parameters == total
    assert not model.is_backbone_frozen
    model.freeze("backbone")
    assert model.num_parameters == total
    assert model.num_trainable_parameters == 16 * 2 + 2
    assert model.is_backbone_frozen
    model.freeze("backbone.conv1.*")
    assert not model.is_backbone_frozen


def test_repr_names_the_backbone_and_the_counts(frozen: Classifier) -> None:
    words = f"tiny, num_classes=2, 34 of {frozen.num_parameters:,} parameters train"
    assert frozen.extra_repr() == words
    assert repr(frozen).startswith(f"Classifier(\n  {words}\n")


@pytest.mark.parametrize("freeze", ["backbone", "until:conv1"])
def test_frozen_model_can_be_exported(model: Classifier, freeze: str) -> None:
    frozen = model.freeze(freeze)
    images = torch.rand(2, 3, 32, 32)
    frozen.eval()
    program = torch.export.export(frozen, (images,))
    torch.testing.assert_close(program.module()(images), frozen(images))
