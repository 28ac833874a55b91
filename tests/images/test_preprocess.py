from __future__ import annotations

import dataclasses
import json
import math
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from transferkit.errors import ConfigError, UnknownNameError
from transferkit.images import Preprocess, is_seedable, list_augmentations

CHANNEL = st.floats(0, 1, allow_nan=False)
SPREAD = st.floats(1e-3, 2, allow_nan=False)
PREPROCESSES = st.builds(
    lambda crop, more, **rest: Preprocess(crop_size=crop, resize_size=crop + more, **rest),
    st.integers(1, 600),
    st.integers(0, 100),
    resize_mode=st.sampled_from(["shorter", "squash"]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    mean=st.tuples(CHANNEL, CHANNEL, CHANNEL),
    std=st.tuples(SPREAD, SPREAD, SPREAD),
)


def picture(height: int = 50, width: int = 70) -> Tensor:
    """Return a smooth picture, on which all ways of resampling agree but for the rounding."""
    coarse = torch.rand(
        (1, 3, max(2, height // 8), max(2, width // 8)),
        generator=torch.Generator().manual_seed(0),
    )
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth[0] * 255).round().to(torch.uint8)


def levels(image: Tensor, preprocess: Preprocess) -> Tensor:
    """Return normalised values in units of one step of 8 bits."""
    return image * torch.tensor(preprocess.std).view(3, 1, 1) * 255


# The deterministic transform


@pytest.mark.parametrize(("crop", "resize"), [(32, 40), (224, 256), (48, 48)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(50, 70), (70, 50), (300, 301), (9, 40)])
@pytest.mark.parametrize("pil", [False, True])
def test_eval_agrees_with_the_transforms_of_torchvision(
    crop: int, resize: int, interpolation: Any, shape: tuple[int, int], pil: bool
) -> None:
    preprocess = Preprocess(crop_size=crop, resize_size=resize, interpolation=interpolation)
    steps = [
        transforms.Resize(resize, transforms.InterpolationMode(interpolation), antialias=True),
        transforms.CenterCrop(crop),
        transforms.ToTensor() if pil else transforms.ConvertImageDtype(torch.float32),
        transforms.Normalize(preprocess.mean, preprocess.std),
    ]
    image = picture(*shape)
    expected = transforms.Compose(steps)(to_pil_image(image) if pil else image)
    found = preprocess.eval()(image)
    assert found.dtype == torch.float32
    assert found.shape == (3, crop, crop)
    # Bytes may be resampled in integers or in floats, in one or two roundings.
    difference = levels(found - expected, preprocess).abs()
    assert float(difference.max()) < 2.01
    assert float(difference.mean()) < 0.3


def test_squash_brings_both_sides_to_the_size() -> None:
    image = torch.zeros(3, 20, 60, dtype=torch.uint8)
    image[:, :, 30:] = 255
    preprocess = Preprocess(crop_size=20, resize_size=20, resize_mode="squash")
    shown = preprocess.denormalize(preprocess.eval()(image))
    assert shown.shape == (3, 20, 20)
    assert float(shown[:, :, :9].max()) < 0.01
    assert float(shown[:, :, 11:].min()) > 0.99


def test_shorter_side_keeps_the_proportions() -> None:
    image = torch.zeros(3, 20, 60, dtype=torch.uint8)
    image[:, :, 20:40] = 255
    preprocess = Preprocess(crop_size=20, resize_size=20)
    shown = preprocess.denormalize(preprocess.eval()(image))
    assert float(shown.min()) > 0.99


@pytest.mark.parametrize("train", [False, True])
def test_transform_does_not_change_the_picture(train: bool) -> None:
    preprocess = Preprocess(crop_size=16, resize_size=16)
    image = picture(16, 16)
    (preprocess.train("none") if train else preprocess.eval())(image)
    assert torch.equal(image, picture(16, 16))


def test_normalize_agrees_with_numpy() -> None:
    preprocess = Preprocess(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    batch = torch.stack([picture(4, 5), picture(4, 5).flip(0)])
    expected = (batch.numpy() / 255 - np.reshape(preprocess.mean, (3, 1, 1))) / np.reshape(
        preprocess.std, (3, 1, 1)
    )
    found = preprocess.normalize(batch)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(PREPROCESSES, st.integers(0, 2**32 - 1))
def test_denormalize_undoes_normalize(preprocess: Preprocess, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8, generator=generator)
    normalized = preprocess.normalize(pixels)
    kept = normalized.clone()
    shown = preprocess.denormalize(normalized)
    assert torch.equal((shown * 255).round().to(torch.uint8), pixels)
    assert torch.equal(normalized, kept)


def test_denormalize_clips_and_gives_float32() -> None:
    images = torch.tensor([-1e6, 0.0, 1e6], dtype=torch.float64).view(1, 1, 3).expand(2, 3, 1, 3)
    shown = Preprocess().denormalize(images)
    assert shown.dtype == torch.float32
    assert shown.shape == images.shape
    assert shown[0, 0, 0].tolist() == pytest.approx([0.0, 0.485, 1.0])


# The random transform


def test_train_normalises_what_the_augmentation_gives() -> None:
    preprocess = Preprocess(crop_size=8, resize_size=8)
    view = picture(8, 8)
    transform = preprocess.train(lambda image: view)
    assert torch.equal(transform(picture()), preprocess.normalize(view))


def test_train_with_the_preset_none_is_deterministic() -> None:
    preprocess = Preprocess(crop_size=24, resize_size=24)
    assert torch.equal(preprocess.train("none")(picture()), preprocess.eval()(picture()))


def test_train_defaults_to_the_preset_of_the_lesson() -> None:
    preprocess = Preprocess(crop_size=24, resize_size=32)
    torch.manual_seed(3)
    found = preprocess.train()(picture())
    torch.manual_seed(3)
    assert torch.equal(found, preprocess.train("tutorial")(picture()))
    assert found.shape == (3, 24, 24)


def test_train_hands_its_interpolation_to_the_preset() -> None:
    views = []
    for interpolation in ("bilinear", "bicubic"):
        preprocess = Preprocess(crop_size=24, resize_size=32, interpolation=interpolation)
        views.append(preprocess.train("none")(picture()))
    assert not torch.equal(*views)


@pytest.mark.parametrize(
    ("view", "found"),
    [
        (torch.zeros(3, 8, 8), "float32 (3, 8, 8)"),
        (torch.zeros(3, 9, 8, dtype=torch.uint8), "uint8 (3, 9, 8)"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), "uint8 (1, 8, 8)"),
    ],
)
def test_augmentation_that_gives_something_else_is_an_error(view: Tensor, found: str) -> None:
    transform = Preprocess(crop_size=8, resize_size=8).train(lambda image: view)
    with pytest.raises(ConfigError) as error:
        transform(picture())
    assert str(error.value) == (
        f"An augmentation should return uint8 (3, 8, 8), found {found}. "
        f"Normalisation is done after it."
    )


def test_unknown_preset_is_an_error() -> None:
    with pytest.raises(UnknownNameError) as error:
        Preprocess().train("tutorials")
    assert str(error.value) == (
        "Unknown augmentation `tutorials`. Did you mean `tutorial`? "
        f"`transferkit.images.list_augmentations()` names all {len(list_augmentations())}."
    )


def test_transforms_can_be_sent_to_workers() -> None:
    preprocess = Preprocess(crop_size=8, resize_size=8)
    for transform in (
        preprocess.eval(),
        preprocess.eval(normalize=False),
        preprocess.train("none"),
        preprocess.train("none", normalize=False),
    ):
        assert torch.equal(pickle.loads(pickle.dumps(transform))(picture()), transform(picture()))


# Normalisation of whole batches, later


@pytest.mark.parametrize("crop", [1, 7, 32, 97, 224])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_batch_gives_the_bits_of_its_pictures(crop: int, num_threads: int, layout: Any) -> None:
    preprocess = Preprocess(crop_size=crop, resize_size=crop)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5, 3, crop, crop), dtype=torch.uint8, generator=generator)
    expected = torch.stack([preprocess.normalize(each) for each in pixels])
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        found = preprocess.normalize(pixels.contiguous(memory_format=layout))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("num_channels", [1, 3, 5])
@pytest.mark.parametrize("name", [None, *list_augmentations()])
def test_what_is_normalised_later_gives_the_same_bits(name: str | None, num_channels: int) -> None:
    if num_channels == 5 and name in ("trivial_augment", "rand_augment", "strong"):
        pytest.skip("this preset takes 1 or 3 channels")
    numbers = tuple(0.1 * (channel + 1) for channel in range(num_channels))
    preprocess = Preprocess(crop_size=31, resize_size=33, mean=numbers, std=numbers)
    image = picture().repeat(2, 1, 1)[:num_channels]
    make = preprocess.eval if name is None else partial(preprocess.train, name)
    views: dict[bool, list[Tensor]] = {}
    for normalize in (True, False):
        torch.manual_seed(0)
        transform = make(normalize=normalize)
        views[normalize] = [transform(image) for _ in range(6)]
        assert is_seedable(transform) == is_seedable(make())
    assert {each.dtype for each in views[False]} == {torch.uint8}
    assert {each.shape for each in views[False]} == {(num_channels, 31, 31)}
    found = preprocess.normalize(torch.stack(views[False]))
    assert torch.equal(found, torch.stack(views[True]))


