from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from transferkit.errors import ConfigError
from transferkit.images import Preprocess
from transferkit.inference import TTA, Predictor
from transferkit.inference.tta import check_tta, make_transform, mean_probabilities, split_views
from transferkit.models import BackboneSpec, Classifier, build_model

NAMES = ("blue", "red")
WIDE = Preprocess(crop_size=32, resize_size=40)


@pytest.fixture
def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8, generator=generator)


@pytest.fixture
def model(tiny_spec: BackboneSpec) -> Classifier:
    return build_model(tiny_spec, 2, weights=None, preprocess=WIDE)


@pytest.mark.parametrize("mode", ["shorter", "squash"])
def test_views_hold_the_evaluation_view(pixels: torch.Tensor, mode: Any) -> None:
    spec = Preprocess(crop_size=32, resize_size=40, resize_mode=mode)
    plain = spec.eval()(pixels)

    def views(tta: TTA | None) -> list[torch.Tensor]:
        stacked = spec.normalize(make_transform(spec, tta)(pixels)[None])
        return [each[0] for each in split_views(stacked, tta)]

    (only,) = views(None)
    image, mirror = views("flip")
    crops = views("five_crop")
    assert torch.equal(only, plain)
    assert torch.equal(image, plain)
    assert torch.equal(mirror, plain.flip(-1))
    assert torch.equal(crops[4], plain)
    assert len({crop.numpy().tobytes() for crop in crops}) == 5


def test_the_mean_is_of_probabilities_at_the_temperature() -> None:
    views = list(torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)) * 5)
    expected = torch.stack([(each.double() / 2).softmax(dim=1) for each in views]).mean(dim=0)
    torch.testing.assert_close(mean_probabilities(views, 2.0).double(), expected)
    assert torch.equal(mean_probabilities(views[:1], 1.0), views[0].softmax(dim=1))


def test_the_temperature_changes_probabilities_and_no_label(
    model: Classifier, pixels: torch.Tensor
) -> None:
    def ratio(temperature: float) -> float:
        predictor = Predictor(model, class_names=NAMES, device="cpu", temperature=temperature)
        found = predictor.predict(pixels)
        assert found.label == plain.label
        return found.probability / found.top_k[1].probability

    plain = Predictor(model, class_names=NAMES, device="cpu").predict(pixels)
    assert ratio(1.0) == plain.probability / plain.top_k[1].probability
    assert ratio(0.5) == pytest.approx(ratio(1.0) ** 2, rel=1e-4)


@pytest.mark.parametrize("tta", ["flip", "five_crop"])
@pytest.mark.parametrize("number", [1, 11])
def test_predictions_are_the_mean_over_the_views(
    model: Classifier, pixels: torch.Tensor, tta: Any, number: int
) -> None:
    model.eval()
    views = split_views(WIDE.normalize(make_transform(WIDE, tta)(pixels)[None]), tta)
    with torch.no_grad():
        expected = torch.cat([model(view).softmax(dim=1) for view in views]).mean(dim=0)
    predictor = Predictor(model, class_names=NAMES, device="cpu", tta=tta)
    *_, found = predictor.predict_many([pixels] * number, batch_size=4)
    for each in found.top_k:
        assert each.probability == pytest.approx(expected[each.index].item(), abs=1e-6)
    alone = Predictor(model, class_names=NAMES, device="cpu").predict(pixels)
    assert abs(found.probability - alone.probability) > 1e-6


def test_five_crops_need_room() -> None:
    spec = Preprocess(crop_size=32, resize_size=32, resize_mode="squash")
    message = (
        'tta="five_crop" needs room around the crop, and this model sees the whole picture: '
        'resize to 32x32 (bilinear), centre crop 32x32. Take tta="flip", or none.'
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_tta("five_crop", spec)
    assert check_tta("flip", spec) == "flip"
    assert check_tta("five_crop", Preprocess(crop_size=32, resize_size=32)) == "five_crop"
