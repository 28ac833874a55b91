from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from PIL import Image
from torchvision.transforms import v2

from transferkit.data import Batch, ImageDataset, ImageLoader, ImageSplits, check_folder
from transferkit.errors import ConfigError, DataError, OutputError
from transferkit.images import Preprocess
from transferkit.inference import ClassProbability, Prediction, Predictor
from transferkit.models import BackboneSpec, Classifier, FreezePlan, build_model
from transferkit.plots import (
    image_grid,
    imshow,
    plot_history,
    plot_lr_find,
    plot_plan,
    show_augmentations,
    show_batch,
    show_findings,
    show_prediction,
    show_predictions,
)
from transferkit.plots.saving import save_and_close
from transferkit.testing import make_image_folder
from transferkit.training import EpochRecord, FitPlan, History, PhasePlan
from transferkit.training.lr_find import make_lr_find


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
    message = (
        "A float picture should be a tensor (3, H, W), or (1, H, W) for grey, found (4, 4, 3). "
        "Of other channels choose one or three, and put them first."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        imshow(torch.zeros(4, 4, 3))


def test_one_channel_is_drawn_in_grey(tiny_spec: BackboneSpec) -> None:
    preprocess = build_model(tiny_spec, 2, weights=None, num_channels=1).preprocess
    pixels = torch.randint(0, 256, (1, 5, 4), dtype=torch.uint8)
    expected = pixels.expand(3, -1, -1).permute(1, 2, 0).numpy() / 255
    image = preprocess.normalize(pixels)
    assert drawn(imshow(image, preprocess=preprocess)) == pytest.approx(expected, abs=1e-5)
    assert drawn(imshow(pixels / 255)) == pytest.approx(expected)
    batch = Batch(image[None], torch.tensor([1]), torch.tensor([0]))
    (cell,) = show_batch(batch, class_names=["a", "b"], preprocess=preprocess)
    assert drawn(cell) == pytest.approx(expected, abs=1e-5)


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


@pytest.mark.parametrize("augmentation", ["tutorial", "strong"])
def test_show_augmentations_draws_what_a_training_sees(
    model: Classifier, tiny_splits: ImageSplits, augmentation: str
) -> None:
    preprocess, path = model.preprocess, tiny_splits.train.paths[0]
    cells = show_augmentations(
        path, augmentation, preprocess=preprocess, num_images=3, num_columns=2, seed=5
    )
    assert [ax.get_title() for ax in cells] == ["original", "epoch 1", "epoch 2", "epoch 3"]
    assert cells[2].get_subplotspec().colspan.start == 0
    with Image.open(path) as image:
        assert np.array_equal(drawn(cells[0]), np.asarray(image))
    loader = ImageLoader(
        tiny_splits.train, preprocess.train(augmentation), batch_size=1, shuffle=False, seed=5
    )
    for epoch, ax in enumerate(cells[1:], start=1):
        expected = preprocess.denormalize(next(loader.batches(epoch=epoch)).images[0])
        assert np.array_equal(drawn(ax), expected.permute(1, 2, 0).numpy())
    assert not np.array_equal(drawn(cells[1]), drawn(cells[2]))


def test_show_augmentations_hands_over_the_layout_of_the_loader() -> None:
    layouts = []

    def augment(image: torch.Tensor) -> torch.Tensor:
        layouts.append(image.stride())
        return image

    preprocess = Preprocess(crop_size=8, resize_size=8)
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    show_augmentations(image, augment, preprocess=preprocess, num_images=1)
    assert layouts == [(1, 24, 3)]


def test_show_augmentations_stands_the_picture_upright(tmp_path: Path) -> None:
    path = tmp_path / "lying.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn by 90 degrees.
    Image.new("RGB", (40, 20)).save(path, exif=exif)
    preprocess = Preprocess(crop_size=8, resize_size=8)
    cells = show_augmentations(path, preprocess=preprocess, num_images=1)
    assert [drawn(ax).shape for ax in cells] == [(40, 20, 3), (8, 8, 3)]


def test_show_augmentations_of_a_grey_picture_and_an_own_transform() -> None:
    preprocess = Preprocess(crop_size=8, resize_size=8, mean=(0.5,), std=(0.5,))
    image = torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8)
    state = torch.get_rng_state()
    cells = show_augmentations(
        image, v2.RandomInvert(p=1.0), preprocess=preprocess, num_images=1, num_columns=1
    )
    assert torch.equal(torch.get_rng_state(), state)
    expected = image.expand(3, -1, -1).permute(1, 2, 0).numpy()
    assert np.array_equal(drawn(cells[0]), expected)
    assert drawn(cells[1]) * 255 == pytest.approx(255 - expected, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augmentation": 3}, "`augmentation` should be a preset's name or a callable, found 3."),
        ({"num_images": 0}, "`num_images` should be an integer of at least 1, found 0."),
        ({"seed": -1}, "`seed` should be an integer from 0 to 4294967295, found -1."),
        (
            {"preprocess": Preprocess(mean=(0.5, 0.5), std=(1, 1))},
            "Pictures of 3 channels or 1 can be drawn, found a preprocessing of 2 channels.",
        ),
    ],
)
def test_show_augmentations_checks_its_arguments(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"preprocess": Preprocess()} | options
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        show_augmentations(torch.zeros(3, 4, 4, dtype=torch.uint8), **arguments)


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


