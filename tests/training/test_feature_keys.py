from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from transferkit.data import ImageDataset, ImageSplits, load_folders
from transferkit.errors import ConfigError, ImageError
from transferkit.images import Preprocess, decode_image
from transferkit.models import BackboneSpec, Classifier, build_model
from transferkit.models.splitting import Split
from transferkit.training import feature_keys
from transferkit.training.feature_keys import describe_for_key, pictures_digest, view_key
from transferkit.training.feature_store import digest_of

ENGINE = {"engine": "pytorch", "precision": "float32"}


@pytest.fixture
def model(tiny_spec: BackboneSpec) -> Classifier:
    return build_model(tiny_spec, 2, weights=None, freeze="backbone")


def key(model: Classifier, dataset: ImageDataset, num_stages: int = 2, **changes: Any) -> str:
    split = model.split(num_stages)
    assert split is not None
    settings: dict[str, Any] = {
        "engine": ENGINE,
        "augmentation": "tutorial",
        "seed": 0,
        "view": 1,
    }
    found = view_key(model, split, dataset, **(settings | changes))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return digest_of(found)


# What features depend on


def change_weights(model: Classifier, dataset: ImageDataset) -> str:
    value = dict(model.named_parameters())["backbone.layer1.0.weight"].detach().view(-1)[:1]
    value.copy_(torch.nextafter(value, torch.tensor(9.0)))
    return key(model, dataset)


def change_statistics(model: Classifier, dataset: ImageDataset) -> str:
    dict(model.named_buffers())["backbone.bn1.running_mean"][0] += 1
    return key(model, dataset)


def change_structure(model: Classifier, dataset: ImageDataset) -> str:
    layer = model.backbone.get_submodule("bn1")
    assert isinstance(layer, nn.BatchNorm2d)
    layer.eps = 1e-3
    return key(model, dataset)


def change_a_byte(model: Classifier, dataset: ImageDataset) -> str:
    content = bytearray(dataset.paths[3].read_bytes())
    content[len(content) // 2] ^= 1
    dataset.paths[3].write_bytes(content)
    return key(model, dataset)


def remove_a_picture(model: Classifier, dataset: ImageDataset) -> str:
    dataset.paths[3].unlink()
    return key(model, dataset)


def change_preprocess(**values: Any) -> Callable[[Classifier, ImageDataset], str]:
    def change(model: Classifier, dataset: ImageDataset) -> str:
        model.preprocess = replace(model.preprocess, **values)
        return key(model, dataset)

    return change


def change_version(model: Classifier, dataset: ImageDataset) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_keys, "version", lambda name: "0.0.1")
        return key(model, dataset)


