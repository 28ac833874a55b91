from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transferkit.data import ImageSplits
from transferkit.data.folders import find_images
from transferkit.errors import ArtifactError, ConfigError, DataError, ImageError
from transferkit.images import decode_image
from transferkit.inference import ClassProbability, Prediction, Predictor
from transferkit.models import BackboneSpec, Classifier, build_model
from transferkit.models.engines import count_lanes
from transferkit.training import Trainer

NAMES = ("blue", "red")


@pytest.fixture
def predictor(model: Classifier) -> Predictor:
    return Predictor(model, class_names=NAMES, device="cpu")


def test_fit_save_load_predict(
    tiny_spec: BackboneSpec, tiny_splits: ImageSplits, tmp_path: Path
) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    trainer = Trainer(model, tiny_splits, lr=0.05, verbose=False, device="cpu")
    accuracy = trainer.fit(10).best.val_accuracy
    path = trainer.save(tmp_path / "m.safetensors")
    loaded = Predictor.load(path, backbone=tiny_spec, device="cpu")
    predictions = list(loaded.predict_many(tiny_splits.val.paths))
    truth = [tiny_splits.class_names[target] for target in tiny_splits.val.targets]
    hits = [each.label == name for each, name in zip(predictions, truth, strict=True)]
    assert np.mean(hits) == accuracy
    before = Predictor(model, class_names=NAMES, device="cpu").predict(tiny_splits.val.paths[0])
    assert predictions[0].probability == pytest.approx(before.probability, abs=1e-5)


def test_grey_pictures_from_training_to_prediction(
    tiny_spec: BackboneSpec, tiny_splits: ImageSplits, tmp_path: Path
) -> None:
    model = build_model(tiny_spec, 2, weights=None, num_channels=1)
    trainer = Trainer(model, tiny_splits, lr=0.05, verbose=False, device="cpu")
    accuracy = trainer.fit(3).best.val_accuracy
    assert trainer.evaluate("val").accuracy == accuracy
    path = trainer.save(tmp_path / "m.safetensors")
    loaded = Predictor.load(path, backbone=tiny_spec, device="cpu")
    predictions = list(loaded.predict_many(tiny_splits.val.paths))
    truth = [tiny_splits.class_names[target] for target in tiny_splits.val.targets]
    hits = [each.label == name for each, name in zip(predictions, truth, strict=True)]
    assert np.mean(hits) == accuracy
    with Image.open(tiny_splits.val.paths[0]) as image:
        grey = image.convert("L")
    grey.save(tmp_path / "grey.png")
    for source in (tmp_path / "grey.png", grey, np.asarray(grey)):
        found = loaded.predict(source).probability
        assert found == pytest.approx(predictions[0].probability, abs=1e-6)


def test_multispectral_arrays_are_predicted(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None, num_channels=5)
    predictor = Predictor(model, class_names=NAMES, device="cpu")
    assert predictor.predict(np.zeros((40, 50, 5), np.uint8)).label in NAMES


def test_probabilities_are_the_softmax_of_the_logits(
    predictor: Predictor, tiny_splits: ImageSplits
) -> None:
    path = tiny_splits.val.paths[0]
    predictor.model.eval()
    image = predictor.preprocess.eval()(decode_image(path))
    with torch.inference_mode():
        logits = predictor.model(image[None])[0].double().numpy()
    expected = np.exp(logits) / np.exp(logits).sum()
    prediction = predictor.predict(path)
    found = {each.label: each.probability for each in prediction.top_k}
    assert [found[name] for name in NAMES] == pytest.approx(expected, rel=1e-5)
    assert prediction.probability == max(found.values())
    assert prediction.index == NAMES.index(prediction.label)
    assert prediction.path == path


def test_every_door_gives_the_same(predictor: Predictor, tiny_splits: ImageSplits) -> None:
    path = tiny_splits.val.paths[0]
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    array = np.asarray(image)
    doors: list[Any] = [
        path, str(path), path.read_bytes(), image, array,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
    ]  # fmt: skip
    found = [predictor.predict(door).top_k for door in doors]
    assert all(each == found[0] for each in found)
    assert predictor.predict(image).path is None


def test_a_tensor_that_is_not_contiguous_is_not_changed(predictor: Predictor) -> None:
    image = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8)
    copy = image.clone()
    predictor.predict(image.permute(2, 0, 1))
    assert torch.equal(image, copy)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_many_come_in_order(
    predictor: Predictor, tiny_splits: ImageSplits, batch_size: int
) -> None:
    paths = tiny_splits.val.paths
    predictions = list(predictor.predict_many(paths, batch_size=batch_size))
    assert [each.path for each in predictions] == paths
    singles = [predictor.predict(path).probability for path in paths]
    assert [each.probability for each in predictions] == pytest.approx(singles, abs=1e-5)


def test_a_folder_is_read_at_any_depth(predictor: Predictor, tiny_folder: Path) -> None:
    predictions = list(predictor.predict_many(tiny_folder))
    assert [each.path for each in predictions] == sorted(tiny_folder.rglob("*.png"))