def phase_plan(name: str, first_epoch: int, lrs: dict[str, tuple[float, ...]]) -> PhasePlan:
    return PhasePlan(
        name=name, first_epoch=first_epoch, num_epochs=2, steps_per_epoch=2 if lrs else 0,
        freeze_plan=FreezePlan(), num_trainable=1, num_frozen=0,
        steps=(0, 1, 2, 3) if lrs else (), lrs=lrs, features="", num_feature_images=None,
        estimate=None,
    )  # fmt: skip


def fit_plan(*phases: PhasePlan) -> FitPlan:
    return FitPlan(
        backbone_name="tiny", device="cpu", batch_size=2, num_train=4, num_val=4, phases=phases
    )


def test_plot_plan_draws_the_rates_of_each_group() -> None:
    plan = fit_plan(
        phase_plan("solved", 1, {}),
        phase_plan("head", 3, {"head": (0.1, 0.1, 0.1, 0.0)}),
        phase_plan("all", 5, {"head": (0.1, 0.1, 0.1, 0.1), "layer4": (0.01,) * 4}),
    )
    ax = plot_plan(plan)
    curves = [line for line in ax.lines if not str(line.get_label()).startswith("_")]
    assert [line.get_label() for line in curves] == ["head", "head", "layer4"]
    assert np.asarray(curves[0].get_xdata()).tolist() == [2, 2.5, 3, 3.5]
    assert np.isnan(np.asarray(curves[0].get_ydata())[3])
    assert np.asarray(curves[2].get_ydata()).tolist() == [0.01] * 4
    colors = [to_hex(line.get_color()) for line in curves]
    assert colors[0] == colors[1] != colors[2]
    assert [text.get_text() for text in ax.texts] == ["solved", "head", "all"]
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["head", "layer4"]
    assert ax.get_yscale() == "log"


def test_plot_plan_wraps_or_turns_long_names() -> None:
    rates: dict[str, tuple[float, ...]] = {"head": (0.1,) * 4}
    names = ["a b", *("two words" for _ in range(8)), "unbreakable_name"]
    plan = fit_plan(*(phase_plan(name, 2 * n + 1, rates) for n, name in enumerate(names)))
    texts = plot_plan(plan).texts  # 7 characters for each of 10 phases
    assert [text.get_text() for text in texts] == ["a b", *["two\nwords"] * 8, "unbreakable_name"]
    assert [text.get_rotation() for text in texts] == [0] * 9 + [90]


def test_plot_plan_takes_axes() -> None:
    _, ax = plt.subplots()
    assert plot_plan(fit_plan(phase_plan("head", 1, {"head": (0.1,) * 4})), ax=ax) is ax


def test_plot_plan_of_a_solved_fit() -> None:
    message = "There is nothing to draw: no phase of the plan has learning rates."
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        plot_plan(fit_plan(phase_plan("solved", 1, {})))


