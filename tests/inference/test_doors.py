from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from transferkit.errors import ConfigError, DataError, ImageError
from transferkit.images import decode_image
from transferkit.inference import Predictor
from transferkit.models import BackboneSpec, build_model


@pytest.fixture
def predictor(tiny_spec: BackboneSpec) -> Predictor:
    model = build_model(tiny_spec, 2, weights=None)
    return Predictor(model, class_names=("blue", "red"), device="cpu")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    levels = np.random.default_rng(0).integers(0, 256, (45, 37, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(levels).save(path)
    return path


def test_every_door_gives_the_same_bits(predictor: Predictor, picture: Path) -> None:
    expected = predictor.predict(picture).top_k
    pixels = decode_image(picture)
    with Image.open(picture) as opened:
        pil = opened.copy()
    doors: dict[str, Any] = {
        "text": str(picture),
        "bytes": picture.read_bytes(),
        "bytearray": bytearray(picture.read_bytes()),
        "file": io.BytesIO(picture.read_bytes()),
        "PIL": pil,
        "tensor": pixels,
        "tensor, channels last": pixels.permute(1, 2, 0),
        "array": pixels.permute(1, 2, 0).numpy(),
        "array, channels first": pixels.numpy(),
        "float tensor": pixels / 255,
        "double tensor, channels last": pixels.permute(1, 2, 0).double() / 255,
        "float array": (pixels.permute(1, 2, 0) / 255).numpy(),
    }
    for name, source in doors.items():
        assert predictor.predict(source).top_k == expected, name


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK"])
def test_modes_are_the_same_through_path_bytes_and_pil(
    predictor: Predictor, picture: Path, tmp_path: Path, mode: str
) -> None:
    with Image.open(picture) as opened:
        image = opened.convert(mode)
    path = tmp_path / "other.tif"
    image.save(path)
    expected = predictor.predict(path).top_k
    assert predictor.predict(path.read_bytes()).top_k == expected
    assert predictor.predict(image).top_k == expected


def test_folder_pattern_column_and_generator(predictor: Predictor, tmp_path: Path) -> None:
    folder = tmp_path / "pictures" / "below"
    folder.mkdir(parents=True)
    paths = [folder / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        Image.new("RGB", (20, 20), (number * 80, 0, 0)).save(path)
    expected = list(predictor.predict_many(paths))
    table = pd.DataFrame({"path": paths}, index=[7, 8, 9])
    ways: list[Any] = [
        folder.parent,
        str(folder / "*.png"),
        table["path"],
        (path for path in paths),
    ]
    for way in ways:
        found = list(predictor.predict_many(way))
        assert [each.path for each in found] == paths
        # An iterator may go through another engine than a few pictures do.
        for each, other in zip(found, expected, strict=True):
            assert each.probability == pytest.approx(other.probability, abs=1e-5)
    assert list(predictor.predict_many(paths[1])) == [expected[1]]


def test_what_is_not_there(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=f"^{re.escape(f'No file fits the pattern `{tmp_path}/*.x`.')}$"
    ):
        predictor.predict_many(f"{tmp_path}/*.x")


def test_addresses_are_not_fetched(predictor: Predictor) -> None:
    message = (
        "`https://example.org/a.jpg` is an address, and nothing is fetched from a network here. "
        "Download the picture first, and pass its path or bytes."
    )
    with pytest.raises(ImageError, match=f"^{re.escape(message)}$"):
        predictor.predict("https://example.org/a.jpg")
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        predictor.predict_many("https://example.org/a.jpg")
    message = message.replace("://", ":/")  # So a path object has it.
    with pytest.raises(ImageError, match=f"^{re.escape(message)}$"):
        predictor.predict(Path("https://example.org/a.jpg"))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (torch.full((3, 4, 4), 2.0), "2 to 2"),
        (torch.full((3, 4, 4), -0.5), "-0.5 to -0.5"),
        (torch.full((3, 4, 4), float("nan")), "nan to nan"),
    ],
)
def test_floats_outside_the_range(predictor: Predictor, values: torch.Tensor, found: str) -> None:
    message = (
        f"A picture given as floats should have values in [0, 1], found {found}. Divide levels by "
        f"255, and leave out the transform that normalised them; it is done here."
    )
    for source in (values, values.permute(1, 2, 0).numpy()):
        with pytest.raises(ImageError, match=f"^{re.escape(message)}$"):
            predictor.predict(source)
