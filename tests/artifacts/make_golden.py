"""Write a golden artifact: a small file that all later versions must load to the same numbers.

    python tests/artifacts/make_golden.py NAME [HEAD]

writes `golden/NAME.safetensors`, and `golden/NAME.json` with the logits of the model for
`inputs()`. It keeps to what every version of transferkit has, so that it runs with the code of any
of them. The files were made with `PYTHONPATH` at the code of their time:

- `version1`: the first code that wrote artifacts, commit 7661920, without HEAD;
- `version2`: the first code that had other heads, commit 6a06549, with HEAD `mlp`;
- `version2-stages`: the first code with a self-test by stages, with HEAD `mlp`.

A golden file is never made anew; what a new writer adds gets a file of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transferkit.artifacts import save_artifact
from transferkit.images import Preprocess
from transferkit.models import BackboneSpec, build_model

FOLDER = Path(__file__).parent / "golden"
NAMES = ("ants", "bees", "Hummel")
HISTORY = {
    "records": [
        {"epoch": 1, "train_loss": 0.75, "train_accuracy": 0.5, "val_loss": 0.5,
         "val_accuracy": 0.75, "lr": 0.01, "seconds": 1.5},
        {"epoch": 2, "train_loss": 0.5, "train_accuracy": 0.625, "val_loss": None,
         "val_accuracy": 0.5, "lr": 0.01, "seconds": 1.25},
    ],
    "settings": {"epochs": 2, "recipe": "probe"},
    "seconds": 3.0,
    "status": "completed",
}  # fmt: skip


class GoldenNetwork(nn.Module):
    """Have what networks have: a convolution, BatchNorm with its statistics, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        """Give logits, or features where the head was taken off."""
        logits: Tensor = self.fc(torch.relu(self.bn(self.conv(images))).mean(dim=(2, 3)))
        return logits


def golden_spec() -> BackboneSpec:
    """Return the backbone of all golden artifacts."""
    return BackboneSpec(
        name="golden",
        build=GoldenNetwork,
        head_path="fc",
        preprocess=Preprocess(crop_size=24, resize_size=32, interpolation="bicubic"),
    )


def inputs() -> Tensor:
    """Return images that are the same to the bit everywhere, float32 `(4, 3, 24, 24)`."""
    return (torch.arange(4 * 3 * 24 * 24) * 37 % 256 / 128 - 1).view(4, 3, 24, 24)


def make(name: str, **options: Any) -> None:
    """Write the file and the logits."""
    model = build_model(golden_spec(), len(NAMES), weights=None, freeze="backbone", **options)
    with torch.no_grad():
        # Statistics that are not those of the start.
        model.get_buffer("backbone.bn.running_mean").add_(0.25)
        for number, value in enumerate(model.parameters()):
            value.add_(torch.arange(value.numel()).view(value.shape) % (7 + number) / 32)
        logits = model.eval()(inputs())
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.safetensors"
    save_artifact(path, model, class_names=NAMES, history=HISTORY)
    path.with_suffix(".json").write_text(json.dumps({"logits": logits.tolist()}) + "\n")


if __name__ == "__main__":
    make(sys.argv[1], **({"head": sys.argv[2]} if len(sys.argv) > 2 else {}))
