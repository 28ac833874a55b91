"""What the tests of artifacts share: a tiny model, its file, and files with a forged digest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from transferkit.artifacts import format as artifact_format
from transferkit.artifacts import save_artifact
from transferkit.models import BackboneSpec, Classifier, build_model

NAMES = ("ants", "bees")

Forge: TypeAlias = Callable[..., None]


@pytest.fixture
def model(tiny_spec: BackboneSpec) -> Classifier:
    return build_model(tiny_spec, 2, weights=None, freeze="backbone.layer1.*")


@pytest.fixture
def saved(model: Classifier, tmp_path: Path) -> Path:
    return save_artifact(tmp_path / "model.safetensors", model, class_names=NAMES)


@pytest.fixture
def forge() -> Forge:
    """Write a file anew with other data and tensors, and with a digest that fits them."""
    return _forge


def _forge(
    path: Path,
    change_data: Callable[[dict[str, Any]], object] = lambda data: None,
    change_tensors: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
) -> None:
    tensors = safetensors.torch.load_file(path)
    with safe_open(path, framework="pt") as file:
        data = json.loads(file.metadata()["transferkit"])
    change_data(data)
    change_tensors(tensors)
    text = json.dumps(data)
    metadata = {
        "transferkit": text,
        "transferkit_sha256": artifact_format._digest(tensors, text),
    }
    safetensors.torch.save_file(tensors, path, metadata=metadata)
