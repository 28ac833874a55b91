from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transferkit.errors import ImageError
from transferkit.images import Preprocess
from transferkit.inference.doors import hold_source, to_source
from transferkit.inference.pipeline import Broken, read_ahead

SPEC = Preprocess(crop_size=32, resize_size=32)


def read_all(sources: Iterator[Any], num_workers: int) -> list[Any]:
    def read(source: Any) -> torch.Tensor:
        return SPEC.eval()(SPEC.decode(to_source(source, 3)))

    pairs = read_ahead(
        sources,
        read,
        hold=lambda source: hold_source(source, SPEC),
        num_workers=num_workers,
        num_ahead=8,
    )
    return [found for _, found in pairs]


def with_open_files(paths: list[Path]) -> Iterator[Any]:
    for path in paths:
        with path.open("rb") as file:
            yield file


def with_open_images(paths: list[Path]) -> Iterator[Any]:
    for path in paths:
        with Image.open(path) as image:
            yield image


def in_one_array(paths: list[Path]) -> Iterator[Any]:
    frame = np.zeros((60, 50, 3), np.uint8)
    for path in paths:
        frame[:] = np.asarray(Image.open(path))
        yield frame


def in_one_tensor(paths: list[Path]) -> Iterator[Any]:
    frame = torch.zeros(60, 50, 3, dtype=torch.uint8)
    for path in paths:
        frame[:] = torch.from_numpy(np.array(Image.open(path)))
        yield frame.permute(2, 0, 1)


@pytest.mark.parametrize(
    "door", [with_open_files, with_open_images, in_one_array, in_one_tensor, iter]
)
def test_pictures_are_taken_before_the_iterable_goes_on(
    door: Callable[[list[Path]], Iterator[Any]], tmp_path: Path
) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for number, path in enumerate(paths):
        Image.fromarray(np.full((60, 50, 3), 40 * number, np.uint8)).save(path)
    expected = read_all(iter(paths), num_workers=0)
    found = read_all(door(paths), num_workers=2)
    assert len(found) == 6
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_is_no_picture_keeps_its_place(num_workers: int) -> None:
    grey = np.zeros((40, 40, 3), np.uint8)
    found = read_all(iter([grey, None, io.BytesIO(b"no"), grey]), num_workers)
    assert [isinstance(each, ImageError) for each in found] == [False, True, True, False]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_not_foreseen_comes_after_what_was_good(
    num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grey = np.zeros((40, 40, 3), np.uint8)
    found = read_all(iter([grey, np.zeros((2, 2), object), grey]), num_workers)
    assert [type(each).__name__ for each in found][:2] == ["Tensor", "ImageError"]

    def fail(*_: object) -> None:
        raise ZeroDivisionError("x")

    monkeypatch.setattr(Preprocess, "decode", fail)
    (broken,) = read_all(iter([grey]), num_workers)
    assert isinstance(broken, Broken)
    assert isinstance(broken.error, ZeroDivisionError)


def test_a_closed_file_and_other_byte_orders(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.full((40, 40, 3), 51, np.uint8)).save(path)
    file = path.open("rb")
    file.close()
    closed, swapped, wide, expected = read_all(
        iter(
            [
                file,
                np.full((40, 40, 3), 0.2, ">f4"),
                np.full((40, 40, 3), 0.2, np.longdouble),
                path,
            ]
        ),
        num_workers=0,
    )
    assert str(closed) == f"Cannot read the picture `{path}`: read of closed file."
    assert torch.equal(swapped, expected)
    assert torch.equal(wide, expected)
