from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from transferkit.artifacts import save_artifact
from transferkit.errors import ConfigError
from transferkit.inference import Predictor, engine_choice
from transferkit.models import BackboneSpec, Classifier, engines
from transferkit.models.engine_facts import has_bfloat16

NAMES = ("blue", "red")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    pixels = Image.effect_noise((40, 40), 90).convert("RGB")
    pixels.paste((255, 0, 0), (0, 0, 18, 40))
    pixels.save(path)
    return path


@pytest.mark.parametrize("engine", ["pytorch", "openvino", "onnxruntime"])
def test_engines_agree(model: Classifier, picture: Path, engine: Any) -> None:
    plain = Predictor(model, class_names=NAMES, device="cpu").predict(picture)
    predictor = Predictor(model, class_names=NAMES, device="cpu", engine=engine)
    assert predictor.engine_name == engine
    found = predictor.predict(picture)
    assert found.label == plain.label
    assert found.probability == pytest.approx(plain.probability, abs=1e-5)
    several = list(predictor.predict_many([picture] * 9))
    assert {each.label for each in several} == {plain.label}


def test_auto_takes_the_fastest(
    model: Classifier, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"PyTorchEngine": 3.0, "OpenVINOEngine": 0.1, "ONNXRuntimeEngine": 2.0}
    monkeypatch.setattr(engine_choice, "_seconds", lambda engine, _: seconds[type(engine).__name__])
    predictor = Predictor(model, class_names=NAMES, device="cpu")
    predictor.predict(picture)
    assert not predictor.engine_report  # One picture is not worth the choice.
    list(predictor.predict_many([picture] * 65))
    assert predictor.engine_name == "openvino"
    assert {each.name for each in predictor.engine_report} == {
        "pytorch",
        "openvino",
        "onnxruntime",
    }
    assert all(each.reason is None for each in predictor.engine_report)


def test_auto_passes_over_what_disagrees(
    model: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engines.make_engine

    def make_engine(network: Any, *, engine: Any, **options: Any) -> Any:
        made = real(network, engine=engine, **options)
        return made if engine == "pytorch" else lambda images: made(images) * 1.01

    monkeypatch.setattr(engine_choice, "make_engine", make_engine)
    predictor = Predictor(model, class_names=NAMES, device="cpu")
    assert predictor.engine_name == "pytorch"
    reasons = {each.name: each.reason for each in predictor.engine_report}
    message = r"its logits differ by 0\.01 from PyTorch\'s, allowed are 0\.0001"
    assert re.fullmatch(message, reasons["openvino"] or "")
    assert reasons["pytorch"] is None


def test_a_preferred_engine_is_taken_where_none_was_named(model: Classifier) -> None:
    predictor = Predictor(model, class_names=NAMES, device="cpu")
    predictor.prefer_engine("onnxruntime")
    assert predictor.engine_name == "onnxruntime"
    named = Predictor(model, class_names=NAMES, device="cpu", engine="pytorch")
    named.prefer_engine("onnxruntime")
    assert named.engine_name == "pytorch"


def test_few_pictures_are_not_worth_a_choice(model: Classifier) -> None:
    few = Predictor(model, class_names=NAMES, device="cpu")
    few.expect(64)
    assert few.engine_name == "pytorch"
    assert not few.engine_report
    many = Predictor(model, class_names=NAMES, device="cpu")
    many.expect(65)
    assert many.engine_name
    assert len(many.engine_report) == 3


@pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="no bfloat16 on this machine")
def test_few_pictures_in_bf16_are_computed_so_without_a_choice(
    model: Classifier, picture: Path
) -> None:
    auto = Predictor(model, class_names=NAMES, device="cpu", precision="bf16")
    named = Predictor(model, class_names=NAMES, device="cpu", precision="bf16", engine="pytorch")
    exact = Predictor(model, class_names=NAMES, device="cpu").predict(picture)
    for _ in range(2):
        assert auto.predict(picture) == named.predict(picture) != exact
    assert not auto.engine_report


def test_a_copy_may_take_another_engine(model: Classifier, picture: Path) -> None:
    predictor = Predictor(model, class_names=NAMES, device="cpu")
    other = copy.copy(predictor)
    other.prefer_engine("onnxruntime")
    assert other.engine_name == "onnxruntime"
    next(other.features_many([picture] * 65))
    predictor.prefer_engine("pytorch")
    assert predictor.engine_name == "pytorch"
    assert other.model is predictor.model


def test_wrong_values(model: Classifier) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"engine": "tensorrt"},
            '`engine` should be "auto", "pytorch", "openvino" or "onnxruntime", '
            "found 'tensorrt'.",
        ),
        ({"precision": "fp8"}, '`precision` should be "fp32" or "bf16", found \'fp8\'.'),
        ({"tta": "crop"}, '`tta` should be "flip", "five_crop" or None, found \'crop\'.'),
        ({"threshold": 1.5}, "`threshold` should be a finite number in [0, 1], found 1.5."),
        (
            {"temperature": 0},
            "`temperature` should be a finite number in [0.001, 1000], found 0.",
        ),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            Predictor(model, class_names=NAMES, device="cpu", **options)


def test_threshold_and_load(
    model: Classifier, tiny_spec: BackboneSpec, picture: Path, tmp_path: Path
) -> None:
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=NAMES)
    loaded = Predictor.load(
        path,
        backbone=tiny_spec,
        device="cpu",
        threshold=1.0,
        tta="flip",
        temperature=2,
        engine="openvino",
    )
    assert (loaded.threshold, loaded.temperature, loaded.tta) == (1.0, 2.0, "flip")
    assert loaded.engine_name == "openvino"
    assert loaded.predict(picture).abstains
    sure = Predictor(model, class_names=NAMES, device="cpu", threshold=0.0).predict(picture)
    assert not sure.abstains
    unsure = Predictor(model, class_names=NAMES, device="cpu", threshold=1.0).predict(picture)
    assert unsure.abstains
    assert unsure.label == sure.label
    assert unsure.to_dict()["abstains"]


def test_the_digest_follows_weights_names_and_preprocessing(
    model: Classifier, tiny_spec: BackboneSpec
) -> None:
    digest = Predictor(model, class_names=NAMES, device="cpu").digest
    assert Predictor(model, class_names=NAMES, device="cpu", engine="openvino").digest == digest
    assert Predictor(model, class_names=NAMES[::-1], device="cpu").digest != digest
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert Predictor(model, class_names=NAMES, device="cpu").digest != digest


def test_trying_batch_sizes_holds_the_lock(
    model: Classifier, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(model, class_names=NAMES, device="cpu", engine="pytorch")
    network = predictor._network
    name, engine = network.chosen()
    held: list[bool] = []

    def run(images: torch.Tensor) -> torch.Tensor:
        held.append(network._lock._is_owned())  # type: ignore[attr-defined]
        return engine(images)

    network._engine = (name, run)  # type: ignore[assignment]
    found = predictor.predict_many([picture] * 2000)
    next(found)
    assert len(held) > 2
    assert all(held)
    found.close()  # type: ignore[attr-defined]
