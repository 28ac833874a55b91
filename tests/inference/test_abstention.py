from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from transferkit.data import ImageDataset, ImageSplits
from transferkit.errors import ConfigError, DataError, ImageError
from transferkit.inference import AbstentionReport, Predictor
from transferkit.inference.abstention import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    calibrate_abstention,
    fit_temperature,
    lower_bound,
    make_candidates,
)
from transferkit.inference.tta import mean_probabilities
from transferkit.models import BackboneSpec, build_model

NAMES = ("blue", "red")


def draw(count: int, seed: int, factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits whose softmax is right about the targets, made bolder by a factor."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 4, generator=generator) * 3
    targets = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    return logits * factor, targets


def calibrate(
    logits: torch.Tensor, targets: torch.Tensor, accuracy: float, confidence: float = 0.95
) -> AbstentionReport:
    return calibrate_abstention([logits], targets, target_accuracy=accuracy, confidence=confidence)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_a_factor(factor: float) -> None:
    logits, targets = draw(20_000, seed=1, factor=factor)
    assert fit_temperature([logits], targets) == pytest.approx(factor, rel=0.05)


@pytest.mark.parametrize("num_views", [1, 5])
def test_the_temperature_is_where_the_loss_is_lowest(num_views: int) -> None:
    logits, targets = draw(300, seed=2, factor=2.0)
    noise = torch.randn(num_views, *logits.shape, generator=torch.Generator().manual_seed(0))
    views = [logits.double() + each * (num_views > 1) for each in noise]
    best = fit_temperature(views, targets)

    def loss(temperature: float) -> float:
        mean = mean_probabilities(views, temperature)
        return torch.nn.functional.nll_loss(mean.log(), targets).item()

    values = [loss(best * factor) for factor in (0.98, 1, 1.02)]
    assert values[1] == min(values)
    assert values[1] < loss(1.0)


def test_the_temperature_stays_in_its_bounds() -> None:
    logits = torch.eye(3)
    assert fit_temperature([logits], torch.tensor([0, 1, 2])) == pytest.approx(MIN_TEMPERATURE)
    assert fit_temperature([logits], torch.tensor([1, 2, 0])) == pytest.approx(MAX_TEMPERATURE)


@pytest.mark.parametrize(("right", "count", "risk"), [(7, 10, 0.05), (95, 100, 0.01), (1, 3, 0.2)])
def test_the_bound_is_that_of_clopper_and_pearson(right: int, count: int, risk: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(right, count).proportion_ci(1 - 2 * risk, method="exact").low
    assert lower_bound(right, count, risk) == pytest.approx(expected, rel=1e-9)
    assert lower_bound(0, count, risk) == 0.0


def test_the_accuracy_is_kept_as_often_as_promised() -> None:
    new, truth = draw(100_000, seed=3)
    is_right = new.argmax(dim=1) == truth
    num_found = num_missed = 0
    for seed in range(100):
        try:
            report = calibrate(*draw(600, seed=100 + seed), accuracy=0.9, confidence=0.8)
        except DataError:
            continue
        kept = (new / report.temperature).softmax(dim=1).max(dim=1).values >= report.threshold
        num_found += 1
        num_missed += is_right[kept].double().mean().item() < 0.9
    assert num_found > 80
    # At most 20 are expected; more than 30 in a hundred come once in 200 times.
    assert 0 < num_missed <= 30


def test_the_report() -> None:
    logits, targets = draw(2000, seed=4, factor=2.0)
    report = calibrate(logits, targets, accuracy=0.9)
    assert report.num_fitted == report.num_tested == 1000
    assert report.temperature == pytest.approx(2.0, rel=0.15)
    assert report.accuracy_without < 0.9 < report.accuracy < 1
    assert 0.2 < report.coverage < 0.95
    assert json.loads(json.dumps(report.to_dict()))["threshold"] == report.threshold
    assert calibrate(logits, targets, accuracy=0.9) == report
    strict = calibrate(logits, targets, accuracy=0.95)
    assert strict.threshold > report.threshold
    assert strict.coverage < report.coverage


def test_the_lowest_threshold_that_does_is_taken() -> None:
    probability = torch.tensor([0.9, 0.6]).repeat(400)
    logits = torch.stack([probability.log(), (1 - probability).log()], dim=1)
    targets = torch.tensor([0, 1]).repeat(400)
    # The sure half is always right, the other always wrong.
    report = calibrate(logits, targets, accuracy=0.9)
    assert report.coverage == pytest.approx(0.5, abs=0.05)
    assert report.accuracy == 1.0


def test_candidates_leave_out_a_twentieth_more_each() -> None:
    values = torch.rand(2001, generator=torch.Generator().manual_seed(0))
    found = make_candidates(values)
    shares = [(values < each).double().mean().item() for each in found]
    assert shares == pytest.approx([each / 20 for each in range(20)], abs=1e-3)
    assert make_candidates(torch.full((50,), 0.5)) == [0.0, 0.5]


def test_pictures_that_are_all_right_need_no_threshold() -> None:
    logits, targets = torch.eye(2).repeat(100, 1) * 3, torch.tensor([0, 1] * 100)
    report = calibrate(logits, targets, accuracy=0.95)
    assert (report.threshold, report.coverage, report.accuracy) == (0.0, 1.0, 1.0)


def test_an_accuracy_out_of_reach() -> None:
    logits, targets = torch.eye(2).repeat(20, 1) * 3, torch.tensor([0, 1] * 20)
    message = (
        "No threshold is sure to keep an accuracy of 0.99 with a confidence of 0.95: tested on 20 "
        "pictures, the best one keeps 0.860. Ask for less, or give more pictures, at least 598, "
        "and more where some are answered wrong."
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        calibrate(logits, targets, accuracy=0.99)
    # That many are enough where all are right.
    logits, targets = torch.eye(2).repeat(299, 1) * 3, torch.tensor([0, 1] * 299)
    assert calibrate(logits, targets, accuracy=0.99).coverage == 1.0
    with pytest.raises(DataError):
        calibrate(logits[:596], targets[:596], accuracy=0.99)


@pytest.fixture
def predictor(tiny_spec: BackboneSpec) -> Predictor:
    model = build_model(tiny_spec, 2, weights=None)
    return Predictor(model, class_names=NAMES, device="cpu", engine="pytorch")


def of(predictor: Predictor, images: Sequence[Any], targets: Sequence[int]) -> ImageDataset:
    """Return pictures of which the model gets right what the targets say: 1 right, 0 wrong."""
    labels = [found.index for found in predictor.predict_many(images)]
    truth = [label if right else 1 - label for label, right in zip(labels, targets, strict=True)]
    return ImageDataset(images, truth, class_names=NAMES)


@pytest.fixture
def noise() -> list[np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (40, 50, 3), dtype=np.uint8) for _ in range(160)]


@pytest.mark.parametrize("tta", [None, "flip", "five_crop"])
def test_a_predictor_is_calibrated(predictor: Predictor, noise: list[Any], tta: Any) -> None:
    predictor = Predictor(
        predictor.model, class_names=NAMES, device="cpu", engine="pytorch", tta=tta
    )
    # One in 16 is wrong.
    data = of(predictor, noise, [each % 16 for each in range(160)])
    report = predictor.calibrate(data, target_accuracy=0.8, batch_size=16)
    assert (predictor.temperature, predictor.threshold) == (report.temperature, report.threshold)
    assert report.temperature != 1.0
    again = Predictor(
        predictor.model,
        class_names=NAMES,
        device="cpu",
        engine="pytorch",
        tta=tta,
        temperature=report.temperature,
        threshold=0.6,
    )
    for found, other in zip(
        predictor.predict_many(noise, batch_size=16),
        again.predict_many(noise, batch_size=16),
        strict=True,
    ):
        assert found.top_k == other.top_k
        assert other.abstains == (other.probability < 0.6)
    # What was set before does not matter.
    assert again.calibrate(data, target_accuracy=0.8, batch_size=16) == report


def test_classes_are_matched_by_name(predictor: Predictor, noise: list[Any]) -> None:
    data = of(predictor, noise, [1] * 160)
    other = ImageDataset(noise, 1 - data.targets, class_names=NAMES[::-1])
    assert predictor.calibrate(other) == predictor.calibrate(data)


def test_a_data_set_decodes_in_its_own_way(predictor: Predictor, noise: list[Any]) -> None:
    data = of(predictor, noise, [1] * 160)
    named = ImageDataset(
        [str(index) for index in range(160)],
        data.targets,
        class_names=NAMES,
        decode=lambda source: torch.from_numpy(noise[int(str(source))]).permute(2, 0, 1),
    )
    assert predictor.calibrate(named) == predictor.calibrate(data)


def test_other_classes(predictor: Predictor, noise: list[Any]) -> None:
    names = ["blue", "c", "d", "e", "f", "green"]
    data = ImageDataset(noise, [0] * 160, class_names=names)
    message = (
        "`data` should have the predictor's classes, 'blue', 'red', found 'blue', 'c', 'd', 'e', "
        "'f', .... Give pictures like those that the model was trained on."
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        predictor.calibrate(data)


def test_what_cannot_be_calibrated_changes_nothing(
    predictor: Predictor, noise: list[Any], tiny_splits: ImageSplits
) -> None:
    half = of(predictor, noise, [each % 2 for each in range(160)])
    with pytest.raises(DataError, match="No threshold is sure to keep"):
        predictor.calibrate(half)
    broken = ImageDataset([*noise, b"no"], [0] * 161, class_names=NAMES)
    with pytest.raises(ImageError):
        predictor.calibrate(broken)
    message = "A calibration needs at least 2 pictures, found 1."
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        predictor.calibrate(tiny_splits.val.subset([0]))
    message = "`data` should be an ImageDataset, such as `splits.val`, found ImageSplits."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        predictor.calibrate(tiny_splits)  # type: ignore[arg-type]
    for name in ("target_accuracy", "confidence"):
        message = f"`{name}` should be a finite number in (0, 1), found 1.0."
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            predictor.calibrate(half, **{name: 1.0})  # type: ignore[arg-type]
    assert (predictor.temperature, predictor.threshold) == (1.0, None)
