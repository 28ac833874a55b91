from __future__ import annotations

import itertools
import re
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from transferkit.data import ImageSplits
from transferkit.errors import BackboneError, ConfigError, ImageError
from transferkit.inference import Failure, FeatureVector, Predictor, engine_choice
from transferkit.models import Classifier, build_model
from transferkit.models.engines import count_lanes

NAMES = ("blue", "red")


@pytest.fixture
def predictor(model: Classifier) -> Predictor:
    return Predictor(model, class_names=NAMES, device="cpu", engine="pytorch")


def stacked(found: Any) -> torch.Tensor:
    return torch.from_numpy(np.stack([each.values for each in found]))


def test_they_are_those_of_extract_features_bit_for_bit(
    predictor: Predictor, model: Classifier, tiny_splits: ImageSplits
) -> None:
    for size in (1, 5, 16):
        expected = model.extract_features(tiny_splits.train, batch_size=size, verbose=False)
        found = list(predictor.features_many(tiny_splits.train.paths, batch_size=size))
        assert torch.equal(stacked(found), expected.values)
        assert [str(each.path) for each in found] == list(expected.paths)
    assert found[0].values.dtype == np.float32
    assert all(each.values.base is None for each in found)  # None keeps its batch.


@pytest.mark.parametrize("engine", ["auto", "openvino", "onnxruntime"])
def test_engines_agree(
    predictor: Predictor, model: Classifier, tiny_splits: ImageSplits, engine: Any
) -> None:
    other = Predictor(model, class_names=NAMES, device="cpu", engine=engine)
    paths = [*tiny_splits.train.paths] * 5  # So many that "auto" tries them.
    found = stacked(other.features_many(paths))
    torch.testing.assert_close(found, stacked(predictor.features_many(paths)))


def test_few_pictures_are_not_worth_a_choice(
    predictor: Predictor, model: Classifier, tiny_splits: ImageSplits, monkeypatch: Any
) -> None:
    monkeypatch.setattr(engine_choice, "_try_engine", None)
    auto = Predictor(model, class_names=NAMES, device="cpu")
    found = stacked(auto.features_many(tiny_splits.train.paths))
    torch.testing.assert_close(found, stacked(predictor.features_many(tiny_splits.train.paths)))
    auto.expect(3)
    next(auto.features_many(iter(tiny_splits.train.paths)))  # Of whose number it knows nothing.


def test_errors_have_their_places(predictor: Predictor, tiny_splits: ImageSplits) -> None:
    first, second, *_ = tiny_splits.train.paths
    pictures: list[Any] = [first, b"no", second]
    found = list(predictor.features_many(pictures, on_error="record"))
    assert [type(each) for each in found] == [FeatureVector, Failure, FeatureVector]
    assert len(list(predictor.features_many(pictures, on_error="skip"))) == 2
    features = predictor.features_many(pictures)
    assert next(features).path == first
    with pytest.raises(ImageError):
        next(features)


def test_an_endless_iterable_is_drawn_some_batches_ahead(predictor: Predictor) -> None:
    drawn = itertools.count()
    picture = torch.zeros(3, 40, 40, dtype=torch.uint8)
    features = predictor.features_many((picture for _ in drawn), batch_size=4, num_workers=2)
    next(features)
    num_batches = 4 + count_lanes(predictor._backbone.chosen()[1])
    assert next(drawn) <= 4 * num_batches  # Two are read ahead, others are in the network.
    features.close()  # type: ignore[attr-defined]


def test_beside_predictions_in_other_threads(model: Classifier, tiny_splits: ImageSplits) -> None:
    model.train()  # Which no thread may see that runs it.
    predictor = Predictor(model, class_names=NAMES, device="cpu")
    paths = list(tiny_splits.train.paths)
    expected = stacked(predictor.features_many(paths))
    labels = [each.top_k for each in predictor.predict_many(paths)]
    failures: list[object] = []

    def predict() -> None:
        for _ in range(10):
            if [each.top_k for each in predictor.predict_many(paths)] != labels:
                failures.append("prediction")

    def compute() -> None:
        for _ in range(10):
            if not torch.equal(stacked(predictor.features_many(paths)), expected):
                failures.append("features")

    threads = [threading.Thread(target=each) for each in (predict, compute, predict, compute)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert model.training


def test_tta_is_refused(model: Classifier) -> None:
    message = (
        '`features_many` looks at one view of a picture, and tta="flip" averages the '
        "probabilities of several. Make a predictor without `tta`."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        Predictor(model, class_names=NAMES, device="cpu", tta="flip").features_many([])


def test_a_backbone_of_another_shape() -> None:
    class Wide(nn.Module):
        width = 4

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean(dim=(1, 2, 3))[:, None].expand(-1, self.width)

    backbone = Wide()
    backbone.weight = nn.Parameter(torch.ones(1))
    model = build_model(backbone, 2, weights=None, num_features=4)
    predictor = Predictor(model, class_names=NAMES, device="cpu")
    backbone.width = 5
    message = (
        f"Backbone `{Wide.__qualname__}` should give features of the shape (1, 4), found (1, 5). "
        f"Check its `num_features` and that it ends in a flat vector."
    )
    with pytest.raises(BackboneError, match=f"^{re.escape(message)}$"):
        next(predictor.features_many([torch.zeros(3, 9, 9, dtype=torch.uint8)]))