LRS = [10 ** (step / 10 - 5) for step in range(50)]


def test_plot_lr_find_draws_losses_and_suggestion() -> None:
    losses = [1 / (1 + (100 * lr) ** 2) for lr in LRS[:-2]] + [2.0, 50.0]
    found = make_lr_find("head", LRS, losses, end="diverged")
    ax = plot_lr_find(found)
    batches, smoothed, mark = ax.lines
    assert np.asarray(batches.get_xydata()) == pytest.approx(np.stack([LRS, losses], axis=1))
    assert np.asarray(smoothed.get_xdata()).tolist() == list(found.smoothed_lrs)
    assert np.asarray(smoothed.get_ydata()).tolist() == list(found.smoothed)
    assert found.suggestion is not None
    assert set(np.asarray(mark.get_xdata())) == {found.suggestion}
    legend = ax.get_legend()
    assert legend is not None
    words = [text.get_text() for text in legend.get_texts()]
    assert words == ["batch", "smoothed", f"suggestion {found.suggestion:.2g}"]
    assert ax.get_xscale() == "log"
    assert ax.get_ylim()[1] == pytest.approx(1.5)  # 50 would leave nothing of the rest to see.


def test_plot_lr_find_without_a_suggestion_takes_axes() -> None:
    _, ax = plt.subplots()
    assert plot_lr_find(make_lr_find("head", LRS, [0.7] * 50), ax=ax) is ax
    assert len(ax.lines) == 2
    assert ax.get_ylim()[0] < 0.7 < ax.get_ylim()[1]


def test_plot_lr_find_of_negative_losses() -> None:
    losses = [-1 / (1 + 100 * lr) for lr in LRS]
    low, high = plot_lr_find(make_lr_find("head", LRS, losses)).get_ylim()
    assert low < min(losses) < max(losses) < high


def test_plot_lr_find_of_nothing() -> None:
    message = "There is nothing to draw: the sweep has no loss that is finite."
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        plot_lr_find(make_lr_find("head", [], [], end="not_finite"))


@pytest.mark.parametrize("ending", [".png", ".SVG"])
def test_a_drawing_is_written_and_closed(tmp_path: Path, ending: str) -> None:
    before = plt.get_fignums()
    path = tmp_path / f"found{ending}"
    save_and_close(plot_lr_find(make_lr_find("head", LRS, [0.7] * 50)), path)
    assert path.read_bytes()[:4] in (b"\x89PNG", b"<?xm")
    assert list(tmp_path.iterdir()) == [path]
    assert plt.get_fignums() == before


def test_a_drawing_that_cannot_be_written_is_closed(tmp_path: Path) -> None:
    before = plt.get_fignums()
    ax = plot_lr_find(make_lr_find("head", LRS, [0.7] * 50))
    with pytest.raises(OutputError):
        save_and_close(ax, tmp_path / "none" / "found.png")
    assert plt.get_fignums() == before


def test_findings_are_drawn_the_worst_first(tiny_folder: Path) -> None:
    broken = tiny_folder / "train" / "red" / "000.png"
    broken.write_bytes(b"no picture")
    twin = tiny_folder / "val" / "red" / "twin.png"
    twin.write_bytes((tiny_folder / "train" / "red" / "001.png").read_bytes())
    report = check_folder(tiny_folder)
    cells = show_findings(report, num_images=3, num_columns=2)
    assert [ax.get_title() for ax in cells] == [
        "broken\ntrain/red/000.png",
        "leak\ntrain/red/001.png",
        "leak\nval/red/twin.png",
    ]
    assert cells[0].texts[0].get_text().replace("\n", " ") == (
        "it is not a JPEG, PNG, WEBP, BMP, GIF or TIFF file, whatever its name says."
    )
    assert not cells[1].texts


def test_findings_about_no_file_cannot_be_drawn(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "good", num_train=10, num_val=2)
    with pytest.raises(DataError) as error:
        show_findings(check_folder(root))
    assert str(error.value) == "There is nothing to show: no finding is about a file."
