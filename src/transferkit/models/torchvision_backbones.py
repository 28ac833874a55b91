"""The provider for torchvision: all its classification networks, the head's path as data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision import models

from transferkit.images import Preprocess
from transferkit.models.spec import BackboneSpec
from transferkit.models.weights import fetch_weights, read_state_dict

HEAD_PATHS = {
    "alexnet": "classifier.6",
    "convnext": "classifier.2",
    "densenet": "classifier",
    "efficientnet": "classifier.1",
    "googlenet": "fc",
    "inception": "fc",
    "maxvit": "classifier.5",
    "mnasnet": "classifier.1",
    "mobilenet_v2": "classifier.1",
    "mobilenet_v3": "classifier.3",
    "regnet": "fc",
    "resnet": "fc",
    "resnext": "fc",
    "shufflenet": "fc",
    "squeezenet": "classifier.1",
    "swin": "head",
    "vgg": "classifier.6",
    "vit": "heads.head",
    "wide_resnet": "fc",
}
"""Where the last layer sits, by the beginning of the name."""

STAGE_PARENTS: dict[str, tuple[str, ...]] = {
    "alexnet": ("features", "classifier"),
    "convnext": ("features", "classifier"),
    "densenet": ("features",),
    "efficientnet": ("features", "classifier"),
    "maxvit": ("blocks", "classifier"),
    "mnasnet": ("layers", "classifier"),
    "mobilenet": ("features", "classifier"),
    "regnet": ("trunk_output",),
    "squeezenet": ("features", "classifier"),
    "swin": ("features",),
    "vgg": ("features", "classifier"),
    "vit": ("encoder", "encoder.layers"),
}
"""Whose children are stages, by the beginning of the name; else the network's own are."""

AUXILIARY_HEADS = ("aux1", "aux2", "AuxLogits")
"""The side heads of GoogLeNet and Inception, in their weights but not in our networks."""

WEIGHTS_TERMS = (
    "no licence of their own. torchvision's code is BSD-3-Clause; its weights may have terms that "
    "come from the data they were trained on (https://github.com/pytorch/vision"
    "#pre-trained-model-license), here ImageNet, which is given out for non-commercial research "
    "and education (https://www.image-net.org/download)"
)
"""What is known of the licence of weights that name none."""

_OLD_DENSENET_KEY = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


def torchvision_names() -> list[str]:
    """Return the names of torchvision's classification networks whose head path is known."""
    return [name for name in models.list_models(module=models) if _head_path(name)]


def imagenet_class_names() -> tuple[str, ...]:
    """Return the names of the 1000 classes of ImageNet-1k, in the order that all weights use.

    Where two classes have one name, torchvision's list tells them apart ("crane" for the
    machine, "crane bird").

    Example:
        >>> imagenet_class_names()[309:311]
        ('bee', 'ant')
    """
    return tuple(models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def torchvision_spec(name: str) -> BackboneSpec:
    """Return the spec of torchvision's network `name` with its default weights."""
    weights = models.get_model_weights(name).DEFAULT
    return BackboneSpec(
        name=name,
        build=partial(_build, name, image_size=weights.meta["min_size"][0]),
        head_path=_head_path(name),
        preprocess=_preprocess(weights.transforms()),
        load_weights=partial(_load_default, name, weights.url),
        convert_weights=_rename_densenet if name.startswith("densenet") else None,
        head_keys=AUXILIARY_HEADS if name in ("googlenet", "inception_v3") else (),
        class_names=tuple(weights.meta["categories"]),
        stage_parents=_stage_parents(name),
        weights_license=weights.meta.get("license", WEIGHTS_TERMS),
    )


def _head_path(name: str) -> str | None:
    families = [family for family in HEAD_PATHS if name.startswith(family)]
    return HEAD_PATHS[max(families, key=len)] if families else None


def _stage_parents(name: str) -> tuple[str, ...]:
    return next((paths for family, paths in STAGE_PARENTS.items() if name.startswith(family)), ())


def _build(name: str, *, image_size: int) -> nn.Module:
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # torchvision re-scales the input only when it is given weights; always doing so
        # makes one architecture of it, whether the weights come now, later or never.
        options = {"aux_logits": False, "transform_input": True, "init_weights": True}
    elif name.startswith("vit_"):
        # A vision transformer is built for one image size, the one of its weights.
        options = {"image_size": image_size}
    network: nn.Module = models.get_model(name, weights=None, **options)
    return network


def _preprocess(transforms: Any) -> Preprocess:
    return Preprocess(
        crop_size=transforms.crop_size[0],
        resize_size=transforms.resize_size[0],
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


def _load_default(name: str, url: str) -> Mapping[str, Tensor]:
    return read_state_dict(fetch_weights(url, backbone=name))


def _rename_densenet(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Rename the keys of old DenseNet files: `denselayer1.norm.1.weight` to `.norm1.weight`."""
    return {_OLD_DENSENET_KEY.sub(r"\1\2", key): value for key, value in state.items()}
