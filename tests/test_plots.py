from __future__ import annotations

import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from transferkit.data import ImageDataset, ImageLoader, ImageSplits
from transferkit.errors import ConfigError, DataError
from transferkit.inference import ClassProbability, Prediction, Predictor
from transferkit.models import BackboneSpec, Classifier, build_model
from transferkit.plots import (
    image_grid,
    imshow,
    plot_history,
    show_batch,
    show_prediction,
    show_predictions,
)
from transferkit.training import EpochRecord, History


@pytest.fixture(autouse=True)
def _no_show(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a library call must not call show()")

    monkeypatch.setattr(plt, "show", forbidden)


@pytest.fixture
def model(tiny_spec: BackboneSpec) -> Classifier:
    return build_model(tiny_spec, 2, weights=None)


def drawn(ax: Axes) -> np.ndarray:
    array = ax.images[0].get_array()
    assert array is not None
    return np.asarray(array)


def test_imshow_denormalises_and_clips(model: Classifier) -> None:
    pixels = torch.randint(0, 256, (3, 5, 4), dtype=torch.uint8)
    image = model.preprocess.normalize(pixels)
    expected = pixels.permute(1, 2, 0).numpy() / 255
    assert drawn(imshow(image, preprocess=model.preprocess)) == pytest.approx(expected, abs=1e-5)
    assert drawn(imshow(torch.full((3, 2, 2), 7.0))).max() == 1.0
    assert drawn(imshow(torch.full((3, 2, 2), -7.0))).min() == 0.0


def test_imshow_draws_whatever_is_a_picture(tiny_splits: ImageSplits) -> None:
    path = tiny_splits.val.paths[0]
    with Image.open(path) as image:
        expected = np.asarray(image)
        for source in (path, str(path), image, expected, path.read_bytes()):
            assert np.array_equal(drawn(imshow(source)), expected)


def test_imshow_takes_and_returns_axes_and_changes_nothing() -> None:
    _, ax = plt.subplots()
    image = torch.rand(3, 4, 4, requires_grad=True)
    copy = image.detach().clone()
    assert imshow(image, title="a $b", ax=ax) is ax
    assert ax.get_title() == "a $b"
    assert not ax.title.get_parse_math()
    assert torch.equal(image, copy)
    ax.figure.canvas.draw()


def test_imshow_works_interactively_too() -> None:
    with plt.ion():
        imshow(torch.zeros(3, 2, 2))


def test_imshow_checks_float_shapes() -> None:
    message = "A float picture should be a tensor (3, H, W), found (4, 4, 3)."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        imshow(torch.zeros(4, 4, 3))


def test_imshow_refuses_to_denormalise_pixels(model: Classifier) -> None:
    message = (
        "`preprocess` undoes the normalisation of a float tensor; this picture is not "
        "normalised. Leave it out."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        imshow(torch.zeros(3, 4, 4, dtype=torch.uint8), preprocess=model.preprocess)


def test_grid_has_a_cell_for_each_picture() -> None:
    cells = image_grid(torch.rand(5, 3, 4, 4), titles=list("abcde"), num_columns=3)
    assert [ax.get_title() for ax in cells] == list("abcde")
    assert len(cells[0].figure.axes) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": []}, "A grid needs at least one picture, found none."),
        ({"titles": ["a"]}, "Found 2 pictures and 1 titles."),
        ({"num_columns": 0}, "`num_columns` should be at least 1, found 0."),
    ],
)
def test_grid_checks_its_arguments(options: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"images": torch.rand(2, 3, 4, 4)} | options
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        image_grid(**arguments)  # type: ignore[arg-type]


def test_show_batch_has_the_class_names(model: Classifier, tiny_splits: ImageSplits) -> None:
    loader = ImageLoader(tiny_splits.train, model.preprocess.train(), batch_size=6, shuffle=True)
    batch = next(loader.batches())
    cells = show_batch(
        batch, class_names=tiny_splits.class_names, preprocess=model.preprocess, num_images=4
    )
    expected = [tiny_splits.class_names[target] for target in batch.targets[:4]]
    assert [ax.get_title() for ax in cells] == expected


@pytest.mark.parametrize("training", [True, False])
def test_show_predictions_titles_and_mode(
    model: Classifier, tiny_splits: ImageSplits, training: bool
) -> None:
    model.train(training)
    cells = show_predictions(model, tiny_splits.val, num_images=100)
    assert len(cells) == 8
    predictor = Predictor(model, class_names=tiny_splits.class_names, device="cpu")
    found = [each.label for each in predictor.predict_many(tiny_splits.val.paths)]
    truth = [tiny_splits.class_names[target] for target in tiny_splits.val.targets]
    labels = set(found)
    titles = [ax.get_title() for ax in cells]
    assert {re.match(r"predicted: (\w+)", title)[1] for title in titles} == labels  # type: ignore[index]
    wrong = [title for title in titles if "(is " in title]
    assert len(wrong) == sum(one != two for one, two in zip(found, truth, strict=True)) > 0
    assert model.training is training


def test_show_predictions_takes_a_predictor_and_a_seed(
    model: Classifier, tiny_splits: ImageSplits
) -> None:
    predictor = Predictor(model, class_names=tiny_splits.class_names, device="cpu")
    first, second = (
        [drawn(ax) for ax in show_predictions(predictor, tiny_splits.val, seed=seed)]
        for seed in (1, 1)
    )
    assert all(np.array_equal(one, two) for one, two in zip(first, second, strict=True))


def test_show_predictions_of_nothing(model: Classifier) -> None:
    message = "There are no pictures to show: the data set is empty."
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        show_predictions(model, ImageDataset([], [], class_names=("a", "b")))


def test_show_prediction() -> None:
    prediction = Prediction((ClassProbability("ants", 0, 0.935),))
    ax = show_prediction(torch.zeros(3, 4, 4, dtype=torch.uint8), prediction)
    assert ax.get_title() == "predicted: ants (93.5%)"


def history() -> History:
    return History(
        [EpochRecord(1, 0.9, 0.5, 0.8, 0.6, 0.1, 1.0), EpochRecord(2, 0.5, 0.7, 0.6, 0.8, 0.1, 1.0)]
    )


def test_plot_history_draws_both_phases() -> None:
    loss, accuracy = plot_history(history())
    assert list(loss.lines[0].get_ydata()) == [0.9, 0.5]
    assert list(loss.lines[1].get_ydata()) == [0.8, 0.6]
    assert list(accuracy.lines[1].get_ydata()) == [0.6, 0.8]
    assert list(accuracy.lines[2].get_xdata()) == [2, 2]


def test_plot_history_takes_axes() -> None:
    _, axes = plt.subplots(1, 2)
    assert list(plot_history(history(), axes=axes)) == list(axes)
    message = "`axes` should be two Axes, for loss and accuracy, found 1."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        plot_history(history(), axes=axes[:1])


def test_plot_history_without_records() -> None:
    message = "The history has no record: no epoch was completed."
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        plot_history(History())
