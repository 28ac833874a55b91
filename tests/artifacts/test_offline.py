"""Loading an artifact reaches for nothing: no network, no hub, no package that it does not need."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from transferkit.artifacts import load_artifact, save_artifact
from transferkit.errors import ArtifactError
from transferkit.models import build_model
from transferkit.models import torchvision_backbones as provider

LOAD = """
import sys
from transferkit.inference import Predictor
print(Predictor.load(sys.argv[1], device="cpu").model.backbone_name)
print(sorted({"timm", "huggingface_hub", "matplotlib", "openvino"} & sys.modules.keys()))
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("offline") / "m.safetensors"
    return save_artifact(
        path, build_model("mnasnet0_5", 2, weights=None), class_names=("ants", "bees")
    )


def refuse(*arguments: object, **options: object) -> Any:
    raise AssertionError("something outside was reached for")


def test_loading_touches_no_network(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(provider, "fetch_weights", refuse)
    monkeypatch.setattr(provider, "read_state_dict", refuse)
    assert load_artifact(artifact, strict=True).class_names == ("ants", "bees")


def test_loading_imports_no_optional_package(artifact: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(artifact)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["mnasnet0_5", "[]"]


def test_loading_works_where_timm_is_not_installed(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    load_artifact(artifact)


def test_a_backbone_of_timm_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("timm:resnet10t", 2, weights=None)
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=("ants", "bees"))
    monkeypatch.setitem(sys.modules, "timm", None)
    message = (
        f"Cannot build the model of the artifact `{path}`: Backbone `timm:resnet10t` needs `timm`, "
        f'which is not installed: pip install "transferkit[timm]"'
    )
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(path)
