from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision import models

from transferkit.artifacts import load_artifact
from transferkit.cli import main


def test_state_dict_becomes_an_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = models.shufflenet_v2_x0_5(num_classes=2)
    weights, out = tmp_path / "weights.pth", tmp_path / "model.safetensors"
    torch.save(network.state_dict(), weights)
    words = ["import", str(weights), "--backbone", "shufflenet_v2_x0_5", "--out", str(out)]
    assert main([*words, "--classes", "ants, bees"]) == 0
    assert capsys.readouterr().out == f"Saved the artifact in {out}\n"
    artifact = load_artifact(out)
    assert artifact.class_names == ("ants", "bees")
    assert torch.equal(artifact.model.head.get_parameter("weight"), network.fc.weight)


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "weights.pth"
    assert main(["import", str(weights), "--backbone", "resnet18", "--classes", "ants,bees"]) == 1
    assert capsys.readouterr().err == (
        f"transferkit: error: The weights file `{weights}` does not exist. Expected `path` to be "
        f"that of a .pth or .safetensors file.\n"
    )