def test_an_augmentation_is_checked_where_it_is_normalised_later_too() -> None:
    transform = Preprocess(crop_size=8, resize_size=8).train(torch.clone, normalize=False)
    with pytest.raises(ConfigError, match=r"^An augmentation should return uint8 \(3, 8, 8\), "):
        transform(picture())


@pytest.mark.gpu
def test_an_accelerator_normalises_to_the_last_bits() -> None:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        pytest.skip("PyTorch finds no accelerator")
    pixels = torch.stack([picture(64, 64), picture(64, 64).flip(0)])
    found = Preprocess().normalize(pixels.to(device))
    assert found.device.type == device.type
    torch.testing.assert_close(found.cpu(), Preprocess().normalize(pixels), rtol=1e-6, atol=1e-6)


# The description as data


@settings(deadline=None)
@given(PREPROCESSES)
def test_description_survives_json(preprocess: Preprocess) -> None:
    text = json.dumps(preprocess.to_dict(), allow_nan=False)
    assert Preprocess.from_dict(json.loads(text)) == preprocess


def test_description_is_frozen_and_hashable() -> None:
    preprocess = Preprocess(mean=[0.5, 0.5, 0.5])  # type: ignore[arg-type]
    assert hash(preprocess) == hash(Preprocess(mean=(0.5, 0.5, 0.5)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        preprocess.crop_size = 3  # type: ignore[misc]


def test_words_say_it_all() -> None:
    preprocess = Preprocess(
        crop_size=100,
        resize_size=120,
        resize_mode="squash",
        interpolation="bicubic",
        mean=(1 / 3, 0.5, 0.5),
    )
    assert preprocess.describe() == (
        "resize to 120x120 (bicubic), centre crop 100x100, mean (0.3333, 0.5, 0.5), "
        "std (0.229, 0.224, 0.225)"
    )
    assert Preprocess().describe() == (
        "shorter side to 256 (bilinear), centre crop 224x224, mean (0.485, 0.456, 0.406), "
        "std (0.229, 0.224, 0.225)"
    )


@pytest.mark.parametrize("name", ["crop_size", "resize_size"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "224", True, None])
def test_size_that_cannot_work_is_an_error(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        Preprocess(**{name: value})
    assert str(error.value) == f"`{name}` should be an integer of at least 1, found {value!r}."


def test_crop_larger_than_the_resized_picture_is_an_error() -> None:
    with pytest.raises(ConfigError) as error:
        Preprocess(crop_size=300)
    assert str(error.value) == "`resize_size` should be at least `crop_size` (300), found 256."


def test_unknown_resize_mode_is_an_error() -> None:
    with pytest.raises(ConfigError) as error:
        Preprocess(resize_mode="longer")  # type: ignore[arg-type]
    assert str(error.value) == (
        "`resize_mode` should be one of 'shorter', 'squash', found 'longer'."
    )


def test_unknown_interpolation_is_an_error() -> None:
    with pytest.raises(ConfigError) as error:
        Preprocess(interpolation="nearest")  # type: ignore[arg-type]
    assert str(error.value) == (
        "`interpolation` should be one of 'bilinear', 'bicubic', found 'nearest'."
    )


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize("value", [(), 0.5, (0.5, 0.5, "x"), None])
def test_channels_that_cannot_work_are_an_error(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        Preprocess(**{name: value})
    assert str(error.value) == (
        f"`{name}` should be finite numbers, one for each channel (three for red, green and "
        f"blue), found {value!r}."
    )


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_standard_deviation_of_zero_or_less_is_an_error(value: float) -> None:
    with pytest.raises(ConfigError) as error:
        Preprocess(std=(1.0, value, 1.0))
    assert (
        str(error.value) == f"`std` should be above 0 in every channel, found (1.0, {value}, 1.0)."
    )


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_channels_that_are_not_finite_are_an_error(name: str, value: float) -> None:
    with pytest.raises(ConfigError) as error:
        Preprocess(**{name: (0.5, value, 0.5)})  # type: ignore[arg-type]
    assert str(error.value) == (
        f"`{name}` should be finite numbers, one for each channel (three for red, green and "
        f"blue), found (0.5, {value}, 0.5)."
    )


def test_mean_and_std_of_different_length_are_an_error() -> None:
    with pytest.raises(ConfigError) as error:
        Preprocess(mean=(0.5,))
    assert str(error.value) == (
        "`mean` and `std` should have one number for each channel, found 1 and 3: (0.5,) and "
        "(0.229, 0.224, 0.225)."
    )


# Other numbers of channels


@pytest.mark.parametrize("num_channels", [1, 2, 4, 7])
def test_all_numbers_of_channels_work(num_channels: int) -> None:
    mean, std = (0.4,) * num_channels, tuple(0.1 + i / 10 for i in range(num_channels))
    preprocess = Preprocess(crop_size=12, resize_size=16, mean=mean, std=std)
    assert preprocess.num_channels == num_channels
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess
    assert f"mean {mean}, " in preprocess.describe()
    generator = torch.Generator().manual_seed(0)
    shape = (num_channels, 20, 30)
    pixels = preprocess.decode(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))
    for transform in (preprocess.eval(), preprocess.train(), preprocess.train("none")):
        assert transform(pixels).shape == (num_channels, 12, 12)
    shown = preprocess.denormalize(preprocess.normalize(pixels))
    assert torch.equal((shown * 255).round().to(torch.uint8), pixels)
    first = Preprocess(crop_size=12, resize_size=16, mean=mean[:1], std=std[:1])
    assert torch.equal(preprocess.eval()(pixels)[:1], first.eval()(pixels[:1]))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 3, 8, 8), (8, 8)])
