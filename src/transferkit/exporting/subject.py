"""What is exported: the network, what is said about it, and the comparison with PyTorch."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from transferkit import __version__
from transferkit._checks import check_choice, check_path, check_type
from transferkit._files import check_writable
from transferkit._seeding import generator_for
from transferkit.artifacts import load_artifact
from transferkit.errors import ConfigError, ExportError, TransferkitError
from transferkit.models import Classifier
from transferkit.models.conversion import TOLERANCES, Run, last_line, relative_difference

Outputs: TypeAlias = Literal["logits", "probabilities"]
"""What an exported model gives: logits (N, K), or their softmax."""

INPUT_NAME = "images"

TOLERANCE = TOLERANCES["float32"]
"""How far an exported model's outputs may differ from PyTorch's, relative to the largest."""

_NUM_IMAGES = (3, 1)  # Others than the two that conversions see.
_IMAGE_SIZE = (48, 40)


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that is ready to be exported.

    Args:
        network: From images float32 `(N, C, H, W)` to outputs float32 `(N, K)`; a copy, on the
            CPU, in eval mode.
        shape: (C, H, W) of the images.
        outputs: What it gives, which is also the name of the output.
        metadata: What goes into the file beside the network; each value is a text.
        pictures: float32 `(N, C, H, W)`, preprocessed, for the comparison.
    """

    network: nn.Module
    shape: tuple[int, int, int]
    outputs: Outputs
    metadata: dict[str, str]
    pictures: Tensor

    def check(self, run: Run, library: str) -> None:
        """Compare what a converted network gives with what PyTorch gives.

        Args:
            run: What runs it.
            library: In what, for the message.

        Raises:
            ExportError: It gives other values than PyTorch.
        """
        for count in _NUM_IMAGES:
            images = self.pictures[:count]
            with torch.no_grad():
                difference = relative_difference(run(images), self.network(images))
            if not difference <= TOLERANCE:
                raise ExportError(
                    f"The exported model gives other values in {library} than in PyTorch: "
                    f"relative to the largest they differ by {difference:.3g}, allowed are "
                    f"{TOLERANCE:g}. Nothing was written. Its forward pass may depend on the "
                    f"values or the number of images; write it without such branches."
                )


def make_subject(
    source: Classifier | str | os.PathLike[str],
    class_names: Sequence[str] | None,
    outputs: Outputs,
) -> Subject:
    """Make what is exported from a model or from an artifact.

    Args:
        source: A classifier, which is left as it is, or the path of an artifact.
        class_names: The names of the classes of a classifier; an artifact has its own.
        outputs: "logits" or "probabilities".

    Raises:
        ConfigError: A value cannot work.
        ArtifactError: The file is no artifact that can be trusted.
        ExportError: The model's outputs are not finite.
    """
    check_choice("outputs", outputs, get_args(Outputs))
    model, names = _resolve(source, class_names)
    layers = [copy.deepcopy(model.backbone), copy.deepcopy(model.head)]
    if outputs == "probabilities":
        layers.append(nn.Softmax(dim=1))
    network = nn.Sequential(*layers).cpu().float().eval().requires_grad_(False)
    preprocess = model.preprocess
    pictures = _make_pictures(model)
    with torch.no_grad():
        if not bool(torch.isfinite(network(pictures)).all()):
            raise ExportError(
                f"The model's {outputs} are not finite (NaN or infinite): its weights are broken. "
                f"Train again, perhaps with a smaller `lr`."
            )
    metadata = {
        "class_names": json.dumps(names, ensure_ascii=False),
        "preprocess": json.dumps(preprocess.to_dict()),
        "preprocess_in_words": preprocess.describe(),
        "outputs": outputs,
        "backbone": model.backbone_name,
        "transferkit_version": __version__,
    }
    size = preprocess.crop_size
    shape = (preprocess.num_channels, size, size)
    return Subject(network, shape, outputs, metadata, pictures)


def _resolve(
    source: Classifier | str | os.PathLike[str], class_names: Sequence[str] | None
) -> tuple[Classifier, list[str]]:
    check_type("source", source, (Classifier, str, os.PathLike), "a Classifier or an artifact")
    if not isinstance(source, Classifier):
        if class_names is not None:
            raise ConfigError(
                "`class_names` are for a model; an artifact has its own. Leave them out."
            )
        artifact = load_artifact(source)
        return artifact.model, list(artifact.class_names)
    names = [] if class_names is None else list(class_names)
    are_texts = all(isinstance(name, str) for name in names)
    if not are_texts or len(names) != source.num_classes or len(set(names)) != len(names):
        raise ConfigError(
            f"`class_names` should be {source.num_classes} different texts, one for each class of "
            f"the model, found {class_names!r}."
        )
    return source, names


def _make_pictures(model: Classifier) -> Tensor:
    """Return pictures of smooth noise, as the preprocessing makes images of them."""
    shape = (max(_NUM_IMAGES), model.preprocess.num_channels, 6, 5)
    coarse = torch.rand(shape, generator=generator_for(0))
    smooth = nn.functional.interpolate(coarse, size=_IMAGE_SIZE, mode="bilinear")
    transform = model.preprocess.eval()
    return torch.stack([transform(image) for image in (smooth * 255).round().to(torch.uint8)])


def check_target(path: str | os.PathLike[str], suffix: str) -> Path:
    """Return the path of an export, when it has the right suffix and can be written.

    Raises:
        ConfigError: It has another suffix.
        OutputError: It cannot be written.
    """
    target = check_path("path", path)
    if target.suffix != suffix:
        raise ConfigError(f"`path` should end in `{suffix}`, found `{target}`.")
    return check_writable(target)


@contextmanager
def conversion_to(library: str) -> Iterator[None]:
    """Turn whatever the parts of a conversion raise into an `ExportError`."""
    try:
        yield
    except (TransferkitError, MemoryError):
        raise
    except Exception as error:
        raise ExportError(
            f"The model cannot be converted to {library}: {last_line(error)}. Another format may "
            f"take it."
        ) from error
