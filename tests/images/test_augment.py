from __future__ import annotations

import functools
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

from transferkit.errors import ConfigError, UnknownNameError
from transferkit.images import (
    describe_augmentation,
    geometry,
    is_seedable,
    list_augmentations,
    make_augmentation,
)
from transferkit.images.views import change_light, draw_box

SEEDABLE = ["light", "none", "tutorial"]
SHAPES = [(50, 70), (70, 50), (9, 40), (24, 24), (1, 1), (1, 700), (700, 1), (2, 3), (600, 800)]


def picture(height: int = 50, width: int = 70, num_channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (num_channels, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def channels_last(image: Tensor) -> Tensor:
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def seeded_view(view: Callable[[Tensor], Tensor], image: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return view(image)


def test_presets_are_listed() -> None:
    assert list_augmentations() == [
        "light",
        "none",
        "rand_augment",
        "strong",
        "trivial_augment",
        "tutorial",
    ]


@pytest.mark.parametrize("name", list_augmentations())
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", [torch.clone, channels_last])
def test_every_preset_gives_bytes_of_the_size(
    name: str, shape: tuple[int, int], layout: Callable[[Tensor], Tensor]
) -> None:
    image = layout(picture(*shape))
    for size, interpolation in [(24, "bilinear"), (24, "bicubic"), (1, "bilinear")]:
        augmentation = make_augmentation(name, size=size, interpolation=interpolation)
        for seed in range(4):
            view = seeded_view(augmentation, image, seed)
            assert view.dtype == torch.uint8
            assert view.shape == (3, size, size)
    assert torch.equal(image, picture(*shape))


@pytest.mark.parametrize("name", list_augmentations())
@pytest.mark.parametrize("num_channels", [1, 3])
def test_the_input_is_not_changed_where_the_view_shares_its_memory(
    name: str, num_channels: int
) -> None:
    image = picture(8, 8, num_channels)
    augmentation = make_augmentation(name, size=8)
    for seed in range(200):
        assert seeded_view(augmentation, image, seed).shape == (num_channels, 8, 8)
        assert torch.equal(image, picture(8, 8, num_channels))


@pytest.mark.parametrize("name", list_augmentations())
def test_presets_can_be_pickled(name: str) -> None:
    augmentation = make_augmentation(name, size=8, interpolation="bicubic")
    expected = seeded_view(augmentation, picture(), 1)
    copy = pickle.loads(pickle.dumps(augmentation))
    assert copy == augmentation
    assert torch.equal(seeded_view(copy, picture(), 1), expected)


@pytest.mark.parametrize("name", list_augmentations())
def test_a_seed_rules_every_preset(name: str) -> None:
    augmentation = make_augmentation(name, size=8)
    views = [seeded_view(augmentation, picture(), seed) for seed in (0, 1, 2, 3, 0, 1, 2, 3)]
    assert all(torch.equal(one, two) for one, two in zip(views[:4], views[4:], strict=True))
    assert torch.equal(views[0], views[1]) is (name == "none")


@pytest.mark.parametrize("name", SEEDABLE)
def test_seedable_presets_draw_from_their_generator_alone(name: str) -> None:
    augmentation: Any = make_augmentation(name, size=24)
    assert is_seedable(augmentation)
    for seed in range(20):
        expected = seeded_view(augmentation, picture(), seed)
        state = torch.get_rng_state()
        found = augmentation(picture(), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(found, expected)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["tutorial", "light"])
def test_seedable_presets_may_run_in_threads(name: str) -> None:
    augmentation: Any = make_augmentation(name, size=24)

    def view(seed: int) -> Tensor:
        return augmentation(picture(), generator=torch.Generator().manual_seed(seed))  # type: ignore[no-any-return]

    expected = [view(seed) for seed in range(200)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(view, range(200)))
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", sorted(set(list_augmentations()) - set(SEEDABLE)))
def test_the_other_presets_are_not_seedable(name: str) -> None:
    assert not is_seedable(make_augmentation(name, size=8))


@pytest.mark.parametrize("name", SEEDABLE)
@pytest.mark.parametrize("num_channels", [1, 2, 5])
def test_seedable_presets_take_any_number_of_channels(name: str, num_channels: int) -> None:
    view = make_augmentation(name, size=8)(picture(num_channels=num_channels))
    assert view.shape == (num_channels, 8, 8)


@pytest.mark.parametrize("name", sorted(set(list_augmentations()) - set(SEEDABLE)))
def test_the_other_presets_refuse_other_channels(name: str) -> None:
    message = (
        f"The augmentation `{name}` is for pictures of 1 or 3 channels, found 5. "
        "`tutorial`, `light` and `none` take any number."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make_augmentation(name, size=8)(picture(num_channels=5))


def lesson(size: int, interpolation: str) -> Callable[[Tensor], Tensor]:
    chain: Callable[[Tensor], Tensor] = v2.Compose(
        [
            v2.RandomResizedCrop(
                size, interpolation=v2.InterpolationMode(interpolation), antialias=True
            ),
            v2.RandomHorizontalFlip(),
        ]
    )
    return chain


@given(
    height=st.integers(1, 300) | st.sampled_from([1, 2, 3, 4, 2000]),
    width=st.integers(1, 300) | st.sampled_from([1, 2, 3, 4, 2000]),
    size=st.sampled_from([2, 31, 224]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    seed=st.integers(0, 2**32 - 1),
    layout=st.sampled_from([torch.clone, channels_last]),
)
def test_tutorial_is_torchvisions_to_the_bit(
    height: int,
    width: int,
    size: int,
    interpolation: str,
    seed: int,
    layout: Callable[[Tensor], Tensor],
) -> None:
    image = layout(picture(height, width))
    expected = seeded_view(lesson(size, interpolation), image, seed)
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(seed)
    augmentation: Any = make_augmentation("tutorial", size=size, interpolation=interpolation)
    found = augmentation(image, generator=generator)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    assert torch.equal(generator.get_state(), state)  # Nothing more or less was drawn.


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 1.0)])
def test_boxes_are_torchvisions(scale: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    crop = v2.RandomResizedCrop(8, scale=scale)
    sides = [1, 2, 3, 4, 5, 7, 30, 40, 41, 300, 5000]
    for seed in range(1500):
        height, width = (int(side) for side in rng.choice(sides, size=2))
        torch.manual_seed(seed)
        expected = crop.make_params([torch.empty(1, 1, 1).expand(3, height, width)])
        found = draw_box(height, width, scale, torch.Generator().manual_seed(seed))
        assert found == tuple(expected[name] for name in ("top", "left", "height", "width"))


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


def test_light_is_a_crop_a_flip_and_then_light() -> None:
    light = make_augmentation("light", size=24)
    chain = v2.Compose([v2.RandomResizedCrop(24, scale=(0.5, 1.0)), v2.RandomHorizontalFlip()])
    brightness: list[float] = []
    contrast: list[float] = []
    for seed in range(100):
        view = seeded_view(chain, picture(), seed).double().numpy()
        for factors in (brightness, contrast):
            factors.append(torch.empty(1).uniform_(0.8, 1.2).item())
        expected = brightness[-1] * (view.mean() + contrast[-1] * (view - view.mean()))
        found = seeded_view(light, picture(), seed).numpy()
        assert found == pytest.approx(expected.clip(0, 255), abs=0.501)
    for factors in (brightness, contrast):
        assert 0.8 <= min(factors) < 0.82
        assert 1.18 < max(factors) <= 1.2


@pytest.mark.parametrize("factor", [0.8, 0.9, 1.0, 1.2])
def test_light_changes_grey_as_torchvision_does(factor: float) -> None:
    image = picture(num_channels=1) // 2 + 40  # No value is clipped.
    brighter = v2.functional.adjust_brightness(image, factor)
    found = change_light(image, brightness=factor, contrast=1.0)
    assert int((found.int() - brighter.int()).abs().max()) <= 1
    harder = v2.functional.adjust_contrast(image, factor)
    found = change_light(image, brightness=1.0, contrast=factor)
    assert int((found.int() - harder.int()).abs().max()) <= 1


def test_light_is_the_same_in_every_layout_and_changes_no_input() -> None:
    image = picture()
    found = change_light(channels_last(image), brightness=1.1, contrast=0.9)
    assert torch.equal(found, change_light(image, brightness=1.1, contrast=0.9))
    assert torch.equal(image, picture())
    assert torch.equal(change_light(image, brightness=1.0, contrast=1.0), image)


BILINEAR = v2.InterpolationMode.BILINEAR
POLICIES = {
    "trivial_augment": [v2.TrivialAugmentWide(interpolation=BILINEAR)],
    "rand_augment": [v2.RandAugment(interpolation=BILINEAR)],
    "strong": [
        v2.RandAugment(num_ops=2, magnitude=15, interpolation=BILINEAR),
        v2.RandomErasing(p=0.25, scale=(0.02, 0.33), ratio=(0.3, 3.3), value=127),
    ],
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("num_channels", [1, 3])
def test_policies_are_torchvisions_to_the_bit(name: str, num_channels: int) -> None:
    image = picture(num_channels=num_channels)
    chain = v2.Compose([lesson(24, "bilinear"), *POLICIES[name]])
    augmentation = make_augmentation(name, size=24)
    for seed in range(100):
        expected = seeded_view(chain, image, seed)
        assert torch.equal(seeded_view(augmentation, image, seed), expected)


def test_none_is_the_middle_of_the_picture() -> None:
    image = picture(24, 40)
    assert torch.equal(make_augmentation("none", size=24)(image), image[:, :, 8:32])


@pytest.mark.parametrize("name", ["none", "tutorial"])
@pytest.mark.parametrize("layout", [torch.clone, channels_last])
def test_a_view_may_be_a_single_pixel(name: str, layout: Callable[[Tensor], Tensor]) -> None:
    colour = torch.tensor([200, 90, 10], dtype=torch.uint8).view(3, 1, 1)
    augmentation = make_augmentation(name, size=1)
    for seed in range(30):
        found = seeded_view(augmentation, layout(colour.expand(3, 16, 16)), seed)
        expected = seeded_view(augmentation, colour, seed)
        assert torch.equal(found, expected)


def test_none_needs_no_memory_for_extreme_proportions(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def resize(image: Tensor, *args: Any) -> Any:
        sizes.append(tuple(image.shape))
        return geometry.resize(image, *args)

    monkeypatch.setattr("transferkit.images.views.resize", resize)
    image = picture(1, 20_000)
    view = make_augmentation("none", size=8)(image)
    assert torch.equal(view, make_augmentation("none", size=8)(image[:, :, 9_984:10_016]))
    assert sizes == [(3, 1, 32), (3, 1, 32)]


def test_interpolation_is_used() -> None:
    for name in list_augmentations():
        smooth = make_augmentation(name, size=24, interpolation="bilinear")
        sharp = make_augmentation(name, size=24, interpolation="bicubic")
        assert not torch.equal(seeded_view(smooth, picture(), 0), seeded_view(sharp, picture(), 0))


def test_unknown_preset_is_an_error() -> None:
    with pytest.raises(UnknownNameError) as error:
        make_augmentation("stronk", size=8)
    assert str(error.value) == (
        "Unknown augmentation `stronk`. Did you mean `strong`? "
        "`transferkit.images.list_augmentations()` names all 6."
    )


@pytest.mark.parametrize("name", list_augmentations())
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "`size` should be an integer of at least 1, found 0."),
        ({"size": 2.5}, "`size` should be an integer of at least 1, found 2.5."),
        (
            {"interpolation": "nearest"},
            "`interpolation` should be one of 'bilinear', 'bicubic', found 'nearest'.",
        ),
    ],
)
def test_sizes_and_interpolations_are_checked(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make_augmentation(name, **({"size": 8} | options))


CROP = (
    "random crop of 8 to 100 % of the area with sides 3:4 to 4:3, resized to 32x32 (bicubic), "
    "flipped left to right with probability 0.5"
)
OPERATIONS = (
    "(identity, shear, shift, rotation, brightness, colour, contrast, sharpness, posterize, "
    "solarize, autocontrast, equalize)"
)
WORDS = {
    "none": "shorter side to 32 (bicubic), centre crop 32x32",
    "tutorial": CROP,
    "light": CROP.replace("8 to 100", "50 to 100")
    + ", brightness times 0.8 to 1.2, contrast times 0.8 to 1.2",
    "trivial_augment": f"{CROP}, one random operation of TrivialAugment Wide {OPERATIONS}, "
    "of a random strength from 0 to 30",
    "rand_augment": f"{CROP}, 2 random operations of RandAugment {OPERATIONS}, of strength 9 of 30",
    "strong": f"{CROP}, 2 random operations of RandAugment {OPERATIONS}, of strength 15 of 30, "
    "a rectangle of 2 to 33 % of the area with sides 0.3 to 3.3 set to grey (127) with "
    "probability 0.25",
}


@pytest.mark.parametrize("name", list_augmentations())
def test_presets_describe_themselves(name: str) -> None:
    augmentation: Any = make_augmentation(name, size=32, interpolation="bicubic")
    assert augmentation.describe() == WORDS[name]
    assert describe_augmentation(augmentation) == WORDS[name]
    assert describe_augmentation(name, size=32, interpolation="bicubic") == WORDS[name]
    in_general = WORDS[name].replace("32", "224").replace("bicubic", "bilinear")
    assert describe_augmentation(name) == in_general


@pytest.mark.parametrize("name", ["trivial_augment", "rand_augment", "strong"])
def test_the_named_operations_are_torchvisions(name: str) -> None:
    policy = POLICIES[name][0]
    operations = {each.rstrip("XY").lower() for each in policy._AUGMENTATION_SPACE}
    names = {"translate": "shift", "rotate": "rotation", "color": "colour"}
    named = WORDS[name].split("Augment")[-1].split("(")[1].split(")")[0].split(", ")
    assert {names.get(each, each) for each in operations} == set(named)


def brighten(image: Tensor, amount: int = 1) -> Tensor:
    return image + amount


class Plain:
    def __call__(self, image: Tensor) -> Tensor:
        return image


class Talking(Plain):
    def describe(self) -> str:
        return "nothing at all"


def test_a_users_callable_is_described_fairly() -> None:
    here = brighten.__module__
    flip = "RandomHorizontalFlip(p=0.5)"
    expected: list[tuple[Any, str]] = [
        (brighten, f"{here}.brighten"),
        (functools.partial(brighten, amount=2), f"{here}.brighten with amount=2"),
        (functools.partial(brighten), f"{here}.brighten"),
        (
            lambda image: image,
            f"{here}.test_a_users_callable_is_described_fairly.<locals>.<lambda>",
        ),
        (Plain(), f"{here}.Plain"),
        (Plain().__call__, f"{here}.Plain.__call__"),
        (Talking, f"{here}.Talking"),
        (Talking(), "nothing at all"),
        (v2.RandomHorizontalFlip(), flip),
        (v2.Compose([v2.RandomHorizontalFlip(), brighten]), f"{flip}, {here}.brighten"),
        (
            transforms.Compose([transforms.RandomHorizontalFlip(), Talking()]),
            f"{flip}, nothing at all",
        ),
        (torch.nn.Sequential(v2.RandomHorizontalFlip(), torch.nn.ReLU()), f"{flip}, ReLU()"),
        (torch.nn.Sequential(), "nothing"),
        (v2.Compose([make_augmentation("none", size=32, interpolation="bicubic")]), WORDS["none"]),
    ]
    for augmentation, words in expected:
        assert describe_augmentation(augmentation) == words


def test_nested_transforms_are_described_in_one_line() -> None:
    nested = v2.Compose([v2.RandomApply([v2.RandomHorizontalFlip()], p=0.3), v2.CenterCrop(8)])
    words = describe_augmentation(nested)
    assert "\n" not in words
    assert words.endswith(", CenterCrop(size=(8, 8))")
    assert "RandomHorizontalFlip(p=0.5)" in words


def test_what_is_no_augmentation_is_not_described() -> None:
    message = "`augmentation` should be a preset's name or a callable, found 3."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        describe_augmentation(3)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match=r"^Unknown augmentation `x`\. "):
        describe_augmentation("x")