CHANGES: dict[str, Callable[[Classifier, ImageDataset], str]] = {
    "weights": change_weights,
    "statistics": change_statistics,
    "structure": change_structure,
    "num_stages": lambda model, dataset: key(model, dataset, num_stages=1),
    "one byte of a picture": change_a_byte,
    "a missing picture": remove_a_picture,
    "the order": lambda model, dataset: key(model, dataset.subset([1, 0, *range(2, len(dataset))])),
    "fewer pictures": lambda model, dataset: key(model, dataset.subset(range(15))),
    "a decoder of one's own": lambda model, dataset: key(
        model, dataset.with_decode(lambda source: decode_image(source))
    ),
    "resize_size": change_preprocess(resize_size=40),
    "crop_size": change_preprocess(crop_size=31),
    "mean": change_preprocess(mean=(0.5, 0.5, 0.5)),
    "std": change_preprocess(std=(0.5, 0.5, 0.5)),
    "interpolation": change_preprocess(interpolation="bicubic"),
    "resize_mode": change_preprocess(resize_mode="squash"),
    "decoder": change_preprocess(decoder="pillow"),
    "augmentation": lambda model, dataset: key(model, dataset, augmentation="light"),
    "no augmentation": lambda model, dataset: key(model, dataset, augmentation=None),
    "seed": lambda model, dataset: key(model, dataset, seed=1),
    "view": lambda model, dataset: key(model, dataset, view=2),
    "precision": lambda model, dataset: key(
        model, dataset, engine={**ENGINE, "precision": "bfloat16"}
    ),
    "engine": lambda model, dataset: key(model, dataset, engine={**ENGINE, "engine": "openvino"}),
    "library version": change_version,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_features_depend_on_gives_another_key(
    change: Callable[[Classifier, ImageDataset], str],
    model: Classifier,
    tiny_splits: ImageSplits,
) -> None:
    before = key(model, tiny_splits.train)
    assert key(model, tiny_splits.train) == before
    assert change(model, tiny_splits.train) != before


def test_all_changes_have_keys_of_their_own(tiny_spec: BackboneSpec, tiny_folder: Path) -> None:
    found = []
    for change in CHANGES.values():
        folder = tiny_folder.with_name("copy")
        shutil.copytree(tiny_folder, folder)
        model = build_model(tiny_spec, 2, weights=None, freeze="backbone")
        found.append(change(model, load_folders(folder).train))
        shutil.rmtree(folder)
    assert len(set(found)) == len(CHANGES)


# What they do not depend on


def test_the_head_does_not_matter(
    tiny_spec: BackboneSpec, tiny_splits: ImageSplits, model: Classifier
) -> None:
    before = key(model, tiny_splits.train)
    other = build_model(tiny_spec, 2, weights=None, freeze="backbone", seed=0)
    with torch.no_grad():
        for parameter in other.head.parameters():
            parameter.fill_(3.0)
    assert key(other, tiny_splits.train) == before
    model.unfreeze("all").eval().to(memory_format=torch.channels_last)
    assert key(model, tiny_splits.train) == before


def test_stages_after_the_cut_do_not_matter(model: Classifier, tiny_splits: ImageSplits) -> None:
    before = key(model, tiny_splits.train, num_stages=1)
    dict(model.named_parameters())["backbone.layer1.0.weight"].detach().fill_(3.0)
    assert key(model, tiny_splits.train, num_stages=1) == before


def test_paths_and_times_do_not_matter(
    model: Classifier, tiny_splits: ImageSplits, tiny_folder: Path
) -> None:
    before = key(model, tiny_splits.train)
    os.utime(tiny_splits.train.paths[0], (1, 1))
    moved = tiny_folder.rename(tiny_folder.with_name("moved"))
    assert key(model, load_folders(moved).train) == before


def test_classes_and_transforms_do_not_matter(model: Classifier, tiny_splits: ImageSplits) -> None:
    before = key(model, tiny_splits.train)
    other = ImageDataset(
        list(tiny_splits.train.paths), [0] * len(tiny_splits.train), class_names=["a", "b", "c"]
    )
    assert key(model, other.with_transform(lambda image: image)) == before


def test_who_names_the_models_decoder_does_not_matter(
    model: Classifier, tiny_splits: ImageSplits
) -> None:
    before = key(model, tiny_splits.train)
    assert key(model, tiny_splits.train.with_decode(model.preprocess.decode)) == before


# Pictures


def digest(dataset: ImageDataset, preprocess: Preprocess | None = None) -> str:
    return pictures_digest(dataset, preprocess or Preprocess())


def arrays(*pictures: np.ndarray[Any, Any]) -> ImageDataset:
    return ImageDataset(list(pictures), [0] * len(pictures), class_names=["a", "b"])


def noise(seed: int, channels: int = 3) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (6, 5, channels), dtype=np.uint8)


def test_pictures_that_are_no_files_count_by_their_pixels() -> None:
    one, other = noise(0), noise(1)
    assert digest(arrays(one, other)) == digest(arrays(one.copy(), other.copy()))
    changed = other.copy()
    changed[0, 0, 0] ^= 1
    different = [
        arrays(other, one),
        arrays(one),
        arrays(one, changed),
        arrays(one, other.transpose(1, 0, 2).copy()),
    ]
    found = [digest(each) for each in (arrays(one, other), *different)]
    assert len(set(found)) == 5


