from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from transferkit.errors import BackboneError
from transferkit.images import Preprocess
from transferkit.models import BackboneSpec

PREPROCESS = Preprocess(crop_size=8, resize_size=8)


class Nested(nn.Module):
    """A network whose last layer lies at `top.last`."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.top = nn.ModuleDict({"last": last})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.top["last"](self.body(images))
        return logits


def make_spec(last: nn.Module, head_path: str | None = "top.last", **options: Any) -> BackboneSpec:
    return BackboneSpec(
        name="nested",
        build=lambda: Nested(last),
        head_path=head_path,
        preprocess=PREPROCESS,
        **options,
    )


def test_head_is_taken_off_and_tells_the_number_of_features() -> None:
    network, num_features = make_spec(nn.Linear(6, 10)).build_features()
    assert num_features == 6
    assert not any(isinstance(each, nn.Linear) for each in network.modules())
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(network(images), network.get_submodule("body")(images))


def test_head_may_be_a_pointwise_convolution() -> None:
    spec = BackboneSpec(
        name="conv",
        build=lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 10, 1), nn.Flatten()),
        head_path="1",
        preprocess=PREPROCESS,
    )
    network, num_features = spec.build_features()
    assert num_features == 5
    assert isinstance(network.get_submodule("1"), nn.Identity)


@pytest.mark.parametrize("number", [6, lambda network: network.body[0].out_channels])
def test_network_without_a_head_tells_its_number_of_features(number: Any) -> None:
    spec = make_spec(nn.Identity(), None, num_features=number)
    network, num_features = spec.build_features()
    assert num_features == 6
    assert network(torch.rand(2, 3, 8, 8)).shape == (2, 6)


@pytest.mark.parametrize("number", [None, 0, -3, True, 2.0, lambda network: None])
def test_number_of_features_that_cannot_work_is_an_error(number: Any) -> None:
    found = None if callable(number) else number
    with pytest.raises(BackboneError) as error:
        make_spec(nn.Identity(), None, num_features=number).build_features()
    assert str(error.value) == (
        f"Backbone `nested` has neither a `head_path` nor a usable `num_features`: found "
        f"{found!r}, expected the D of its features (N, D)."
    )


def test_head_that_is_not_there_is_an_error() -> None:
    with pytest.raises(BackboneError) as error:
        make_spec(nn.Linear(6, 10), "fc").build_features()
    assert str(error.value) == (
        "Backbone `nested` has no module `fc`, where its head should be. "
        "Its children are: body, top."
    )


@pytest.mark.parametrize("last", [nn.ReLU(), nn.Conv2d(6, 10, 3)])
def test_head_of_another_kind_is_an_error(last: nn.Module) -> None:
    with pytest.raises(BackboneError) as error:
        make_spec(last).build_features()
    assert str(error.value) == (
        f"The head of backbone `nested` at `top.last` should be a linear layer or a 1x1 "
        f"convolution, found {type(last).__name__}."
    )


def test_names_of_the_head_are_told_from_others() -> None:
    spec = make_spec(nn.Linear(6, 10), "top.last", head_keys=("aux",))
    for key in ("top.last.weight", "top.last.bias", "aux.fc.weight", "aux"):
        assert spec.is_head_key(key)
    for key in ("top.lasting.weight", "auxiliary.weight", "body.aux.weight", "top.weight"):
        assert not spec.is_head_key(key)


def test_without_a_head_path_only_head_keys_are_of_the_head() -> None:
    spec = make_spec(nn.Identity(), None, num_features=6, head_keys=("fc",))
    assert spec.is_head_key("fc.weight")
    assert not spec.is_head_key("body.weight")


@pytest.mark.parametrize("names", [("ant", "bee"), ["ant", "bee"], lambda: ("ant", "bee")])
def test_class_names_are_given_or_found(names: Any) -> None:
    assert make_spec(nn.Linear(6, 2), class_names=names).find_class_names() == ("ant", "bee")


def test_class_names_are_not_known_without_being_told() -> None:
    assert make_spec(nn.Linear(6, 2)).find_class_names() == ()


def test_class_names_are_found_late_and_not_in_the_repr() -> None:
    def fail() -> tuple[str, ...]:
        raise AssertionError

    spec = make_spec(nn.Linear(6, 2), class_names=fail)
    spec.build_features()
    assert "class_names" not in repr(spec)


@pytest.mark.parametrize("names", ["ant", [1, 2], lambda: "ant"])
def test_class_names_that_are_no_texts_are_an_error(names: Any) -> None:
    found = names() if callable(names) else names
    with pytest.raises(BackboneError) as error:
        make_spec(nn.Linear(6, 2), class_names=names).find_class_names()
    assert str(error.value) == (
        f"The `class_names` of backbone `nested` should be texts, one for each class of its "
        f"weights' head, found {found!r}."
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "top.last"),
        ({"head_keys": ("aux",)}, "top.last"),
        ({"head_path": None, "head_keys": ("fc",)}, "fc"),
        ({"head_path": None, "head_keys": ("head", "head_dist")}, None),
        ({"head_path": None}, None),
    ],
)
def test_last_layer_of_the_weights_is_known(options: dict[str, Any], expected: str | None) -> None:
    assert make_spec(nn.Linear(6, 10), **options).last_layer_key == expected
