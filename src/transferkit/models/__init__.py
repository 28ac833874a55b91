"""Backbones, and the classifier that a backbone and a head make.

`build_model` is the door. A `BackboneSpec` says as data how to build a network, where its
head is, which weights it has and how pictures are preprocessed for it; two providers
(torchvision and timm) and one built-in with weights from the package index fill the
registry. Freezing lives here, since it is a state of the model. This room may import
`data`, `images` and what lies below.
"""

from transferkit.models.build import build_model
from transferkit.models.classifier import Classifier
from transferkit.models.freezing import BatchNormMode, FreezePlan
from transferkit.models.registry import get_backbone, list_backbones, register_backbone
from transferkit.models.spec import BackboneSpec

__all__ = [
    "BackboneSpec",
    "BatchNormMode",
    "Classifier",
    "FreezePlan",
    "build_model",
    "get_backbone",
    "list_backbones",
    "register_backbone",
]
