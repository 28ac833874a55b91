"""What runs the network of a predictor: the model itself, or an engine in its lanes."""

from __future__ import annotations

import copy
import threading

import torch
from torch import Tensor, nn
from typing_extensions import Self

from transferkit.inference.engine_choice import (
    EngineChoice,
    EngineTrial,
    InferencePrecision,
    check_choice_of_engine,
    choose_engine,
    make_named_engine,
)
from transferkit.models import Classifier
from transferkit.models.conversion import ConvertedEngine
from transferkit.models.engines import (
    DEFAULT_BATCH_SIZE,
    Engine,
    EngineName,
    choose_batch_size,
    count_lanes,
)
from transferkit.models.modes import evaluating

MIN_WORTH_CHOOSING = 64
"""Up to so many pictures PyTorch runs the model as it is: choosing an engine takes seconds."""


class Network:
    """Run a classifier by the engine that was asked for, or by the fastest that agrees.

    The engine is made, or chosen, when it is first needed, with the weights that the model has
    then. Several threads may call at a time.

    Args:
        model: The classifier, moved to `device`.
        device: Where it runs.
        engine: As for `Predictor`.
        precision: Likewise.

    Raises:
        ConfigError: The engine is not there, or not on this device.
        MissingDependencyError: What the engine needs is not installed.
    """

    def __init__(
        self,
        model: Classifier,
        *,
        device: torch.device,
        engine: EngineChoice,
        precision: InferencePrecision,
    ) -> None:
        check_choice_of_engine(engine, precision, device)
        self.model: Classifier = model.to(device)
        self.device: torch.device = device
        self.precision: InferencePrecision = precision
        self.report: tuple[EngineTrial, ...] = ()
        """What came of each engine that "auto" tried; empty before it did."""
        self._asked: EngineChoice = engine
        self._engine: tuple[EngineName, Engine] | None = None
        self._engine_for_few: Engine | None = None
        self._lock = threading.RLock()
        self._part: nn.Module = model

    def of_backbone(self) -> Self:
        """Return what runs the backbone alone, asked for the same, for features in place of logits.

        One of the two runs the model at a time where no more than one thread may.
        """
        other = copy.copy(self)
        other._part = self.model.backbone
        return other

    def prefer(self, name: EngineName) -> None:
        """Take an engine where "auto" has not chosen yet.

        Raises:
            ConfigError: There is no such engine here.
            MissingDependencyError: What it needs is not installed.
        """
        check_choice_of_engine(name, self.precision, self.device)
        if self._asked == "auto" and self._engine is None:
            self._asked = name

    def chosen(self) -> tuple[EngineName, Engine]:
        """Return the engine's name and the engine; "auto" chooses now, if it has not yet."""
        with self._lock:
            if self._engine is None and self._asked == "auto":
                name, engine, self.report = choose_engine(
                    self._part,
                    self.model.preprocess,
                    precision=self.precision,
                    device=self.device,
                )
                self._engine = name, engine
            elif self._engine is None:
                named: EngineName = self._asked  # type: ignore[assignment]
                self._engine = named, self._make(named)
            return self._engine

    def engine_for(self, total: int | None) -> Engine | None:
        """Return the engine for so many pictures; None runs the model as it is.

        Args:
            total: How many pictures will come; None where nobody knows.
        """
        few = total is not None and total <= MIN_WORTH_CHOOSING
        if self._engine is not None or self._asked != "auto" or not few:
            return self.chosen()[1]
        # The model as it is computes in float32.
        return None if self.precision == "fp32" else self._for_few()

    def _for_few(self) -> Engine:
        with self._lock:
            if self._engine_for_few is None:
                self._engine_for_few = self._make("pytorch")
            return self._engine_for_few

    def _make(self, name: EngineName) -> Engine:
        engine = make_named_engine(self._part, name, precision=self.precision, device=self.device)
        if isinstance(engine, ConvertedEngine):
            engine.prepare(self._shape)  # Here rather than in a lane, with its share of the cores.
        return engine

    @property
    def _shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        spec = self.model.preprocess
        return spec.num_channels, spec.crop_size, spec.crop_size

    def batch_size_for(self, engine: Engine | None, total: int | None) -> int:
        """Return the batch size that suits an engine, by trying where that pays.

        Args:
            engine: What `engine_for` gave.
            total: How many pictures will come; None where nobody knows.
        """
        if engine is None:
            return DEFAULT_BATCH_SIZE
        with self._lock:  # Trying sizes runs the engine.
            return choose_batch_size(engine, self._shape, num_images=total or 0, device=self.device)

    def run(self, engine: Engine | None, images: Tensor) -> Tensor:
        """Return the logits of images, or their features.

        Args:
            engine: What `engine_for` gave.
            images: float32 `(N, C, H, W)`, preprocessed.

        Returns:
            float32 `(N, num_classes)` or `(N, D)`, on the CPU.
        """
        if engine is not None and count_lanes(engine) > 1:
            return engine(images)
        # One at a time: engines keep buffers, and another thread would put the model back into
        # the mode that it was in while this one runs it.
        with self._lock:
            if engine is not None:
                return engine(images).float().cpu()
            with evaluating(self.model), torch.no_grad():
                outputs: Tensor = self._part(images.to(self.device).contiguous())
            return outputs.float().cpu()
