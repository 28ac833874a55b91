"""A fit of every family of built-in backbones leaves what is frozen as it was, to the byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from transferkit.data import ImageSplits, load_folders
from transferkit.models import build_model, get_backbone
from transferkit.models.torchvision_backbones import HEAD_PATHS
from transferkit.testing import make_image_folder
from transferkit.training import Trainer

SMALLEST = {
    "alexnet": "alexnet",
    "convnext": "convnext_tiny",
    "densenet": "densenet121",
    "efficientnet": "efficientnet_b0",
    "googlenet": "googlenet",
    "inception": "inception_v3",
    "maxvit": "maxvit_t",
    "mnasnet": "mnasnet0_5",
    "mobilenet_v2": "mobilenet_v2",
    "mobilenet_v3": "mobilenet_v3_small",
    "regnet": "regnet_y_400mf",
    "resnet": "resnet18",
    "resnext": "resnext50_32x4d",
    "shufflenet": "shufflenet_v2_x0_5",
    "squeezenet": "squeezenet1_1",
    "swin": "swin_t",
    "vgg": "vgg11",
    "vit": "vit_b_16",
    "wide_resnet": "wide_resnet50_2",
}
LARGE = {"alexnet", "maxvit_t", "vgg11", "vit_b_16", "wide_resnet50_2"}
OF_ONE_SIZE = {"maxvit_t", "vit_b_16"}


def test_every_family_is_here() -> None:
    assert set(SMALLEST) == set(HEAD_PATHS)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> ImageSplits:
    root = make_image_folder(tmp_path_factory.mktemp("frozen"), num_train=2, num_val=1)
    return load_folders(root)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        pytest.param(name, part, marks=pytest.mark.slow if name in LARGE else ())
        for name in [*SMALLEST.values(), "efficientnet_lite0"]
        for part in ("backbone", "half")
    ],
)
def test_what_is_frozen_is_byte_identical_after_a_fit(
    name: str, part: str, splits: ImageSplits, tmp_path: Path
) -> None:
    spec = get_backbone(name)
    size = spec.preprocess.crop_size if name in OF_ONE_SIZE else 96
    preprocess = replace(spec.preprocess, crop_size=size, resize_size=size)
    model = build_model(name, 2, weights=None, preprocess=preprocess)
    stages = model.stages[: max(1, len(model.stages) // 2)]
    model.freeze("backbone" if part == "backbone" else f"until:{stages[-1].name}")
    held = model.stages if part == "backbone" else stages
    before = {
        key: value.clone()
        for key, value in model.backbone.state_dict().items()
        if any(stage.holds(key) for stage in held)
    }
    assert before
    trainer = Trainer(
        model, splits, batch_size=2, lr=0.1, weight_decay=0.1, verbose=False, device="cpu"
    )
    trainer.fit(2)
    after = model.backbone.state_dict()
    changed = [key for key, value in before.items() if not torch.equal(value, after[key])]
    assert changed == []
    assert trainer.history.status == "completed"
