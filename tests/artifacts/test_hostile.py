"""Files from strangers: whatever they hold, the answer is an error of ours, and nothing runs."""

from __future__ import annotations

import os
import pickle
import re
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from transferkit.artifacts import load_artifact, save_artifact
from transferkit.artifacts.schema import MAX_IMAGE_VALUES
from transferkit.errors import ArtifactError, CheckpointError, ConfigError
from transferkit.images import Preprocess
from transferkit.inference import Predictor
from transferkit.models import (
    BackboneSpec,
    Classifier,
    HeadSpec,
    build_model,
    register_backbone,
)
from transferkit.models.registry import _BACKBONES
from transferkit.training.checkpoints import read_checkpoint

Forge = Callable[..., None]

READERS: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "load_artifact": (load_artifact, ArtifactError, "artifact"),
    "Predictor.load": (Predictor.load, ArtifactError, "artifact"),
    "read_checkpoint": (read_checkpoint, CheckpointError, "checkpoint"),
}


class Bomb:
    """Make a pickle that writes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def write_bomb(path: Path, kind: str, sentinel: Path) -> None:
    bomb = Bomb(sentinel)
    if kind == "torch":
        torch.save({"bomb": bomb}, path)
    elif kind == "old torch":
        torch.save({"bomb": bomb}, path, _use_new_zipfile_serialization=False)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", pickle.dumps(bomb))
    else:
        path.write_bytes(pickle.dumps(bomb, protocol=int(kind)))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.pth", "model.bin"])
@pytest.mark.parametrize("kind", ["torch", "old torch", "zip", "2", "4"])
def test_a_pickle_is_not_opened_under_any_name(
    kind: str, name: str, reader: str, tmp_path: Path
) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / name
    write_bomb(path, kind, sentinel)
    read, error, noun = READERS[reader]
    with pytest.raises(
        error,
        match=rf"^Cannot read the {noun} `{re.escape(str(path))}`: it is a pickle or PyTorch "
        rf"file, which could run code and is never opened \(its header would have \d+ bytes, at "
        rf"most 16777216 are read\)\.$",
    ):
        read(path)
    assert not sentinel.exists()


def test_the_bomb_is_one(tmp_path: Path) -> None:
    write_bomb(tmp_path / "bomb", "4", tmp_path / "sentinel")
    pickle.loads((tmp_path / "bomb").read_bytes())
    assert (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["0", "text"])
def test_pickles_of_text_are_not_opened(kind: str, reader: str, tmp_path: Path) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Bomb(sentinel), protocol=0))
    if kind == "text":
        path.write_text("<!DOCTYPE html>")
    read, error, noun = READERS[reader]
    with pytest.raises(error, match=rf"^Cannot read the {noun} .*: it is no safetensors file, or "):
        read(path)
    assert not sentinel.exists()


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_is_not_waited_for(reader: str, tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    path = tmp_path / "pipe.safetensors"
    os.mkfifo(path)
    read, error, noun = READERS[reader]
    message = (
        f"The {noun} `{path}` is a pipe, socket or device, no file. Expected a .safetensors file."
    )
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        read(path)


def test_a_file_that_may_not_be_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    message = f"Cannot read the artifact `{saved}`: permission denied."
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(saved)


# The header and the JSON data


@pytest.mark.parametrize("reader", READERS)
def test_a_header_that_is_refused(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}" + b"more")
    read, error, noun = READERS[reader]
    message = (
        f"Cannot read the {noun} `{path}`: it is no safetensors file, or is truncated or damaged "
        f"(its tensors have 0 bytes, 4 are there)."
    )
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        read(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' is there twice"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ('{"a": [Infinity]}', "Infinity is no number of JSON"),
        ('{"a": -1e999}', "the number -1e999 is too large"),
        ("[" * 100_000, "it is nested deeper than 64 levels"),
        ("[" * 80 + "]" * 80, "it is nested deeper than 64 levels"),
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_json_data_that_are_refused(reader: str, text: str, problem: str, tmp_path: Path) -> None:
    read, error, noun = READERS[reader]
    key = "transferkit" if noun == "artifact" else "transferkit_checkpoint"
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({}, path, metadata={key: text, f"{key}_sha256": ""})
    message = f"The {noun} `{path}` is damaged: its metadata is no JSON ({problem})."
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        read(path)


def test_a_version_that_fills_the_screen(saved: Path, forge: Forge) -> None:
    forge(saved, lambda data: data.update(format_version="x" * 10**5))
    with pytest.raises(ArtifactError, match=r"its format version is '[x]{79}\.$"):
        load_artifact(saved)


# What the data claim


BAD_FIELDS: list[tuple[str, Any, str]] = [
    ("backbone", 18, "its `backbone` should be a text, found 18."),
    ("backbone", "\x1b[2J", "its `backbone` has the strange name '\\x1b[2J'."),
    ("num_features", True, "its `num_features` should be an integer, found True."),
    ("num_features", 16.0, "its `num_features` should be an integer, found 16.0."),
    ("num_features", 0, "its `num_features` should be at least 1, found 0."),
    ("class_names", "ab", "its `class_names` should be a list, found 'ab'."),
    ("class_names", {"a": 1, "b": 2}, "its `class_names` should be a list, found "
     "{'a': 1, 'b': 2}."),
    ("class_names", ["a", "a"], "`class_names` should be 2 different texts, one for each class of "
     "the model, found ['a', 'a']."),
    ("class_names", ["a", 1], "`class_names` should be 2 different texts, one for each class of "
     "the model, found ['a', 1]."),
    ("class_names", ["a", ["b"]], "`class_names` should be 2 different texts, one for each class "
     "of the model, found ['a', ['b']]."),
    ("class_names", ["a", ""], "A class name should not be empty, as that of class 1 is. Name it."),
    ("class_names", [], "`num_classes` should be an integer of at least 2, found 0."),
    ("preprocess", [], "its `preprocess` should be an object, found []."),
    ("freeze_plan", None, "its `freeze_plan` should be an object, found None."),
    ("history", [], "its `history` should be an object, found []."),
    ("versions", {"torch": 2}, "its `versions` should be texts, found {'torch': 2}."),
    ("weights_license", 3, "its `weights_license` should be a text or null, found 3."),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "problem"), BAD_FIELDS)
def test_fields_that_are_not_what_they_should_be(
    field: str, value: object, problem: str, saved: Path, tiny_spec: BackboneSpec, forge: Forge
) -> None:
    forge(saved, lambda data: data.update({field: value}))
    message = f"Cannot build the model of the artifact `{saved}`: {problem}"
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(saved, backbone=tiny_spec)


def test_a_message_about_a_million_classes_is_short(saved: Path, forge: Forge) -> None:
    forge(saved, lambda data: data.update(class_names=["a"] * 10**5))
    with pytest.raises(ArtifactError) as caught:
        load_artifact(saved)
    assert len(str(caught.value)) < 1000


def test_reordered_classes_are_found_by_the_digest(saved: Path, tiny_spec: BackboneSpec) -> None:
    content = saved.read_bytes()
    swapped = content.replace(rb"[\"ants\", \"bees\"]", rb"[\"bees\", \"ants\"]")
    assert swapped != content
    saved.write_bytes(swapped)
    message = (
        f"The artifact `{saved}` is damaged: its content does not match its digest. "
        f"Copy it anew from where it came."
    )
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(saved, backbone=tiny_spec)


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Note the largest tensor with memory that PyTorch makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.device.type == "cpu":
            self.numel = max(self.numel, made.numel())
        return made


LARGE = 10**9


def claim_head(data: dict[str, Any]) -> None:
    data["head"] = HeadSpec(kind="mlp", hidden=(LARGE,)).to_dict()


def claim_layers(data: dict[str, Any]) -> None:
    data["head"] = {**HeadSpec(kind="mlp").to_dict(), "hidden": [1] * 10**6}


CLAIMS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "features": (
        lambda data: data.update(num_features=LARGE),
        f"`head.weight` is torch.float32 (2, 16), expected torch.float32 (2, {LARGE}).",
    ),
    "width": (
        claim_head, "4 tensors are missing and 2 do not belong to it, among them "
        "`head.hidden.0.bias`.",
    ),
    "layers": (
        claim_layers, "`hidden` should have at most 32 widths, found 1000000 of them.",
    ),
    "images": (
        lambda data: data["preprocess"].update(crop_size=LARGE, resize_size=LARGE),
        f"The images of an artifact's model should have at most {MAX_IMAGE_VALUES} values after "
        f"resizing; 3 channels of {LARGE} x {LARGE} pixels are {3 * LARGE**2}.",
    ),
    "channels": (
        lambda data: data["preprocess"].update(mean=[0.5] * 10**4, std=[0.5] * 10**4),
        "none of its filters reads the 10000 channels of its images.",
    ),
    "backbone": (
        lambda data: data.update(backbone="vit_h_14"),
        "390 tensors are missing and 14 do not belong to it, among them "
        "`backbone.class_token`.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CLAIMS)
def test_no_memory_is_taken_for_what_the_file_does_not_hold(
    case: str, saved: Path, tiny_spec: BackboneSpec, forge: Forge
) -> None:
    change, problem = CLAIMS[case]
    forge(saved, change)
    register_backbone("tiny", lambda: tiny_spec)
    message = f"Cannot build the model of the artifact `{saved}`: {problem}"
    tracemalloc.start()
    try:
        with Peak() as peak, pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
            load_artifact(saved)
        # Some megabytes of JSON in one case; the least of the claims is gigabytes.
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()
        _BACKBONES.remove("tiny")
    assert 0 < peak.numel < 10**6


def test_a_network_that_asks_for_its_values_while_it_is_built(
    tiny_spec: BackboneSpec, tmp_path: Path
) -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(3, 4)
            self.first = self.last.weight[0, 0].item()

        def forward(self, images: Tensor) -> Tensor:
            features: Tensor = self.last(images.mean(dim=(2, 3)))
            return features

    spec = BackboneSpec(
        name="asking", build=Asking, num_features=4, preprocess=tiny_spec.preprocess
    )
    model = build_model(spec, 2, weights=None)
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=("a", "b"))
    register_backbone("asking", lambda: spec)
    try:
        load_artifact(path, strict=True)
    finally:
        _BACKBONES.remove("asking")


@pytest.mark.parametrize("num_channels", [1, 3, 5])
def test_registered_backbones_load_with_any_number_of_channels(
    num_channels: int, tiny_spec: BackboneSpec, tmp_path: Path
) -> None:
    model = build_model(tiny_spec, 2, weights=None, num_channels=num_channels)
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=("a", "b"))
    register_backbone("tiny", lambda: tiny_spec)
    try:
        assert load_artifact(path, strict=True).preprocess.num_channels == num_channels
    finally:
        _BACKBONES.remove("tiny")


# What would be refused is not written either


def test_an_empty_class_name(model: Classifier, tmp_path: Path) -> None:
    message = "A class name should not be empty, as that of class 0 is. Name it."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        save_artifact(tmp_path / "m.safetensors", model, class_names=("", "c"))


def test_images_that_are_too_large(tiny_spec: BackboneSpec, tmp_path: Path) -> None:
    preprocess = Preprocess(crop_size=32, resize_size=5000)
    model = build_model(tiny_spec, 2, weights=None, preprocess=preprocess)
    message = (
        f"The images of an artifact's model should have at most {MAX_IMAGE_VALUES} values after "
        f"resizing; 3 channels of 5000 x 5000 pixels are 75000000."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        save_artifact(tmp_path / "m.safetensors", model, class_names=("a", "b"))


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


@pytest.mark.parametrize(
    ("history", "problem"),
    [
        ({"a": nested(100)}, "it is nested deeper than 64 levels"),
        ({1: "a", "1": "b"}, "'<' not supported between instances of 'str' and 'int'"),
    ],
)
def test_history_that_readers_would_refuse(
    history: Any, problem: str, model: Classifier, tmp_path: Path
) -> None:
    message = f"The metadata of an artifact should be JSON data: {problem}."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        save_artifact(tmp_path / "m.safetensors", model, class_names=("a", "b"), history=history)
    assert list(tmp_path.iterdir()) == []


def test_names_of_tensors_that_readers_would_refuse(
    tiny_spec: BackboneSpec, tmp_path: Path
) -> None:
    network, dim = tiny_spec.build_features()
    network.register_parameter("a\nb", nn.Parameter(torch.zeros(1)))
    model = build_model(network, 2, num_features=dim)
    message = (
        "An artifact cannot be written so: a tensor has the strange name 'model.backbone.a\\nb'."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        save_artifact(tmp_path / "m.safetensors", model, class_names=("a", "b"))
    assert list(tmp_path.iterdir()) == []


# Damage at random


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path, object]:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    preprocess = Preprocess(crop_size=4, resize_size=4)
    model = build_model(network, 2, num_features=3, preprocess=preprocess)
    path = tmp_path_factory.mktemp("fuzz") / "m.safetensors"
    save_artifact(path, model, class_names=("a", "b"))
    return path.read_bytes(), path, load_small(path)


def load_small(path: Path) -> tuple[Any, ...]:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    loaded = load_artifact(path, backbone=network, self_test=False)
    state = {name: each.tolist() for name, each in loaded.model.state_dict().items()}
    return loaded.class_names, loaded.preprocess, loaded.history, loaded.versions, state


Damage = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 7)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
        st.tuples(st.just("double"), st.floats(0, 1), st.integers(1, 40)),
        st.tuples(st.just("byte"), st.floats(0, 1), st.integers(0, 255)),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=Damage, in_header=st.booleans())
def test_damage_gives_our_error_or_changes_nothing(
    damage: list[tuple[str, float, int]], in_header: bool, small: tuple[bytes, Path, object]
) -> None:
    content, path, expected = small
    damaged = bytearray(content)
    span = 8 + int.from_bytes(content[:8], "little") if in_header else len(content)
    for kind, share, number in damage:
        place = min(int(share * span), len(damaged) - 1)
        if kind == "flip":
            damaged[place] ^= 1 << number
        elif kind == "byte":
            damaged[place] = number
        elif kind == "double":
            damaged[place:place] = damaged[place : place + number]
        elif place:
            del damaged[place:]
    path.write_bytes(bytes(damaged))
    try:
        found = load_small(path)
    except ArtifactError:
        return
    assert found == expected


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.sampled_from(
        ["format_version", "backbone", "num_features", "class_names", "preprocess", "head",
         "freeze_plan", "weights_license", "history", "versions", "preprocess.crop_size",
         "preprocess.mean", "preprocess.decoder", "head.kind", "head.hidden", "head.dropout",
         "freeze_plan.patterns", "freeze_plan.bn", "freeze_plan.until"]
    ),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=5,
    ),
)  # fmt: skip
def test_other_values_give_our_error_or_a_model(
    place: str, value: Any, small: tuple[bytes, Path, object], forge: Forge
) -> None:
    content, path, _ = small
    path.write_bytes(content)

    def change(data: dict[str, Any]) -> None:
        outer, _, inner = place.partition(".")
        if inner:
            data[outer][inner] = value
        else:
            data[outer] = value

    forge(path, change)
    with suppress(ArtifactError):
        load_small(path)