def test_an_endless_generator_is_read_as_needed(
    predictor: Predictor, tiny_splits: ImageSplits
) -> None:
    drawn = 0

    def endless() -> Iterator[Path]:
        nonlocal drawn
        for path in itertools.cycle(tiny_splits.val.paths):
            drawn += 1
            yield path

    found = list(itertools.islice(predictor.predict_many(endless(), batch_size=4), 6))
    assert len(found) == 6
    num_batches = 4 + count_lanes(predictor._network.chosen()[1])
    assert 8 <= drawn <= 4 * num_batches  # Two are read ahead, others are in the network.


@pytest.mark.parametrize("training", [True, False])
def test_mode_stays_as_it_was(
    predictor: Predictor, tiny_splits: ImageSplits, training: bool
) -> None:
    predictor.model.train(training)
    predictor.predict(tiny_splits.val.paths[0])
    assert predictor.model.training is training


def test_top_k(tiny_spec: BackboneSpec, tiny_splits: ImageSplits) -> None:
    names = [str(number) for number in range(7)]
    predictor = Predictor(build_model(tiny_spec, 7, weights=None), class_names=names, device="cpu")
    path = tiny_splits.val.paths[0]
    everything = predictor.predict(path, top_k=7).top_k
    values = [each.probability for each in everything]
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(1.0)
    assert predictor.predict(path).top_k == everything[:5]
    assert predictor.predict(path, top_k=1).top_k == everything[:1]


def test_top_k_above_the_number_of_classes(predictor: Predictor) -> None:
    message = "`top_k` should lie in [1, 2], the number of classes, found 3."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        predictor.predict_many([], top_k=3)


@pytest.mark.parametrize("top_k", ["1", 0, -1])
def test_top_k_that_counts_nothing(predictor: Predictor, top_k: Any) -> None:
    message = f"`top_k` should be an integer of at least 1, found {top_k!r}."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        predictor.predict_many([], top_k=top_k)


@pytest.mark.parametrize(
    "one", [b"bytes", torch.zeros(3, 4, 4, dtype=torch.uint8), 3, {}, io.BytesIO()]
)
def test_one_picture_is_not_many(predictor: Predictor, one: Any) -> None:
    message = (
        f"`images` should be a folder, a glob pattern or an iterable of pictures, found "
        f"{type(one).__name__}. Put one picture into a list; of a table pass the column."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        predictor.predict_many(one)


def test_good_pictures_come_before_the_bad_one_raises(
    predictor: Predictor, tiny_splits: ImageSplits, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    predictions = predictor.predict_many([*tiny_splits.val.paths[:3], bad])
    found = [next(predictions).path for _ in range(3)]
    assert found == tiny_splits.val.paths[:3]
    with pytest.raises(ImageError, match=r"bad\.png"):
        next(predictions)


def test_a_missing_folder_is_found_at_the_door(predictor: Predictor, tmp_path: Path) -> None:
    missing = tmp_path / "none"
    message = f"`{missing}` does not exist. Expected a folder, a picture or a glob pattern."
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        predictor.predict_many(missing)


def test_a_missing_picture(predictor: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "none.jpg"
    message = f"Cannot read the picture `{path}`: no such file or directory."
    with pytest.raises(ImageError, match=f"^{re.escape(message)}$"):
        predictor.predict(path)


def test_class_names_must_fit(model: Classifier) -> None:
    message = "`class_names` should have a name for each of the model's 2 classes, found 3."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        Predictor(model, class_names=["a", "b", "c"])


def test_load_checks_device_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Predictor.load(tmp_path / "none.safetensors", device="quantum")
    with pytest.raises(ArtifactError):
        Predictor.load(tmp_path / "none.safetensors", device="cpu")


def test_prediction_as_plain_data() -> None:
    top_k = (ClassProbability("bees", 1, 0.75), ClassProbability("ants", 0, 0.25))
    prediction = Prediction(top_k, Path("bee.jpg"))
    assert json.loads(json.dumps(prediction.to_dict())) == {
        "path": "bee.jpg",
        "label": "bees",
        "index": 1,
        "probability": 0.75,
        "abstains": False,
        "top_k": [
            {"label": "bees", "index": 1, "probability": 0.75},
            {"label": "ants", "index": 0, "probability": 0.25},
        ],
    }
    assert Prediction(top_k).to_dict()["path"] is None


TURNS = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
"""For each EXIF orientation Pillow's number of the transposition that stores it so."""


def test_the_eight_orientations_of_a_photograph_give_one_prediction(photographs: Path) -> None:
    model = build_model("efficientnet_lite0", 2, seed=1)
    predictor = Predictor(model, class_names=("ants", "bees"), device="cpu")
    photograph = Image.open(find_images(photographs / "val" / "bees")[0]).convert("RGB")
    files = []
    for orientation, transposition in TURNS.items():
        stored = photograph
        if transposition is not None:
            stored = photograph.transpose(Image.Transpose(transposition))
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = io.BytesIO()
        stored.save(file, "PNG", exif=exif)
        files.append(file.getvalue())
    predictions = list(predictor.predict_many(files, batch_size=8))
    assert len(set(predictions)) == 1
