from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from torchvision import models

from transferkit.errors import ConfigError, MissingDependencyError, UnknownNameError
from transferkit.models import (
    BackboneSpec,
    build_model,
    get_backbone,
    list_backbones,
    register_backbone,
)
from transferkit.models.registry import _BACKBONES


@pytest.fixture(autouse=True)
def _registry_as_it_was() -> Iterator[None]:
    before = set(_BACKBONES.names())
    yield
    for name in set(_BACKBONES.names()) - before:
        _BACKBONES.remove(name)


def test_all_networks_of_torchvision_and_lite0_are_listed() -> None:
    names = list_backbones()
    assert set(models.list_models(module=models)) | {"efficientnet_lite0"} <= set(names)
    assert len(models.list_models(module=models)) >= 80
    assert names == sorted(names)


def test_models_of_timm_are_listed_on_demand() -> None:
    names = list_backbones(timm=True)
    assert {"timm:resnet10t", "resnet18", "efficientnet_lite0"} <= set(names)
    assert len(names) > 1000
    assert names == sorted(names)


def test_listing_timm_without_timm_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "resnet18" in list_backbones()
    with pytest.raises(MissingDependencyError) as error:
        list_backbones(timm=True)
    assert str(error.value) == (
        "Listing the models of timm needs `timm`, which is not installed: "
        'pip install "transferkit[timm]"'
    )


def test_own_backbone_is_built_by_its_name(tiny_spec: BackboneSpec) -> None:
    assert register_backbone("tiny", lambda: tiny_spec)() is tiny_spec
    assert get_backbone("tiny") is tiny_spec
    assert "tiny" in list_backbones()
    assert build_model("tiny", 2, weights=None).num_features == 16


def test_decorator_registers_a_factory(tiny_spec: BackboneSpec) -> None:
    @register_backbone("tiny")
    def tiny() -> BackboneSpec:
        return tiny_spec

    assert tiny() is tiny_spec
    assert get_backbone("tiny") is tiny_spec


def test_taken_name_is_an_error(tiny_spec: BackboneSpec) -> None:
    register_backbone("tiny", lambda: tiny_spec)
    for name in ("tiny", "resnet18"):
        with pytest.raises(ConfigError) as error:
            register_backbone(name, lambda: tiny_spec)
        assert str(error.value) == (
            f"A backbone `{name}` is registered already. "
            f"Choose another name or pass `replace=True`."
        )
    assert get_backbone("resnet18") is not tiny_spec


def test_replace_takes_the_place(tiny_spec: BackboneSpec) -> None:
    register_backbone("tiny", lambda: get_backbone("resnet18"))
    register_backbone("tiny", lambda: tiny_spec, replace=True)
    assert get_backbone("tiny") is tiny_spec


def test_unknown_name_is_an_error_with_a_suggestion() -> None:
    for door in (get_backbone, lambda name: build_model(name, 2)):
        with pytest.raises(UnknownNameError) as error:
            door("resnet-18")
        assert str(error.value) == (
            f"Unknown backbone `resnet-18`. Did you mean `resnet18`? "
            f"`list_backbones()` names all {len(list_backbones())}."
        )
