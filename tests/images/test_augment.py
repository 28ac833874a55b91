from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision import transforms

from transferkit.errors import UnknownNameError
from transferkit.images import list_augmentations, make_augmentation


def picture(height: int = 50, width: int = 70) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def test_presets_are_listed() -> None:
    assert list_augmentations() == ["none", "tutorial"]


@pytest.mark.parametrize("name", list_augmentations())
@pytest.mark.parametrize("shape", [(50, 70), (70, 50), (9, 40), (24, 24)])
def test_every_preset_gives_bytes_of_the_size(name: str, shape: tuple[int, int]) -> None:
    view = make_augmentation(name, size=24)(picture(*shape))
    assert view.dtype == torch.uint8
    assert view.shape == (3, 24, 24)


@pytest.mark.parametrize("seed", range(5))
def test_tutorial_makes_the_views_of_the_lesson(seed: int) -> None:
    lesson = transforms.Compose(
        [transforms.RandomResizedCrop(24, antialias=True), transforms.RandomHorizontalFlip()]
    )
    torch.manual_seed(seed)
    expected = lesson(picture())
    torch.manual_seed(seed)
    found = make_augmentation("tutorial", size=24)(picture())
    difference = (found.int() - expected.int()).abs()
    assert int(difference.max()) <= 1


def test_tutorial_flips_about_half_of_the_pictures() -> None:
    image = torch.zeros(3, 20, 20, dtype=torch.uint8)
    image[:, :, 10:] = 255
    torch.manual_seed(0)
    view = make_augmentation("tutorial", size=8)
    views = [view(image).float() for _ in range(300)]
    flipped = [bool(each[:, :, 0].mean() > each[:, :, -1].mean()) for each in views]
    kept = [bool(each[:, :, 0].mean() < each[:, :, -1].mean()) for each in views]
    assert sum(flipped) / (sum(flipped) + sum(kept)) == pytest.approx(0.5, abs=0.1)


def test_tutorial_draws_from_the_global_generator() -> None:
    view = make_augmentation("tutorial", size=24)
    torch.manual_seed(1)
    first, second = view(picture()), view(picture())
    torch.manual_seed(1)
    assert torch.equal(view(picture()), first)
    assert not torch.equal(first, second)


def test_none_is_the_middle_of_the_picture() -> None:
    image = picture(24, 40)
    assert torch.equal(make_augmentation("none", size=24)(image), image[:, :, 8:32])


def test_interpolation_is_used() -> None:
    smooth = make_augmentation("none", size=24, interpolation="bilinear")(picture())
    sharp = make_augmentation("none", size=24, interpolation="bicubic")(picture())
    assert not torch.equal(smooth, sharp)


def test_unknown_preset_is_an_error() -> None:
    with pytest.raises(UnknownNameError) as error:
        make_augmentation("strong", size=8)
    assert str(error.value) == (
        "Unknown augmentation `strong`. `transferkit.images.list_augmentations()` names all 2."
    )