def test_pictures_of_other_channels_count_too() -> None:
    preprocess = Preprocess(mean=(0.5,) * 4, std=(0.5,) * 4)
    found = [digest(arrays(noise(seed, 4)), preprocess) for seed in (0, 1, 0)]
    assert found[0] == found[2] != found[1]


def test_a_decoder_of_ones_own_counts_by_the_pixels_that_it_gives(
    tiny_splits: ImageSplits,
) -> None:
    def brighter(factor: int) -> Callable[[Any], Tensor]:
        return lambda source: decode_image(source) * factor

    found = [digest(tiny_splits.val.with_decode(brighter(factor))) for factor in (1, 2, 1)]
    assert found[0] == found[2] != found[1]


def test_what_cannot_be_read_has_a_mark_of_its_own(tiny_splits: ImageSplits) -> None:
    def refuse(source: Any) -> Tensor:
        raise ImageError("No.")

    whole = digest(tiny_splits.val)
    tiny_splits.val.paths[1].unlink()
    without = digest(tiny_splits.val)
    tiny_splits.val.paths[1].write_bytes(b"")
    assert len({whole, without, digest(tiny_splits.val)}) == 3
    refused = digest(tiny_splits.val.with_decode(refuse))
    assert refused == digest(tiny_splits.val.with_decode(refuse))


# Augmentation


@dataclass(frozen=True)
class Shift:
    by: int
    words: tuple[str, ...] = ("a", "b")
    hidden: float = field(default=1.0, repr=False)

    def __call__(self, image: Tensor) -> Tensor:
        return image.roll(self.by, -1)


@dataclass(frozen=True)
class Shifted:
    by: int
    words: tuple[str, ...] = ("a", "b")
    hidden: float = field(default=1.0, repr=False)

    def __call__(self, image: Tensor) -> Tensor:
        return image.roll(self.by, -2)


def test_a_dataclass_is_told_by_its_fields_and_its_code() -> None:
    different: list[Any] = [
        Shift(1),
        Shift(2),
        Shift(1, ("a",)),
        Shift(1, hidden=2.0),
        Shifted(1),
    ]
    assert len({describe_for_key(each) for each in different}) == 5
    assert describe_for_key(Shift(1)) == describe_for_key(Shift(1))
    assert describe_for_key("light") == "light"
    assert describe_for_key(None) is None


@dataclass
class Wrapped:
    transform: Any

    def __call__(self, image: Tensor) -> Tensor:
        return self.transform(image)  # type: ignore[no-any-return]


def flip(image: Tensor) -> Tensor:
    return image.flip(-1)


@pytest.mark.parametrize(
    ("augmentation", "found"),
    [
        (flip, "flip"),
        (v2.RandomHorizontalFlip(), "RandomHorizontalFlip"),
        (Wrapped(v2.RandomHorizontalFlip()), "Wrapped"),
        (Shift, "Shift"),
    ],
)
def test_a_callable_that_does_not_say_what_it_does(augmentation: Any, found: str) -> None:
    message = (
        f"Augmented features can be kept in a folder only where the augmentation says what it "
        f"does: a preset's name, or a dataclass of numbers and texts, found `{found}`. Pass "
        f"`folder=None`, or `views=0`."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        describe_for_key(augmentation)


def test_the_key_says_what_it_is_made_of(model: Classifier, tiny_splits: ImageSplits) -> None:
    split = Split(model.backbone, nn.Identity(), 2)
    found = view_key(
        model, split, tiny_splits.val, engine=ENGINE, augmentation=None, seed=None, view=0
    )
    assert found["backbone"] == "tiny"
    assert found["device"] == "cpu"
    assert found["engine"] == ENGINE
    assert found["preprocess"] == model.preprocess.to_dict()
    assert found["versions"]["torch"] == metadata.version("torch")