def test_images_of_another_number_of_channels_are_an_error(shape: tuple[int, ...]) -> None:
    preprocess = Preprocess(crop_size=8, resize_size=8, mean=(0.5,), std=(0.5,))
    images = torch.zeros(shape, dtype=torch.uint8)
    for act in (preprocess.normalize, preprocess.denormalize):
        with pytest.raises(ConfigError) as error:
            act(images)
        assert str(error.value) == (
            f"Images of this preprocessing should have the shape (..., 1, H, W), found {shape}. "
            f"`Preprocess.decode` reads pictures so."
        )


def test_augmentation_keeps_the_number_of_channels() -> None:
    preprocess = Preprocess(crop_size=8, resize_size=8, mean=(0.5,), std=(0.5,))
    transform = preprocess.train(lambda image: image.expand(3, -1, -1))
    with pytest.raises(ConfigError) as error:
        transform(torch.zeros(1, 8, 8, dtype=torch.uint8))
    assert str(error.value) == (
        "An augmentation should return uint8 (1, 8, 8), found uint8 (3, 8, 8). "
        "Normalisation is done after it."
    )


def test_missing_and_unknown_fields_are_an_error() -> None:
    data = Preprocess().to_dict()
    del data["mean"]
    data["scale"] = 1
    with pytest.raises(ConfigError) as error:
        Preprocess.from_dict(data)
    assert str(error.value) == (
        "A preprocess description should have the fields "
        "['crop_size', 'decoder', 'interpolation', 'max_pixels', 'mean', 'resize_mode', "
        "'resize_size', 'std'], found ['crop_size', 'decoder', 'interpolation', 'max_pixels', "
        "'resize_mode', 'resize_size', 'scale', 'std']."
    )


