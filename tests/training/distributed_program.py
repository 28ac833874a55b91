"""What the tests of several processes run under torchrun: a fit told by a JSON file.

    torchrun --nproc-per-node 2 distributed_program.py OPTIONS.json

Rank 0 writes what came of it beside the options; every rank writes how it ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import transferkit as tk
from transferkit.images import Preprocess


def network() -> torch.nn.Module:
    layers = torch.nn.Sequential()
    layers.add_module("conv1", torch.nn.Conv2d(3, 8, 3, stride=2))
    layers.add_module("bn1", torch.nn.BatchNorm2d(8))
    layers.add_module("act", torch.nn.ReLU())
    layers.add_module("conv2", torch.nn.Conv2d(8, 16, 3, stride=2))
    layers.add_module("pool", torch.nn.AdaptiveAvgPool2d(1))
    layers.add_module("flat", torch.nn.Flatten())
    layers.add_module("fc", torch.nn.Linear(16, 10))
    return layers


class Trouble(tk.Callback):
    """Kill the whole process, or send it a signal, after so many updates of the first start."""

    def __init__(self, told: dict[str, Any], folder: Path) -> None:
        self.told, self.folder, self.count = told, folder, 0

    def on_step_end(self, trainer: tk.Trainer, step: int) -> None:
        self.count += 1
        marker = self.folder / "trouble"
        if self.count == self.told["after"] and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), getattr(signal, self.told["signal"]))


def main() -> None:
    path = Path(sys.argv[1])
    told = json.loads(path.read_text())
    torch.set_num_threads(1)
    spec = tk.BackboneSpec(
        name="small", build=network, head_path="fc",
        preprocess=Preprocess(crop_size=32, resize_size=32),
    )  # fmt: skip
    model = tk.build_model(spec, 2, weights=None, **told["model"])
    options = told["trainer"]
    if "cache" in options and isinstance(options["cache"], dict):
        options["cache"] = tk.FeatureCache(**options["cache"])
    if "checkpoints" in options:
        options["checkpoints"] = tk.Checkpoints(**options["checkpoints"])
    callbacks = [Trouble(told["trouble"], path.parent)] if "trouble" in told else []
    trainer = tk.Trainer(
        model, tk.load_folders(told["data"]), callbacks=callbacks, verbose=False,
        device="cpu", num_workers=0, **options,
    )  # fmt: skip
    rank = os.environ.get("RANK", "0")
    try:
        history = trainer.fit(told["epochs"], **told.get("fit", {}))
    except Exception as error:
        (path.parent / f"error{rank}").write_text(f"{type(error).__name__}: {error}")
        raise
    trainer.save(path.parent / f"artifact{rank}.safetensors")
    state = {name: value.contiguous() for name, value in trainer.model.state_dict().items()}
    save_file(state, path.parent / f"weights{rank}.safetensors")
    (path.parent / f"history{rank}.json").write_text(history.to_json())


if __name__ == "__main__":
    main()
