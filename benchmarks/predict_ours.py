"""transferkit's sides of `benchmarks/predict.py`, and its parts, each alone.

As a program it makes what all sides are given: `predict_ours.py BACKBONE FOLDER PICTURES`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

import transferkit as tk
from transferkit._allocator import buffers_kept
from transferkit.data.loader import num_cores
from transferkit.data.workers import start_threads
from transferkit.inference.engine_choice import make_named_engine
from transferkit.inference.lanes import run_in_lanes
from transferkit.models.engines import choose_batch_size, count_cores, count_lanes

Task: TypeAlias = "Mapping[str, Any]"
Label: TypeAlias = "Callable[[Sequence[str]], list[str]]"

WITH_WEIGHTS = ("efficientnet_lite0",)  # Those that a package brings; speed needs none.
NAMES_OF_HEADS = {"efficientnet_lite0": "classifier", "resnet18": "fc"}  # In timm.


def make_many(task: Task, *, engine: Any, precision: Any) -> Label:
    """Classify with `Predictor.predict_many`."""
    predictor = tk.Predictor.load(task["artifact"], engine=engine, precision=precision)
    return lambda paths: [each.label for each in predictor.predict_many(paths)]


def make_file(task: Task, *, engine: Any, precision: Any) -> Label:
    """Classify with `predict_to_file`, and read the labels from the file."""
    predictor = tk.Predictor.load(task["artifact"], engine=engine, precision=precision)

    def label(paths: Sequence[str]) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "labels.jsonl")
            tk.predict_to_file(predictor, paths, out, on_error="raise")
            return [json.loads(line)["label"] for line in out.read_text().splitlines()]

    return label


def read_images(preprocess: tk.Preprocess, paths: Sequence[str]) -> list[Tensor]:
    """Decode, resize and normalise pictures in as many threads as `predict_many` takes."""
    transform = preprocess.eval()
    with start_threads(num_cores()) as pool:
        return list(pool.map(lambda path: transform(preprocess.decode(path)), paths))


def make_decoder(task: Task) -> Label:
    """Read the pictures and do nothing with them: no labels."""
    preprocess = tk.Preprocess.from_dict(task["preprocess"])

    def label(paths: Sequence[str]) -> list[str]:
        read_images(preprocess, paths)
        return []

    return label


def make_engine_alone(task: Task, *, engine: Any, precision: Any) -> Label:
    """Run the network on batches that lie in memory from the second pass on."""
    predictor = tk.Predictor.load(task["artifact"], engine=engine, precision=precision)
    run = make_named_engine(
        predictor.model, engine, precision=precision, device=torch.device("cpu")
    )
    preprocess = predictor.preprocess
    shape = (preprocess.num_channels, preprocess.crop_size, preprocess.crop_size)
    size = choose_batch_size(run, shape, num_images=0, device=predictor.device)
    batches: list[Tensor] = []

    def label(paths: Sequence[str]) -> list[str]:
        if not batches:
            images = read_images(preprocess, paths)
            starts = range(0, len(images), size)
            parts = (torch.stack(images[start : start + size]) for start in starts)
            batches.extend(each.contiguous(memory_format=torch.channels_last) for each in parts)
        with buffers_kept():
            outputs = list(
                run_in_lanes(
                    iter(batches), run, num_lanes=count_lanes(run), cores_each=count_cores(run)
                )
            )
        return [predictor.class_names[index] for index in torch.cat(outputs).argmax(1).tolist()]

    return label


SIDES: dict[str, Callable[..., Label]] = {
    "predict_many": make_many,
    "predict_to_file": make_file,
    "engine": make_engine_alone,
    "decoder": make_decoder,
}


def prepare(backbone: str, folder: Path, root: str) -> None:
    """Fit a head on the frozen backbone; write the artifact, and the weights for the peers."""
    weights: dict[str, Any] = {} if backbone in WITH_WEIGHTS else {"weights": None}
    data = tk.load_folders(root)
    model = tk.build_model(backbone, data.num_classes, freeze="backbone", seed=0, **weights)
    trainer = tk.Trainer(model, data, seed=0, solver="lbfgs", verbose=False)
    trainer.fit()
    artifact, plain = folder / "model.safetensors", folder / "weights.pt"
    trainer.save(artifact)
    names = {"backbone.": "", "head.": f"{NAMES_OF_HEADS[backbone]}."}
    state = {
        name.replace(old, new, 1): value
        for name, value in model.state_dict().items()
        for old, new in names.items()
        if name.startswith(old)
    }
    torch.save(state, plain)
    task = {
        "network": backbone,
        "weights": str(plain),
        "artifact": str(artifact),
        "class_names": data.class_names,
        "preprocess": model.preprocess.to_dict(),
        "paths": [str(path) for split in data.named().values() for path in split.paths],
    }
    (folder / "task.json").write_text(json.dumps(task))


if __name__ == "__main__":
    prepare(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
