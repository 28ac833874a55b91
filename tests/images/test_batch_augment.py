from __future__ import annotations

import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from transferkit.errors import ConfigError, UnknownNameError
from transferkit.images import (
    BatchAugmentation,
    list_batch_augmentations,
    make_batch_augmentation,
)

NAMES = list_batch_augmentations()


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    """Return images whose value is their place, and targets of three classes."""
    images = torch.arange(1.0, size + 1).view(size, 1, 1, 1).expand(size, 3, 8, 10).clone()
    return images, torch.arange(size) % 3


def num_values(image: Tensor) -> int:
    return len(set(image.flatten().tolist()))


def test_batch_augmentations_are_listed() -> None:
    assert NAMES == ["cutmix", "mixup", "mixup_or_cutmix"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 2, 6, 7])
def test_images_and_soft_targets_come_back(name: str, size: int) -> None:
    mix = make_batch_augmentation(name, num_classes=3)
    images, targets = batch(size)
    for _ in range(50):
        mixed, soft = mix(images, targets)
        assert mixed.dtype == soft.dtype == torch.float32
        assert mixed.shape == images.shape
        assert soft.shape == (size, 3)
        assert soft.sum(dim=1).tolist() == pytest.approx([1.0] * size)
        assert soft.min() >= 0
    unchanged = batch(size)
    assert torch.equal(images, unchanged[0])
    assert torch.equal(targets, unchanged[1])


@pytest.mark.parametrize("name", NAMES)
def test_targets_have_the_shares_of_the_images(name: str) -> None:
    mix = make_batch_augmentation(name, num_classes=6)
    images, targets = batch(6)[0], torch.arange(6)
    values = images[:, 0, 0, 0]
    shares = []
    for seed in range(60):
        torch.manual_seed(seed)
        mixed, soft = mix(images, targets)
        # The mean of an image is the mean of the two values, by their shares.
        assert mixed.mean(dim=(1, 2, 3)).tolist() == pytest.approx((soft @ values).tolist())
        assert soft.count_nonzero(dim=1).max() <= 2
        shares.append(soft[0, 0].item())
    # The boxes of CutMix are cut off at the border, so that few shares are small.
    assert 0 <= min(shares) < 0.5
    assert 0.8 < max(shares) <= 1


def test_mixup_adds_and_cutmix_pastes() -> None:
    images, targets = batch()
    torch.manual_seed(0)
    added = make_batch_augmentation("mixup", num_classes=3, alpha=100)(images, targets)[0]
    assert all(num_values(image) == 1 for image in added)
    assert not torch.isin(added, images).all()
    pasted = make_batch_augmentation("cutmix", num_classes=3, alpha=100)(images, targets)[0]
    assert all(num_values(image) == 2 for image in pasted)
    assert torch.isin(pasted, images).all()


@pytest.mark.parametrize(
    ("name", "alpha", "expected"),
    [
        ("mixup", None, v2.MixUp(alpha=0.2, num_classes=3)),
        ("mixup", 3, v2.MixUp(alpha=3.0, num_classes=3)),
        ("cutmix", None, v2.CutMix(alpha=1.0, num_classes=3)),
        ("cutmix", 0.5, v2.CutMix(alpha=0.5, num_classes=3)),
        (
            "mixup_or_cutmix",
            None,
            v2.RandomChoice(
                [v2.MixUp(alpha=0.2, num_classes=3), v2.CutMix(alpha=1.0, num_classes=3)]
            ),
        ),
        (
            "mixup_or_cutmix",
            0.7,
            v2.RandomChoice(
                [v2.MixUp(alpha=0.7, num_classes=3), v2.CutMix(alpha=0.7, num_classes=3)]
            ),
        ),
    ],
)
def test_batches_are_torchvisions_under_the_same_seed(name: str, alpha: Any, expected: Any) -> None:
    mix = make_batch_augmentation(name, num_classes=3, alpha=alpha)
    images, targets = torch.rand(6, 3, 8, 10), batch()[1]
    for seed in range(30):
        torch.manual_seed(seed)
        wanted = expected(images, targets)
        torch.manual_seed(seed)
        found = mix(images, targets)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])


def test_either_is_chosen_about_equally_often() -> None:
    mix = make_batch_augmentation("mixup_or_cutmix", num_classes=3, alpha=100)
    images, targets = batch()
    torch.manual_seed(0)
    pasted = [num_values(mix(images, targets)[0][0]) == 2 for _ in range(200)]
    assert 70 < sum(pasted) < 130


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one_comes_back(name: str) -> None:
    images, targets = torch.rand(1, 3, 4, 4), torch.tensor([2])
    found, soft = make_batch_augmentation(name, num_classes=3)(images, targets)
    assert torch.equal(found, images)
    assert soft.tolist() == [[0.0, 0.0, 1.0]]


