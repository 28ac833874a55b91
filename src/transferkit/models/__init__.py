"""Backbones, heads, and the classifier that they make.

`build_model` is the door. A `BackboneSpec` says as data how to build a network, where its
head is, which weights it has and how pictures are preprocessed for it; two providers
(torchvision and timm) and one built-in with weights from the package index fill the
registry. A `HeadSpec` says the same of a new head. Freezing lives here, since it is a state
of the model, and so do features. This room may import `data`, `images` and what lies below.
"""

from transferkit.models.build import build_model
from transferkit.models.classifier import Classifier
from transferkit.models.features import Features
from transferkit.models.freezing import BatchNormMode, FreezePlan
from transferkit.models.heads import HeadSpec
from transferkit.models.importing import import_model
from transferkit.models.pretrained_head import PretrainedHead
from transferkit.models.registry import get_backbone, list_backbones, register_backbone
from transferkit.models.spec import BackboneSpec
from transferkit.models.splitting import Split
from transferkit.models.stages import Stage
from transferkit.models.summary import ModelSummary, StageSummary

__all__ = [
    "BackboneSpec",
    "BatchNormMode",
    "Classifier",
    "Features",
    "FreezePlan",
    "HeadSpec",
    "ModelSummary",
    "PretrainedHead",
    "Split",
    "Stage",
    "StageSummary",
    "build_model",
    "get_backbone",
    "import_model",
    "list_backbones",
    "register_backbone",
]
