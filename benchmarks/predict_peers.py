"""The peers of `benchmarks/predict.py`; they need no transferkit.

Each library's side is written as its own documentation writes it, over the same network of timm
with the same weights, and the same resize, crop and normalisation as near as it offers them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

Task: TypeAlias = "Mapping[str, Any]"
"""What a side is given: `network`, the name in timm, `weights`, `class_names`, `preprocess`."""

Label: TypeAlias = "Callable[[Sequence[str]], list[str]]"


def load_network(task: Task) -> nn.Module:
    """Return the network in eval mode."""
    network = timm.create_model(task["network"], num_classes=len(task["class_names"]))
    network.load_state_dict(torch.load(task["weights"], weights_only=True))
    evaluated: nn.Module = network.eval()
    return evaluated


def make_transform(task: Task) -> transforms.Compose:
    """Return the transform of the lesson on transfer learning, with this network's numbers."""
    spec = task["preprocess"]
    mode = transforms.InterpolationMode(spec["interpolation"])
    return transforms.Compose(
        [
            transforms.Resize(spec["resize_size"], mode),
            transforms.CenterCrop(spec["crop_size"]),
            transforms.ToTensor(),
            transforms.Normalize(spec["mean"], spec["std"]),
        ]
    )


def to_names(task: Task, scores: Tensor) -> list[str]:
    """Return the names of the classes with the highest scores."""
    return [task["class_names"][index] for index in scores.argmax(1).tolist()]


class Pictures(Dataset[Any]):
    """Read pictures with Pillow; the target is made up where one is wanted."""

    def __init__(self, paths: Sequence[str], transform: Any, *, with_target: bool = False) -> None:
        self.paths = paths
        self.transform = transform
        self.with_target = with_target

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        """Return an image, or an image and a target."""
        with Image.open(self.paths[index]) as picture:
            image = self.transform(picture.convert("RGB"))
        return (image, 0) if self.with_target else image


def make_loop(task: Task) -> Label:
    """Classify one picture after the other, as PyTorch's and torchvision's guides do."""
    network, transform = load_network(task), make_transform(task)

    def label(paths: Sequence[str]) -> list[str]:
        names = []
        with torch.inference_mode():
            for image in (Pictures(paths, transform)[index] for index in range(len(paths))):
                names += to_names(task, network(image[None]))
        return names

    return label


def make_loader(task: Task, *, batch_size: int, workers: int) -> Label:
    """Classify batches of a `DataLoader`."""
    network, transform = load_network(task), make_transform(task)

    def label(paths: Sequence[str]) -> list[str]:
        names = []
        data = Pictures(paths, transform)
        with torch.inference_mode():
            for images in DataLoader(data, batch_size=batch_size, num_workers=workers):
                names += to_names(task, network(images))
        return names

    return label


def make_fastai(task: Task, *, batch_size: int, workers: int) -> Label:
    """Classify with fastai's `Learner.get_preds` on a `test_dl`."""
    from fastai.vision import all as fa

    spec = task["preprocess"]
    resample = getattr(Image.Resampling, spec["interpolation"].upper())
    block = fa.DataBlock(
        blocks=(fa.ImageBlock, fa.CategoryBlock(vocab=task["class_names"])),
        get_items=lambda _: [Path(path) for path in task["paths"][:2]],  # A learner wants some.
        get_y=lambda _: task["class_names"][0],
        splitter=fa.IndexSplitter([1]),
        item_tfms=[
            fa.Resize(spec["resize_size"], resamples=(resample, resample)),
            fa.CropPad(spec["crop_size"]),
        ],
        batch_tfms=fa.Normalize.from_stats(spec["mean"], spec["std"]),
    )
    dls = block.dataloaders(Path.cwd(), bs=1)
    learner = fa.Learner(dls, load_network(task), loss_func=fa.CrossEntropyLossFlat())

    def label(paths: Sequence[str]) -> list[str]:
        pictures = [Path(path) for path in paths]
        data = learner.dls.test_dl(pictures, bs=batch_size, num_workers=workers)
        with learner.no_bar(), learner.no_logging():
            scores, _ = learner.get_preds(dl=data)
        return to_names(task, scores)

    return label


def make_transformers(task: Task, *, batch_size: int, workers: int) -> Label:
    """Classify with Hugging Face's pipeline, which runs networks of timm by a wrapper."""
    import transformers

    spec, size = task["preprocess"], task["preprocess"]["crop_size"]
    described = {
        "architecture": task["network"],
        "pretrained_cfg": {
            "input_size": (3, size, size),
            "crop_pct": size / spec["resize_size"],
            "interpolation": spec["interpolation"],
            "mean": spec["mean"],
            "std": spec["std"],
        },
    }
    names = dict(enumerate(task["class_names"]))
    config = transformers.TimmWrapperConfig(**described, num_labels=len(names), id2label=names)
    model = transformers.TimmWrapperForImageClassification(config).eval()
    model.timm_model.load_state_dict(torch.load(task["weights"], weights_only=True))
    classify = transformers.pipeline(
        "image-classification",
        model=model,
        image_processor=transformers.TimmWrapperImageProcessor(**described),
        device="cpu",
    )

    def label(paths: Sequence[str]) -> list[str]:
        found = classify(list(paths), top_k=1, batch_size=batch_size, num_workers=workers)
        return [each[0]["label"] for each in found]

    return label


def make_skorch(task: Task, *, batch_size: int, workers: int) -> Label:
    """Classify with skorch's `NeuralNetClassifier.predict_proba`."""
    import skorch

    transform = make_transform(task)
    net = skorch.NeuralNetClassifier(
        load_network(task),
        criterion=nn.CrossEntropyLoss,
        batch_size=batch_size,
        iterator_valid__num_workers=workers,
        classes=list(range(len(task["class_names"]))),
        device="cpu",
    ).initialize()

    def label(paths: Sequence[str]) -> list[str]:
        data = Pictures(paths, transform, with_target=True)
        return to_names(task, torch.from_numpy(net.predict_proba(data)))

    return label


SIDES: dict[str, Callable[..., Label]] = {
    "loop": make_loop,
    "DataLoader": make_loader,
    "fastai": make_fastai,
    "transformers": make_transformers,
    "skorch": make_skorch,
}
