"""`Predictor`: labels for pictures, one or many."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, overload

import torch
from torch import Tensor, nn
from typing_extensions import Self

from transferkit._checks import check_integer, check_number, check_type
from transferkit._device import resolve_device
from transferkit.artifacts import load_artifact
from transferkit.data import ImageDataset
from transferkit.errors import ConfigError
from transferkit.images import ImageSource, Preprocess
from transferkit.inference.abstention import (
    AbstentionReport,
    calibrate_abstention,
    check_calibration,
)
from transferkit.inference.doors import PicturesOf
from transferkit.inference.engine_choice import (
    EngineChoice,
    EngineTrial,
    InferencePrecision,
    check_choice_of_engine,
)
from transferkit.inference.network import MIN_WORTH_CHOOSING, Network
from transferkit.inference.prediction import (
    ClassProbability,
    Failure,
    FeatureVector,
    Prediction,
)
from transferkit.inference.streaming import Work, run_many
from transferkit.inference.tta import (
    TTA,
    check_tta,
    make_transform,
    mean_probabilities,
    split_views,
)
from transferkit.models import BackboneSpec, Classifier
from transferkit.models.engines import Engine, EngineName

DEFAULT_TOP_K = 5


class Predictor:
    """Predict the classes of pictures, with the preprocessing that the model was trained with.

    Several threads may predict with one predictor at a time. On the CPU an engine computes for
    as many of them as there are cores, up to 16; the model itself, which "auto" runs until it
    has chosen an engine, for one after the other.

    Args:
        model: The classifier. It is moved to `device` and stays in the mode that it is in;
            during a prediction it is in eval mode.
        class_names: The names of the classes, by index.
        device: "auto" takes the accelerator where there is one, else the CPU.
        engine: What runs the network: "pytorch"; "openvino" or "onnxruntime", where that
            extra is installed, on the CPU; "auto" takes the fastest installed one whose logits
            agree with PyTorch's, tried when more than 64 pictures come, or an iterator. An
            engine keeps the weights that the model has when it is first used; "auto" runs the
            model itself until then.
        precision: What is computed in: "fp32", or "bf16" where the processor has it.
        threshold: Predictions whose probability is lower say that they abstain, in [0, 1];
            None lets none abstain.
        tta: Test-time augmentation, the mean of the probabilities of several views: "flip" takes
            the picture and its mirror image, in twice the time; "five_crop" the corners and
            the centre of the picture, in five times the time and memory; None takes the picture
            alone.
        temperature: What logits are divided by before softmax, in [0.001, 1000]. More than 1
            makes the model less sure of itself; the labels stay. `calibrate` finds one.

    Raises:
        ConfigError: The class names do not fit the model, the device or the engine is not
            there, `threshold` or `temperature` is out of range, or `tta` does not fit the model.
        MissingDependencyError: What the engine needs is not installed.

    Example:
        >>> from transferkit.models import build_model
        >>> model = build_model("resnet18", 2, weights=None)
        >>> predictor = Predictor(model, class_names=["ants", "bees"])
        >>> prediction = predictor.predict(torch.zeros(3, 50, 40, dtype=torch.uint8))
        >>> prediction.label in ("ants", "bees")
        True

    References:
        Test-time augmentation: Krizhevsky, Sutskever and Hinton, "ImageNet Classification with
        Deep Convolutional Neural Networks", NeurIPS 2012,
        https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks
    """

    def __init__(
        self,
        model: Classifier,
        *,
        class_names: Sequence[str],
        device: str | torch.device = "auto",
        engine: EngineChoice = "auto",
        precision: InferencePrecision = "fp32",
        threshold: float | None = None,
        tta: TTA | None = None,
        temperature: float = 1.0,
    ) -> None:
        check_type("model", model, Classifier, "a Classifier, as `build_model` makes one")
        self.class_names: tuple[str, ...] = tuple(class_names)
        if len(self.class_names) != model.num_classes:
            raise ConfigError(
                f"`class_names` should have a name for each of the model's {model.num_classes} "
                f"classes, found {len(self.class_names)}."
            )
        place = resolve_device(device)
        tta = check_tta(tta, model.preprocess)
        if threshold is not None:
            threshold = check_number(
                "threshold", threshold, lambda value: 0 <= value <= 1, "in [0, 1]"
            )
        self.threshold: float | None = threshold
        self.temperature: float = check_number(
            "temperature", temperature, lambda value: 1e-3 <= value <= 1e3, "in [0.001, 1000]"
        )
        self.tta: TTA | None = tta
        self._network = Network(model, device=place, engine=engine, precision=precision)
        self._backbone = self._network.of_backbone()

    def __copy__(self) -> Self:
        """Return a predictor of the same model, which may take another engine than this one."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._network = copy.copy(self._network)
        other._backbone = copy.copy(self._backbone)
        return other

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device = "auto",
        backbone: BackboneSpec | nn.Module | None = None,
        self_test: bool = True,
        strict: bool = False,
        engine: EngineChoice = "auto",
        precision: InferencePrecision = "fp32",
        threshold: float | None = None,
        tta: TTA | None = None,
        temperature: float = 1.0,
    ) -> Self:
        """Load a predictor from an artifact; no network, no code from the file.

        Args:
            path: The artifact, as `Trainer.save` wrote it.
            device: "auto", or a device's name.
            backbone: The spec or network for a backbone that is not registered here.
            self_test: Check that decoding, preprocessing and model still give what they gave
                when the file was saved, see `load_artifact`.
            strict: Let a drift of one of them be an error, not an `ArtifactWarning`.
            engine: As for `Predictor`, like all that follow.
            precision: What is computed in.
            threshold: Below which probability predictions abstain.
            tta: Test-time augmentation.
            temperature: What logits are divided by.

        Returns:
            The predictor.

        Raises:
            ArtifactError: The file is no artifact, damaged, too new, or fails its self-test.
            ConfigError: The device or engine is not there, or `strict` without `self_test`.
            MissingDependencyError: What the engine needs is not installed.
        """
        place = resolve_device(device)
        check_choice_of_engine(engine, precision, place)
        artifact = load_artifact(path, backbone=backbone, self_test=self_test, strict=strict)
        return cls(
            artifact.model,
            class_names=artifact.class_names,
            device=place,
            engine=engine,
            precision=precision,
            threshold=threshold,
            tta=tta,
            temperature=temperature,
        )

    @property
    def model(self) -> Classifier:
        """The classifier, on `device`."""
        return self._network.model

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self._network.device

    @property
    def precision(self) -> InferencePrecision:
        """What is computed in."""
        return self._network.precision

    @property
    def digest(self) -> str:
        """The SHA-256 over class names, preprocessing and weights, in hex; not the engine."""
        told = {
            "backbone": self.model.backbone_name,
            "class_names": self.class_names,
            "head": self.model.head_spec.to_dict(),
            "preprocess": self.preprocess.to_dict(),
        }
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
        for name, value in sorted(self.model.state_dict().items()):
            plain = value.detach().cpu().contiguous()
            digest.update(f"\0{name}\0{plain.dtype}\0{tuple(plain.shape)}\0".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def engine_name(self) -> EngineName:
        """The engine that runs many pictures; "auto" chooses it now, if it has not yet."""
        return self._network.chosen()[0]

    @property
    def engine_report(self) -> tuple[EngineTrial, ...]:
        """What came of each engine that "auto" tried; empty before it did."""
        return self._network.report

    @property
    def preprocess(self) -> Preprocess:
        """How pictures become images for the model."""
        return self.model.preprocess

    def prefer_engine(self, name: EngineName) -> None:
        """Take an engine where "auto" has not chosen yet, so that a run goes on as it began.

        Args:
            name: The engine's name.

        Raises:
            ConfigError: There is no such engine here.
            MissingDependencyError: What it needs is not installed.
        """
        for network in (self._network, self._backbone):
            network.prefer(name)

    def expect(self, num_images: int) -> None:
        """Say how many pictures will come in all, where a call cannot tell.

        Where they are few, "auto" takes PyTorch without trying what else there is.

        Args:
            num_images: Their number, at least 0.
        """
        if check_integer("num_images", num_images, minimum=0) <= MIN_WORTH_CHOOSING:
            self.prefer_engine("pytorch")

    def predict(self, image: ImageSource, *, top_k: int | None = None) -> Prediction:
        """Predict the class of one picture.

        Args:
            image: Path, bytes, binary file, PIL image, array or tensor. Arrays and tensors
                hold RGB, the channels first or last, as uint8 in [0, 255] or floats in [0, 1],
                which are rounded to such levels. With other channels what `Preprocess.decode`
                takes.
            top_k: How many of the likeliest classes to return; None takes 5, or all
                classes where there are fewer.

        Returns:
            The prediction, with `path` set where the picture came from one.

        Raises:
            ImageError: It cannot be read as a picture.
            ConfigError: `top_k` is out of range.
        """
        return next(self.predict_many([image], top_k=top_k, batch_size=1, num_workers=0))

    @overload
    def predict_many(
        self,
        images: str | os.PathLike[str] | Iterable[ImageSource],
        *,
        top_k: int | None = None,
        batch_size: int | Literal["auto"] = "auto",
        on_error: Literal["raise", "skip"] = "raise",
        num_workers: int | Literal["auto"] = "auto",
        progress: bool = False,
    ) -> Iterator[Prediction]: ...
    @overload
    def predict_many(
        self,
        images: str | os.PathLike[str] | Iterable[ImageSource],
        *,
        top_k: int | None = None,
        batch_size: int | Literal["auto"] = "auto",
        on_error: Literal["record"],
        num_workers: int | Literal["auto"] = "auto",
        progress: bool = False,
    ) -> Iterator[Prediction | Failure]: ...

    def predict_many(
        self,
        images: str | os.PathLike[str] | Iterable[ImageSource],
        *,
        top_k: int | None = None,
        batch_size: int | Literal["auto"] = "auto",
        on_error: Literal["raise", "skip", "record"] = "raise",
        num_workers: int | Literal["auto"] = "auto",
        progress: bool = False,
    ) -> Iterator[Prediction] | Iterator[Prediction | Failure]:
        """Predict the classes of many pictures, in their order.

        Threads read pictures while the network runs, never more than some batches ahead, so
        that an endless iterable takes no more memory than a short one. They end with the
        iterator that is returned, also where it is closed before its end.

        Args:
            images: A folder, whose pictures are found at any depth and sorted by path, a glob
                pattern, or an iterable of what `predict` takes; it may be endless.
            top_k: As for `predict`.
            batch_size: Pictures that go through the network together, at least 1; "auto"
                takes what suits the engine. It changes the last bits of the results only. On
                the CPU a batch is computed by a share of the cores, so that fewer batches than
                cores leave some idle.
            on_error: What comes of a picture that cannot be read: "raise" raises its error
                when its turn comes, "record" gives a `Failure` in its place, "skip" leaves it
                out.
            num_workers: Threads that read, 0 reads without; "auto" takes one for each core,
                at most 16.
            progress: Show a bar with rate and remaining time on standard error.

        Returns:
            An iterator over the predictions; pictures are read as it advances.

        Raises:
            DataError: The folder is missing or holds no pictures.
            ImageError: A picture cannot be read, when its turn comes.
            ConfigError: An argument is out of range.
        """
        k = self._check_top_k(top_k)
        work = Work(
            self._network,
            self.preprocess,
            make_transform(self.preprocess, self.tta),
            lambda engine, batch: self._rank(self._logits(engine, batch), k),
            self._to_prediction,
        )
        return run_many(
            work,
            images,
            batch_size=batch_size,
            on_error=on_error,
            num_workers=num_workers,
            progress=progress,
        )

    @overload
    def features_many(
        self,
        images: str | os.PathLike[str] | Iterable[ImageSource],
        *,
        batch_size: int | Literal["auto"] = "auto",
        on_error: Literal["raise", "skip"] = "raise",
        num_workers: int | Literal["auto"] = "auto",
        progress: bool = False,
    ) -> Iterator[FeatureVector]: ...
    @overload
    def features_many(
        self,
        images: str | os.PathLike[str] | Iterable[ImageSource],
        *,
        batch_size: int | Literal["auto"] = "auto",
        on_error: Literal["record"],
        num_workers: int | Literal["auto"] = "auto",
        progress: bool = False,
    ) -> Iterator[FeatureVector | Failure]: ...

    def features_many(
        self,
        images: str | os.PathLike[str] | Iterable[ImageSource],
        *,
        batch_size: int | Literal["auto"] = "auto",
        on_error: Literal["raise", "skip", "record"] = "raise",
        num_workers: int | Literal["auto"] = "auto",
        progress: bool = False,
    ) -> Iterator[FeatureVector] | Iterator[FeatureVector | Failure]:
        """Compute the features of many pictures, in their order, in place of predictions.

        All that `predict_many` says of reading, order and memory holds here. "auto" chooses the
        engine for features by itself.

        Args:
            images: As for `predict_many`, like all that follow.
            batch_size: Pictures that go through the network together.
            on_error: What comes of a picture that cannot be read.
            num_workers: Threads that read.
            progress: Show a bar.

        Returns:
            An iterator over the features; pictures are read as it advances.

        Raises:
            DataError: The folder is missing or holds no pictures.
            ImageError: A picture cannot be read, when its turn comes.
            ConfigError: An argument is out of range, or the predictor has a `tta`, which is about
                probabilities.

        Example:
            >>> from transferkit.models import build_model
            >>> model = build_model("resnet18", 2, weights=None)
            >>> predictor = Predictor(model, class_names=["ants", "bees"], device="cpu")
            >>> picture = torch.zeros(3, 50, 40, dtype=torch.uint8)
            >>> [each.values.shape for each in predictor.features_many([picture, picture])]
            [(512,), (512,)]
        """
        if self.tta is not None:
            raise ConfigError(
                f'`features_many` looks at one view of a picture, and tta="{self.tta}" averages '
                f"the probabilities of several. Make a predictor without `tta`."
            )
        work = Work(
            self._backbone,
            self.preprocess,
            make_transform(self.preprocess, None),
            self._features,
            # A row of its own, lest one that is kept keep its batch.
            lambda row, path: FeatureVector(row.numpy().copy(), path),
        )
        return run_many(
            work,
            images,
            batch_size=batch_size,
            on_error=on_error,
            num_workers=num_workers,
            progress=progress,
        )

    def calibrate(
        self,
        data: ImageDataset,
        *,
        target_accuracy: float = 0.95,
        confidence: float = 0.95,
        batch_size: int | Literal["auto"] = "auto",
        num_workers: int | Literal["auto"] = "auto",
        progress: bool = False,
    ) -> AbstentionReport:
        """Choose temperature and threshold, so that the answers keep an accuracy.

        Sets `temperature` and `threshold` of this predictor, in whose place other threads should
        not predict meanwhile; where it fails, both stay as they were. To use them again without
        the pictures, give them to `load`. Where new pictures are drawn as these were, the
        answers that are not abstained from have at least `target_accuracy`, unless these were
        drawn by a chance of less than 1 - `confidence`. It promises nothing for other pictures:
        another camera, another season, another class.

        Args:
            data: Pictures with labels that the model was not trained on, such as `splits.test`,
                or `splits.val`, by which no more than the best epoch was chosen. Half of them
                give the temperature, half test the threshold.
            target_accuracy: The accuracy among the answers, in (0, 1).
            confidence: In (0, 1).
            batch_size: As for `predict_many`.
            num_workers: Likewise.
            progress: Likewise.

        Returns:
            What was set, and the share of pictures that have an answer.

        Raises:
            ConfigError: An argument is out of range.
            DataError: `data` has other classes than the model, or no threshold is sure to keep
                the accuracy.
            ImageError: A picture cannot be read.
        """
        targets = check_calibration(data, self.class_names, target_accuracy, confidence)
        work: Work[Tensor, Tensor] = Work(
            self._network,
            self.preprocess,
            make_transform(self.preprocess, self.tta),
            lambda engine, batch: torch.stack(self._logits(engine, batch), dim=1),
            lambda row, _: row,
        )
        rows = run_many(
            work,
            PicturesOf(data),
            batch_size=batch_size,
            on_error="raise",
            num_workers=num_workers,
            progress=progress,
        )
        logits = torch.stack([each for each in rows if isinstance(each, Tensor)])
        report = calibrate_abstention(
            logits.unbind(1), targets, target_accuracy=target_accuracy, confidence=confidence
        )
        self.temperature, self.threshold = report.temperature, report.threshold
        return report

    def _logits(self, engine: Engine | None, images: Tensor) -> list[Tensor]:
        """Return the logits `(N, C)` of each view, on the CPU."""
        return [self._network.run(engine, view) for view in split_views(images, self.tta)]

    def _features(self, engine: Engine | None, images: Tensor) -> Tensor:
        return self.model.check_features(self._backbone.run(engine, images), len(images))

    def _rank(self, views: list[Tensor], k: int) -> Iterator[tuple[ClassProbability, ...]]:
        probabilities = mean_probabilities(views, self.temperature)
        values, indices = probabilities.sort(dim=1, descending=True, stable=True)
        for row, order in zip(values[:, :k].tolist(), indices[:, :k].tolist(), strict=True):
            yield tuple(
                ClassProbability(self.class_names[index], index, probability)
                for index, probability in zip(order, row, strict=True)
            )

    def _to_prediction(self, top_k: tuple[ClassProbability, ...], path: Path | None) -> Prediction:
        abstains = self.threshold is not None and top_k[0].probability < self.threshold
        return Prediction(top_k, path, abstains)

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
