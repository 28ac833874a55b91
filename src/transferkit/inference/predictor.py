"""`Predictor`: labels for pictures, one or many."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import Self

from transferkit._allocator import buffers_kept
from transferkit._checks import check_integer, check_type
from transferkit._device import resolve_device
from transferkit.artifacts import load_artifact
from transferkit.data.folders import find_images
from transferkit.errors import ConfigError, ImageError
from transferkit.images import ImageSource, Preprocess
from transferkit.inference.prediction import ClassProbability, Failure, Prediction
from transferkit.models import BackboneSpec, Classifier
from transferkit.models.modes import evaluating

DEFAULT_TOP_K = 5


class Predictor:
    """Predict the classes of pictures, with the preprocessing that the model was trained with.

    Args:
        model: The classifier. It is moved to `device` and stays in the mode that it is in;
            during a prediction it is in eval mode.
        class_names: The names of the classes, by index.
        device: "auto" takes the accelerator where there is one, else the CPU.

    Raises:
        ConfigError: The class names do not fit the model, or the device is not there.

    Example:
        >>> from transferkit.models import build_model
        >>> model = build_model("resnet18", 2, weights=None)
        >>> predictor = Predictor(model, class_names=["ants", "bees"])
        >>> prediction = predictor.predict(torch.zeros(3, 50, 40, dtype=torch.uint8))
        >>> prediction.label in ("ants", "bees")
        True
    """

    def __init__(
        self,
        model: Classifier,
        *,
        class_names: Sequence[str],
        device: str | torch.device = "auto",
    ) -> None:
        check_type("model", model, Classifier, "a Classifier, as `build_model` makes one")
        self.class_names: tuple[str, ...] = tuple(class_names)
        if len(self.class_names) != model.num_classes:
            raise ConfigError(
                f"`class_names` should have a name for each of the model's {model.num_classes} "
                f"classes, found {len(self.class_names)}."
            )
        self.device: torch.device = resolve_device(device)
        self.model: Classifier = model.to(self.device)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device = "auto",
        backbone: BackboneSpec | nn.Module | None = None,
        self_test: bool = True,
        engine: str = "auto",
        precision: str = "fp32",
    ) -> Self:
        """Load a predictor from an artifact; no network, no code from the file.

        Args:
            path: The artifact, as `Trainer.save` wrote it.
            device: "auto", or a device's name.
            backbone: The spec or network for a backbone that is not registered here.
            self_test: Check that the model still gives the logits that it gave when saved.

        Returns:
            The predictor.

        Raises:
            ArtifactError: The file is no artifact, damaged, too new, or fails its self-test.
            ConfigError: The device is not there.
        """
        device = resolve_device(device)
        artifact = load_artifact(path, backbone=backbone, self_test=self_test)
        return cls(artifact.model, class_names=artifact.class_names, device=device)

    engine_name = "pytorch"
    precision = "fp32"

    @property
    def digest(self) -> str:
        """SHA-256 over weights, class names and preprocessing."""
        digest = hashlib.sha256(repr((self.class_names, self.preprocess)).encode())
        for tensor in self.model.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    @property
    def preprocess(self) -> Preprocess:
        """How pictures become images for the model."""
        return self.model.preprocess

    def predict(self, image: ImageSource, *, top_k: int | None = None) -> Prediction:
        """Predict the class of one picture.

        Args:
            image: Path, bytes, PIL image, array `(H, W, 3)` or tensor `(3, H, W)`, the last
                two uint8 RGB in [0, 255]. With other channels what `Preprocess.decode` takes.
            top_k: How many of the likeliest classes to return; None takes 5, or all
                classes where there are fewer.

        Returns:
            The prediction, with `path` set where the picture came from one.

        Raises:
            ImageError: It cannot be read as a picture.
            ConfigError: `top_k` is out of range.
        """
        (found,) = self.predict_many([image], top_k=top_k, batch_size=1)
        assert isinstance(found, Prediction)
        return found

    def predict_many(
        self,
        images: str | os.PathLike[str] | Iterable[ImageSource],
        *,
        top_k: int | None = None,
        batch_size: int | str = "auto",
        on_error: str = "raise",
        num_workers: int | str = "auto",
        progress: bool = False,
    ) -> Iterator[Prediction | Failure]:
        """Predict the classes of many pictures, batch by batch, in their order.

        Args:
            images: A folder, whose pictures are found at any depth and sorted by path, or
                an iterable of what `predict` takes; it may be endless.
            top_k: As for `predict`.
            batch_size: Pictures that go through the network together, at least 1.

        Returns:
            An iterator over the predictions; pictures are read as it advances.

        Raises:
            DataError: The folder is missing or holds no pictures.
            ImageError: A picture cannot be read, when its turn comes.
            ConfigError: `top_k` or `batch_size` is out of range.
        """
        k = self._check_top_k(top_k)
        if batch_size == "auto":
            batch_size = 32
        batch_size = check_integer("batch_size", batch_size, minimum=1)
        if isinstance(images, (str, os.PathLike)):
            images = find_images(images)
        if isinstance(images, (bytes, Tensor)) or not isinstance(images, Iterable):
            raise ConfigError(
                f"`predict_many` takes a folder or an iterable of pictures, found "
                f"{type(images).__name__}. For one picture call `predict`."
            )
        return self._predict_iterable(iter(images), k, batch_size, on_error)

    def _predict_iterable(
        self, images: Iterator[ImageSource], k: int, batch_size: int, on_error: str
    ) -> Iterator[Prediction | Failure]:
        transform = self.preprocess.eval()
        while sources := list(islice(images, batch_size)):
            ready: list[Tensor] = []
            good: list[ImageSource] = []
            failures: dict[int, Failure] = {}
            problem: ImageError | None = None
            for place, source in enumerate(sources):
                try:
                    ready.append(transform(self.preprocess.decode(source)))
                    good.append(source)
                except ImageError as error:
                    if on_error == "raise":
                        problem = error  # Its turn comes after the good ones before it.
                        break
                    path = Path(source) if isinstance(source, (str, os.PathLike)) else None
                    failures[place] = Failure(str(error), path)
            found: list[Prediction] = []
            if ready:
                # For the batch alone: whoever takes the predictions may do so for hours.
                with buffers_kept():
                    found = list(self._predict_batch(good, torch.stack(ready), k))
            predictions = iter(found)
            for place in range(len(found) + len(failures)):
                yield failures[place] if place in failures else next(predictions)
            if problem is not None:
                raise problem

    def _predict_batch(
        self, sources: Sequence[ImageSource], batch: Tensor, k: int
    ) -> Iterator[Prediction]:
        probabilities = self._probabilities(batch.to(self.device)).cpu()
        values, indices = probabilities.sort(dim=1, descending=True, stable=True)
        for source, row, order in zip(sources, values.tolist(), indices.tolist(), strict=True):
            ranked = tuple(
                ClassProbability(self.class_names[index], index, probability)
                for index, probability in zip(order[:k], row[:k], strict=True)
            )
            path = Path(source) if isinstance(source, (str, os.PathLike)) else None
            yield Prediction(ranked, path)

    def _probabilities(self, images: Tensor) -> Tensor:
        with evaluating(self.model), torch.no_grad():
            probabilities: Tensor = self.model(images).float().softmax(dim=1)
        return probabilities

    def _check_top_k(self, top_k: int | None) -> int:
        if top_k is None:
            return min(DEFAULT_TOP_K, len(self.class_names))
        top_k = check_integer("top_k", top_k, minimum=1)
        if top_k > len(self.class_names):
            raise ConfigError(
                f"`top_k` should lie in [1, {len(self.class_names)}], the number of classes, "
                f"found {top_k}."
            )
        return top_k