def test_field_of_a_wrong_kind_is_an_error() -> None:
    with pytest.raises(ConfigError) as error:
        Preprocess.from_dict(Preprocess().to_dict() | {"mean": "dark"})
    assert str(error.value) == (
        "`mean` should be finite numbers, one for each channel (three for red, green and "
        "blue), found 'dark'."
    )


def test_description_without_a_decoder_is_of_pillow() -> None:
    data = Preprocess().to_dict()
    del data["decoder"], data["max_pixels"]
    found = Preprocess.from_dict(data)
    assert found == Preprocess(decoder="pillow")


def test_decoding_follows_the_description(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def record(source: Any, **options: Any) -> torch.Tensor:
        calls.append(options)
        return torch.zeros(3, 1, 1, dtype=torch.uint8)

    monkeypatch.setattr("transferkit.images.channels.decode_image", record)
    Preprocess(decoder="pillow", max_pixels=7).decode("ant.jpg")
    assert calls == [{"decoder": "pillow", "max_pixels": 7}]


def test_decoder_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ConfigError) as error:
        Preprocess(decoder="opencv")  # type: ignore[arg-type]
    assert str(error.value) == ('`decoder` should be "torchvision" or "pillow", found \'opencv\'.')
    with pytest.raises(ConfigError) as error:
        Preprocess(max_pixels=0)
    assert str(error.value) == "`max_pixels` should be an integer of at least 1, found 0."


@pytest.mark.parametrize("resize_mode", ["shorter", "squash"])
def test_a_single_pixel_can_be_seen(resize_mode: Any) -> None:
    pixels = torch.full((3, 30, 40), 128, dtype=torch.uint8)
    preprocess = Preprocess(crop_size=1, resize_size=1, resize_mode=resize_mode)
    assert torch.equal(preprocess.eval()(pixels), preprocess.normalize(pixels[:, :1, :1]))
