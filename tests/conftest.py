"""What all tests share: small pictures, the photographs, and two threads at most."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before PyTorch is loaded: each of the processes that share the cores computes with one, and
    # so do those that it starts.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib as mpl
import pytest
import torch
from hypothesis import settings

from transferkit.data import ImageSplits, load_folders
from transferkit.data.ants_bees import FOLDER_NAME
from transferkit.images import Preprocess
from transferkit.models import BackboneSpec
from transferkit.testing import make_image_folder

mpl.use("Agg")
# Machines that run tests are shared: a slow example says nothing about the code.
settings.register_profile("transferkit", deadline=None)
settings.load_profile("transferkit")


@pytest.fixture(autouse=True)
def _no_open_figures() -> Iterator[None]:
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A folder of 8 + 8 training and 4 + 4 validation pictures, blue and red."""
    return make_image_folder(tmp_path / "tiny")


@pytest.fixture
def tiny_splits(tiny_folder: Path) -> ImageSplits:
    return load_folders(tiny_folder)


def tiny_network() -> torch.nn.Module:
    """Return a small network with BatchNorm, dropout and a head at `fc`."""
    return _TinyNetwork()


class _TinyNetwork(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 8, 3, stride=2)
        self.bn1 = torch.nn.BatchNorm2d(8)
        self.layer1 = torch.nn.Sequential(
            torch.nn.Conv2d(8, 16, 3, stride=2), torch.nn.BatchNorm2d(16), torch.nn.ReLU()
        )
        self.drop = torch.nn.Dropout(0.5)
        self.fc = torch.nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.layer1(torch.relu(self.bn1(self.conv1(images)))).mean(dim=(2, 3))
        logits: torch.Tensor = self.fc(self.drop(features))
        return logits


@pytest.fixture
def tiny_spec() -> BackboneSpec:
    """A backbone that trains in no time, on 32-pixel images."""
    return BackboneSpec(
        name="tiny",
        build=tiny_network,
        head_path="fc",
        preprocess=Preprocess(crop_size=32, resize_size=32),
    )


@pytest.fixture(scope="session")
def photographs() -> Path:
    """The folder of the real photographs, or a skip that says why."""
    variable = os.environ.get("TRANSFERKIT_DATA")
    if not variable:
        pytest.skip("TRANSFERKIT_DATA is not set: no photographs")
    root = Path(variable) / FOLDER_NAME
    if not root.is_dir():
        pytest.skip(f"TRANSFERKIT_DATA has no folder {FOLDER_NAME}: no photographs")
    return root
