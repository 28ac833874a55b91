"""Predictors: small, counting, able to fail at a given picture, asked by several threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from transferkit.data import ImageSplits
from transferkit.inference import ClassProbability, Failure, Prediction, Predictor
from transferkit.models import BackboneSpec, Classifier, build_model

NAMES = ("blue", "red")


class WatchedPredictor(Predictor):
    """A predictor that notes which paths it is given, and stops where a test wants it to."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seen: list[str] = []
        self.stop_after: int | None = None
        self.stop_by: BaseException = KeyboardInterrupt()
        run = self._network.run

        def run_one_by_one(engine: Any, images: Tensor) -> Tensor:
            return torch.cat([run(engine, image[None]) for image in images])

        # A run that goes on puts pictures into other batches: so they have the same bits in all.
        self._network.run = run_one_by_one  # type: ignore[method-assign]

    def predict_many(self, images: Any, **options: Any) -> Iterator[Any]:
        return self._watch(super().predict_many(self._note(images), **options))

    def _note(self, images: Any) -> Iterator[Any]:
        for image in images:
            self.seen.append(str(image))
            yield image

    def _watch(self, predictions: Iterator[Prediction | Failure]) -> Iterator[Prediction | Failure]:
        for number, found in enumerate(predictions):
            if number == self.stop_after:
                raise self.stop_by
            yield found


class InstantPredictor(Predictor):
    """A predictor that looks at no picture, for a great many of them."""

    def predict_many(self, images: Any, **options: Any) -> Iterator[Any]:
        top_k = (ClassProbability("blue", 0, 0.75),)
        return (Prediction(top_k, Path(path)) for path in images)


@pytest.fixture
def model(tiny_spec: BackboneSpec) -> Classifier:
    return build_model(tiny_spec, 2, weights=None)


@pytest.fixture
def predict_in_threads() -> Callable[[Predictor, list[Path]], list[Any]]:
    """Predict all pictures one by one, in each of four threads at a time."""

    def predict(predictor: Predictor, paths: list[Path]) -> list[Any]:
        with ThreadPoolExecutor(4) as pool:
            begun = Barrier(4)

            def run() -> list[Any]:
                begun.wait()
                return [predictor.predict(path).top_k for path in paths]

            return [each.result() for each in [pool.submit(run) for _ in range(4)]]

    return predict


@pytest.fixture
def watched(tiny_spec: BackboneSpec) -> WatchedPredictor:
    return WatchedPredictor(
        build_model(tiny_spec, 2, weights=None), class_names=NAMES, device="cpu", engine="pytorch"
    )


@pytest.fixture
def instant(tiny_spec: BackboneSpec) -> InstantPredictor:
    return InstantPredictor(
        build_model(tiny_spec, 2, weights=None), class_names=NAMES, device="cpu", engine="pytorch"
    )


@pytest.fixture
def pictures(tiny_splits: ImageSplits) -> list[Path]:
    """Sixteen pictures, all of them different, in a folder `train`."""
    return list(tiny_splits.train.paths)