@pytest.mark.parametrize("name", NAMES)
def test_channels_stay_last_in_memory(name: str) -> None:
    images = torch.rand(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    mixed, _ = make_batch_augmentation(name, num_classes=3)(images, torch.tensor([0, 1, 2, 0]))
    assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_the_ends_of_alpha_draw_what_they_should() -> None:
    images, targets = torch.rand(2, 1, 4, 4), torch.tensor([0, 1])

    def shares(alpha: float) -> Tensor:
        mix = make_batch_augmentation("mixup", num_classes=2, alpha=alpha)
        torch.manual_seed(0)
        return torch.stack([mix(images, targets)[1][0, 0] for _ in range(500)])

    small, large = shares(0.01), shares(1000)
    assert ((small < 0.01) | (small > 0.99)).float().mean() > 0.9
    assert small.mean().item() == pytest.approx(0.5, abs=0.07)
    assert ((large - 0.5).abs() < 0.1).all()


@pytest.mark.parametrize("name", NAMES)
def test_batch_augmentations_can_be_pickled(name: str) -> None:
    mix = make_batch_augmentation(name, num_classes=3, alpha=0.3)
    images, targets = batch()
    torch.manual_seed(0)
    expected = mix(images, targets)
    copy = pickle.loads(pickle.dumps(mix))
    assert copy == mix == BatchAugmentation(name=name, num_classes=3, alpha=0.3)
    torch.manual_seed(0)
    assert torch.equal(copy(images, targets)[0], expected[0])


MIXUP = "mixup: a sum with the neighbour, the share kept from Beta({}, {})"
CUTMIX = "CutMix: a box of the neighbour's pixels, the share kept from Beta({}, {})"


@pytest.mark.parametrize(
    ("name", "alpha", "words"),
    [
        ("mixup", None, MIXUP.format(0.2, 0.2)),
        ("mixup", 3, MIXUP.format(3, 3)),
        ("cutmix", None, CUTMIX.format(1, 1)),
        (
            "mixup_or_cutmix",
            None,
            f"with probability 0.5 each, {MIXUP.format(0.2, 0.2)}; or {CUTMIX.format(1, 1)}",
        ),
        (
            "mixup_or_cutmix",
            0.5,
            f"with probability 0.5 each, {MIXUP.format(0.5, 0.5)}; or {CUTMIX.format(0.5, 0.5)}",
        ),
    ],
)
def test_batch_augmentations_describe_themselves(name: str, alpha: Any, words: str) -> None:
    assert make_batch_augmentation(name, num_classes=2, alpha=alpha).describe() == words


def test_unknown_name_is_an_error() -> None:
    message = (
        "Unknown batch augmentation `mixupp`. Did you mean `mixup`? "
        "`transferkit.images.list_batch_augmentations()` names all 3."
    )
    with pytest.raises(UnknownNameError, match=f"^{re.escape(message)}$"):
        make_batch_augmentation("mixupp", num_classes=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "`num_classes` should be an integer of at least 1, found 0."),
        ({"alpha": 0}, "`alpha` should be a finite number from 0.01 to 1000, found 0."),
        ({"alpha": 2000}, "`alpha` should be a finite number from 0.01 to 1000, found 2000."),
        ({"alpha": "1"}, "`alpha` should be a finite number from 0.01 to 1000, found '1'."),
    ],
)
def test_settings_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make_batch_augmentation("mixup", **({"num_classes": 2} | options))


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        (
            torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
            torch.tensor([0, 1]),
            "`images` should be float32 (N, C, h, w), found uint8 (2, 3, 4, 4).",
        ),
        (
            torch.zeros(3, 4, 4),
            torch.tensor([0, 1, 0]),
            "`images` should be float32 (N, C, h, w), found float32 (3, 4, 4).",
        ),
        (
            torch.zeros(0, 3, 4, 4),
            torch.zeros(0, dtype=torch.int64),
            "`images` should be float32 (N, C, h, w), found float32 (0, 3, 4, 4).",
        ),
        (
            torch.zeros(2, 3, 4, 4),
            torch.tensor([0]),
            "`targets` should be int64 (2,), found int64 (1,).",
        ),
        (
            torch.zeros(2, 3, 4, 4),
            torch.tensor([0.0, 1.0]),
            "`targets` should be int64 (2,), found float32 (2,).",
        ),
        (
            torch.zeros(2, 3, 4, 4),
            torch.tensor([0, 2]),
            "`targets` should be in [0, 2), found 2.",
        ),
        (
            torch.zeros(2, 3, 4, 4),
            torch.tensor([0, -1]),
            "`targets` should be in [0, 2), found -1.",
        ),
    ],
)
def test_batches_are_checked(images: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make_batch_augmentation("mixup", num_classes=2)(images, targets)
