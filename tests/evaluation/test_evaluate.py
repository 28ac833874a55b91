from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from transferkit.data import ImageLoader, ImageSplits
from transferkit.errors import DataError
from transferkit.evaluation import evaluate_model
from transferkit.models import BackboneSpec, build_model


def test_each_image_counts_once_whatever_the_batches(
    tiny_spec: BackboneSpec, tiny_splits: ImageSplits
) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    transform = model.preprocess.eval()
    images = torch.stack([transform(tiny_splits.val[index][0]) for index in range(8)])
    targets = torch.tensor(tiny_splits.val.targets)
    model.eval()
    with torch.inference_mode():
        logits = model(images)
    expected_loss = nn.functional.cross_entropy(logits, targets).item()
    expected_accuracy = (logits.argmax(1) == targets).double().mean().item()
    for batch_size in (1, 3, 8):
        loader = ImageLoader(tiny_splits.val, transform, batch_size=batch_size)
        found = evaluate_model(model, loader.batches(), class_names=tiny_splits.class_names)
        assert found.loss == pytest.approx(expected_loss, rel=1e-5)
        assert found.accuracy == pytest.approx(expected_accuracy)
        assert found.num_images == 8
        assert found.confusion.sum() == 8


@pytest.mark.parametrize("training", [True, False])
def test_mode_stays_as_it_was(
    tiny_spec: BackboneSpec, tiny_splits: ImageSplits, training: bool
) -> None:
    model = build_model(tiny_spec, 2, weights=None).train(training)
    loader = ImageLoader(tiny_splits.val, model.preprocess.eval())
    evaluate_model(model, loader.batches(), class_names=tiny_splits.class_names)
    assert model.training is training
    assert model.backbone.training is training


def test_custom_criterion_is_used(tiny_spec: BackboneSpec, tiny_splits: ImageSplits) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    loader = ImageLoader(tiny_splits.val, model.preprocess.eval())
    found = evaluate_model(
        model,
        loader.batches(),
        class_names=tiny_splits.class_names,
        criterion=lambda logits, targets: torch.tensor(3.0),
    )
    assert found.loss == 3.0


def test_result_as_plain_data(tiny_spec: BackboneSpec, tiny_splits: ImageSplits) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    loader = ImageLoader(tiny_splits.val, model.preprocess.eval())
    found = evaluate_model(model, loader.batches(), class_names=tiny_splits.class_names)
    data = found.to_dict()
    assert data["confusion"] == found.confusion.tolist()
    assert set(data["class_accuracies"]) == {"blue", "red"}


def test_no_batches_is_an_error(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    message = "There is nothing to evaluate: the batches hold no images."
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        evaluate_model(model, [], class_names=("a", "b"))
