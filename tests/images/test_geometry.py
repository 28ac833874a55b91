from __future__ import annotations

import pytest
import torch

from transferkit.images import Preprocess
from transferkit.images.geometry import MAX_SIDE_RATIO, trim_extreme


@pytest.mark.parametrize("shape", [(3, 2, 2 * MAX_SIDE_RATIO), (3, 1, 1), (3, 40, 30)])
def test_usual_pictures_are_left_alone(shape: tuple[int, ...]) -> None:
    image = torch.zeros(shape, dtype=torch.uint8)
    assert trim_extreme(image) is image


@pytest.mark.parametrize("upright", [True, False])
def test_of_extreme_pictures_the_middle_is_kept(upright: bool) -> None:
    line = (torch.arange(1001) // 4).to(torch.uint8).expand(3, 1, 1001)
    image = line.transpose(1, 2) if upright else line
    trimmed = trim_extreme(image).flatten()
    middle = line[0, 0, 484:516]
    assert len(trimmed) == 3 * MAX_SIDE_RATIO
    assert abs(int(trimmed[0]) - int(middle[0])) <= 1


def test_squashing_sees_the_whole_picture() -> None:
    image = (torch.arange(2000) // 8).to(torch.uint8).expand(3, 10, 2000)
    view = Preprocess(
        crop_size=32, resize_size=32, resize_mode="squash", mean=(0, 0, 0), std=(1, 1, 1)
    )
    values = view.eval()(image) * 255
    assert values[0, 0, 0] < 8
    assert values[0, 0, -1] > 240


def test_a_picture_of_one_by_twenty_thousand_pixels_is_no_matter() -> None:
    image = torch.zeros(3, 1, 20_000, dtype=torch.uint8)
    preprocess = Preprocess()
    assert preprocess.eval()(image).shape == (3, 224, 224)
    assert preprocess.train("none")(image).shape == (3, 224, 224)
