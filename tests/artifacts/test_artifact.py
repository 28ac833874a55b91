from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from transferkit.artifacts import FORMAT_VERSION, load_artifact, save_artifact
from transferkit.artifacts import format as artifact_format
from transferkit.errors import ArtifactError, ConfigError, OutputError
from transferkit.images import Preprocess
from transferkit.models import (
    BackboneSpec,
    Classifier,
    FreezePlan,
    HeadSpec,
    build_model,
    register_backbone,
)
from transferkit.models.registry import _BACKBONES

NAMES = ("ants", "bees")


def read_metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return dict(json.loads(file.metadata()["transferkit"]))


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write the artifact anew with changed metadata and a digest that fits."""
    tensors = safetensors.torch.load_file(path)
    data = read_metadata(path)
    change(data)
    text = json.dumps(data)
    metadata = {
        "transferkit": text,
        "transferkit_sha256": artifact_format._digest(tensors, text),
    }
    safetensors.torch.save_file(tensors, path, metadata=metadata)


def test_round_trip(model: Classifier, tiny_spec: BackboneSpec, tmp_path: Path) -> None:
    path = save_artifact(
        tmp_path / "m.safetensors", model, class_names=NAMES, history={"records": []}
    )
    loaded = load_artifact(path, backbone=tiny_spec)
    images = torch.rand(2, 3, 32, 32)
    model.eval()
    assert torch.equal(loaded.model(images), model(images))
    assert loaded.class_names == NAMES
    assert loaded.preprocess == model.preprocess
    assert loaded.model.freeze_plan == model.freeze_plan
    assert loaded.history == {"records": []}
    assert "torch" in loaded.versions
    assert not loaded.model.training


def test_saving_leaves_the_model_alone(model: Classifier, tmp_path: Path) -> None:
    model.train()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    save_artifact(tmp_path / "m.safetensors", model, class_names=NAMES)
    assert model.training
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


def test_metadata_is_the_documented_one(saved: Path) -> None:
    data = read_metadata(saved)
    assert set(data) == {
        "format_version", "backbone", "num_features", "class_names", "preprocess",
        "head", "freeze_plan", "weights_license", "history", "versions",
    }  # fmt: skip
    assert data["format_version"] == 1


@pytest.mark.parametrize(
    "names",
    [
        ("a\nb", "c d"),
        ("\x1b[2J", "\r"),
        ("Ämeise", "蜂"),
        ("'; --", '"'),
        ("10", "9"),
        ("\ud83d\udc1d", "x"),
    ],
)
def test_class_names_round_trip(
    names: tuple[str, str], model: Classifier, tiny_spec: BackboneSpec, tmp_path: Path
) -> None:
    names = tuple(name.encode("utf-16", "surrogatepass").decode("utf-16") for name in names)  # type: ignore[assignment]
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=names)
    assert load_artifact(path, backbone=tiny_spec).class_names == names


def test_class_names_of_folders_in_no_encoding(
    model: Classifier, tiny_spec: BackboneSpec, tmp_path: Path
) -> None:
    names = ("M\udcfcnchen", "Bern")  # As Python reads the bytes of a name in Latin-1.
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=names)
    assert load_artifact(path, backbone=tiny_spec).class_names == names


def test_built_in_backbone_needs_nothing_else(tmp_path: Path) -> None:
    model = build_model("mnasnet0_5", 2, weights=None)
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=NAMES)
    images = torch.rand(2, 3, 64, 64)
    model.eval()
    assert torch.equal(load_artifact(path).model(images), model(images))


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(48, 48)
            self.second = nn.Linear(48, 48)
            self.second.weight = self.first.weight

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = self.second(self.first(images.flatten(1)))
            return features

    preprocess = Preprocess(crop_size=4, resize_size=4)
    model = build_model(Tied(), 2, num_features=48, preprocess=preprocess)
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=NAMES)
    loaded = load_artifact(path, backbone=Tied())
    assert torch.equal(loaded.model.backbone.first.weight, model.backbone.first.weight)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("names", [("a",), ("a", "a"), ("a", 1), ("a", "b", "c")])
def test_class_names_are_checked(names: Any, model: Classifier, tmp_path: Path) -> None:
    message = (
        f"`class_names` should be 2 different texts, one for each class of the model, "
        f"found {list(names)}."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        save_artifact(tmp_path / "m.safetensors", model, class_names=names)
    assert list(tmp_path.iterdir()) == []


def test_history_that_is_no_json(model: Classifier, tmp_path: Path) -> None:
    message = (
        "The metadata of an artifact should be JSON data: "
        "Object of type set is not JSON serializable."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        save_artifact(tmp_path / "m.safetensors", model, class_names=NAMES, history={"a": {1}})
    assert list(tmp_path.iterdir()) == []


def test_broken_weights_are_not_saved(model: Classifier, tmp_path: Path) -> None:
    nn.init.constant_(model.head.get_parameter("weight"), float("nan"))
    message = (
        "The model's logits are not finite (NaN or infinite): its weights are broken, and an "
        "artifact of it would be of no use. Train again, perhaps with a smaller `lr`."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        save_artifact(tmp_path / "m.safetensors", model, class_names=NAMES)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(
    model: Classifier, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    message = (
        f"Cannot write `{saved}`: no space left on device. "
        f"Choose a place that you may write to and that has room."
    )
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        save_artifact(saved, model, class_names=NAMES)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_the_file_has_the_usual_rights(saved: Path) -> None:
    plain = saved.parent / "plain"
    plain.touch()
    assert saved.stat().st_mode == plain.stat().st_mode


def test_a_device_is_not_replaced_by_a_file(model: Classifier) -> None:
    message = f"Cannot write `{os.devnull}`: it is no regular file. Give a file name."
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        save_artifact(os.devnull, model, class_names=NAMES)
    assert not Path(os.devnull).is_file()


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    message = f"The artifact `{path}` does not exist. Expected a .safetensors file."
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(path)
    message = f"The artifact `{tmp_path}` is a folder. Expected a .safetensors file."
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_truncated(saved: Path, tiny_spec: BackboneSpec, share: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        ArtifactError,
        match=rf"^Cannot read the artifact `{re.escape(str(saved))}`: it is no safetensors file, "
        rf"or is truncated or damaged \(.+\)\.$",
    ):
        load_artifact(saved, backbone=tiny_spec)


def test_every_flipped_bit_is_found(saved: Path, tiny_spec: BackboneSpec) -> None:
    content = saved.read_bytes()
    for position in range(0, len(content), max(1, len(content) // 150)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        saved.write_bytes(bytes(damaged))
        with pytest.raises(ArtifactError):
            load_artifact(saved, backbone=tiny_spec, self_test=False)


def test_flipped_bit_in_the_weights(saved: Path, tiny_spec: BackboneSpec) -> None:
    content = bytearray(saved.read_bytes())
    content[-100] ^= 1
    saved.write_bytes(bytes(content))
    message = (
        f"The artifact `{saved}` is damaged: its content does not match its digest. "
        f"Copy it anew from where it came."
    )
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(saved, backbone=tiny_spec)


def test_safetensors_that_is_no_artifact(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    message = (
        f"`{path}` is a safetensors file but no transferkit artifact: its metadata has no "
        f"`transferkit`. Expected a file written by `Trainer.save`."
    )
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(path)


def test_newer_format(saved: Path, tiny_spec: BackboneSpec) -> None:
    rewrite(saved, lambda data: data.update(format_version=FORMAT_VERSION + 1))
    message = (
        f"The artifact `{saved}` has format version {FORMAT_VERSION + 1}; this transferkit reads "
        f"up to {FORMAT_VERSION}. Upgrade transferkit: pip install --upgrade transferkit"
    )
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(saved, backbone=tiny_spec)


@pytest.mark.parametrize("version", [0, "1", None, True])
def test_senseless_format_version(saved: Path, tiny_spec: BackboneSpec, version: object) -> None:
    rewrite(saved, lambda data: data.update(format_version=version))
    message = f"The artifact `{saved}` is damaged: its format version is {version!r}."
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(saved, backbone=tiny_spec)


def test_metadata_that_is_no_json(saved: Path) -> None:
    tensors = safetensors.torch.load_file(saved)
    safetensors.torch.save_file(
        tensors, saved, metadata={"transferkit": "hello", "transferkit_sha256": ""}
    )
    message = (
        f"The artifact `{saved}` is damaged: its metadata is no JSON "
        f"(Expecting value: line 1 column 1 (char 0))."
    )
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(saved)


def test_unknown_backbone_names_what_to_register(saved: Path) -> None:
    message = (
        f"The artifact `{saved}` needs the backbone `tiny`, which is not registered here. "
        f"Call `register_backbone` with that name first, or pass `backbone=`."
    )
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(saved)


def test_registered_backbone_is_found(saved: Path, tiny_spec: BackboneSpec) -> None:
    register_backbone("tiny", lambda: tiny_spec)
    try:
        assert load_artifact(saved).model.backbone_name == "tiny"
    finally:
        _BACKBONES.remove("tiny")


@pytest.mark.parametrize("key", ["class_names", "preprocess", "freeze_plan", "versions"])
def test_missing_field(saved: Path, tiny_spec: BackboneSpec, key: str) -> None:
    rewrite(saved, lambda data: data.pop(key))
    message = f"Cannot build the model of the artifact `{saved}`: its metadata has no `{key}`."
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(saved, backbone=tiny_spec)


def test_another_architecture_under_the_same_name(saved: Path, tiny_spec: BackboneSpec) -> None:
    other = BackboneSpec(
        name="tiny", build=nn.Flatten, num_features=48, preprocess=tiny_spec.preprocess
    )
    message = (
        f"Cannot build the model of the artifact `{saved}`: 0 tensors are missing and 14 do not "
        f"belong to it, among them `backbone.bn1.bias`."
    )
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(saved, backbone=other)


def test_misshapen_tensor(tiny_spec: BackboneSpec, saved: Path) -> None:
    rewrite(saved, lambda data: data.update(class_names=["a", "b", "c"]))
    message = (
        f"Cannot build the model of the artifact `{saved}`: `head.weight` is torch.float32 "
        f"(2, 16), expected torch.float32 (3, 16)."
    )
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(saved, backbone=tiny_spec)


@pytest.mark.parametrize("num_channels", [1, 3, 5])
def test_other_numbers_of_channels_round_trip(
    num_channels: int, tiny_spec: BackboneSpec, tmp_path: Path
) -> None:
    model = build_model(
        tiny_spec, 2, weights=None, freeze="backbone.layer1.*", num_channels=num_channels
    )
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=NAMES)
    tensors = safetensors.torch.load_file(path)
    assert tensors["self_test.images"].shape == (2, num_channels, 48, 40)
    loaded = load_artifact(path, backbone=tiny_spec)
    assert loaded.preprocess == model.preprocess
    assert loaded.preprocess.num_channels == num_channels
    assert loaded.model.freeze_plan == model.freeze_plan
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)


def test_backbone_that_cannot_be_adapted_on_loading(
    tiny_spec: BackboneSpec, tmp_path: Path
) -> None:
    model = build_model(tiny_spec, 2, weights=None, num_channels=1)
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=NAMES)
    other = BackboneSpec(
        name="tiny", build=nn.Flatten, num_features=16, preprocess=tiny_spec.preprocess
    )
    message = (
        f"Cannot build the model of the artifact `{path}`: Backbone `tiny` cannot be adapted to "
        f"1 channel: it has no 2-D convolution that reads the images. Take another one, such as "
        f"`resnet18`, or leave `num_channels` out: grey pictures are then read as RGB."
    )
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(path, backbone=other)


def test_own_network_of_another_number_of_channels(tiny_spec: BackboneSpec, tmp_path: Path) -> None:
    model = build_model(tiny_spec, 2, weights=None, num_channels=1)
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=NAMES)
    network, _ = tiny_spec.build_features()
    message = (
        f"Cannot build the model of the artifact `{path}`: `backbone.conv1.weight` is "
        f"torch.float32 (8, 1, 3, 3), expected torch.float32 (8, 3, 3, 3)."
    )
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(path, backbone=network)


# Heads


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("options", [{}, {"kind": "mlp", "hidden": (7, 5)}, {"kind": "cosine"}])
def test_heads_round_trip(
    options: dict[str, Any], dropout: float, tiny_spec: BackboneSpec, tmp_path: Path
) -> None:
    spec = HeadSpec(dropout=dropout, **options)
    model = build_model(tiny_spec, 2, head=spec, weights=None)
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=NAMES)
    assert read_metadata(path)["head"] == spec.to_dict()
    loaded = load_artifact(path, backbone=tiny_spec).model
    assert loaded.head_spec == spec
    assert type(loaded.head) is type(model.head)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), model.eval()(images))


@pytest.mark.parametrize(
    ("head", "freeze", "bn", "version"),
    [
        ("linear", "backbone", "adapt", 1),
        ("linear", "none", "fixed", 1),
        (HeadSpec(dropout=0.5), "none", "frozen", 2),
        ("mlp", "none", "frozen", 2),
        ("cosine", "none", "frozen", 2),
        ("linear", "until:conv1", "frozen", 2),
        ("linear", "backbone", "train", 2),
    ],
)
def test_version_is_the_lowest_whose_readers_understand_the_file(
    head: Any, freeze: Any, bn: Any, version: int, tiny_spec: BackboneSpec, tmp_path: Path
) -> None:
    model = build_model(tiny_spec, 2, head=head, freeze=freeze, bn=bn, weights=None)
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=NAMES)
    assert read_metadata(path)["format_version"] == version
    loaded = load_artifact(path, backbone=tiny_spec).model
    assert loaded.freeze_plan == model.freeze_plan


def test_file_from_before_there_were_other_heads(
    saved: Path, model: Classifier, tiny_spec: BackboneSpec
) -> None:
    rewrite(saved, lambda data: (data.pop("head"), data["freeze_plan"].pop("until")))
    loaded = load_artifact(saved, backbone=tiny_spec).model
    assert loaded.head_spec == HeadSpec()
    assert loaded.freeze_plan == FreezePlan(("backbone.layer1.*",))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), model.eval()(images))


def test_version_2_without_its_head(saved: Path, tiny_spec: BackboneSpec) -> None:
    rewrite(saved, lambda data: (data.pop("head"), data.update(format_version=2)))
    message = f"Cannot build the model of the artifact `{saved}`: its metadata has no `head`."
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(saved, backbone=tiny_spec)


FIELDS = "['dropout', 'hidden', 'kind', 'scale']"


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        (None, "`data` should be the mapping that `HeadSpec.to_dict` returns, found NoneType."),
        ({"kind": "mlp"}, f"A head description should have the fields {FIELDS}, "
         "found ['kind']."),
        ({**HeadSpec().to_dict(), "kind": {}}, "`kind` of a head should be "
         '"linear", "mlp" or "cosine", found {}.'),
        ({**HeadSpec().to_dict(), "dropout": 1.5},
         "`dropout` should be a finite number in [0, 1), the share to drop, found 1.5."),
        ({**HeadSpec(kind="cosine").to_dict(), "scale": -1.0},
         "`scale` should be a finite number above 0, found -1.0."),
        (HeadSpec(kind="cosine").to_dict(), "1 tensors are missing and 1 do not belong to it, "
         "among them `head.scale`."),
        (HeadSpec(kind="mlp", hidden=(10**12,)).to_dict(), "4 tensors are missing and 2 do not "
         "belong to it, among them `head.hidden.0.bias`."),
    ],
)  # fmt: skip
def test_description_of_a_head_that_cannot_be(
    head: Any, problem: str, saved: Path, tiny_spec: BackboneSpec
) -> None:
    rewrite(saved, lambda data: data.update(head=head))
    message = f"Cannot build the model of the artifact `{saved}`: {problem}"
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(saved, backbone=tiny_spec)


def test_widths_that_the_tensors_do_not_have_take_no_memory(
    tiny_spec: BackboneSpec, tmp_path: Path
) -> None:
    model = build_model(tiny_spec, 2, head=HeadSpec(kind="mlp", hidden=(4,)), weights=None)
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=NAMES)
    rewrite(path, lambda data: data["head"].update(hidden=[10**12]))
    message = (
        f"Cannot build the model of the artifact `{path}`: `head.hidden.0.weight` is "
        f"torch.float32 (4, 16), expected torch.float32 (1000000000000, 16)."
    )
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(path, backbone=tiny_spec)


def test_values_that_nobody_expects(saved: Path) -> None:
    head = {**HeadSpec(kind="cosine").to_dict(), "scale": 10**400}
    rewrite(saved, lambda data: data.update(head=head))
    message = (
        f"The artifact `{saved}` is incomplete or inconsistent "
        f"(OverflowError: int too large to convert to float)."
    )
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(saved)


def test_stage_that_the_backbone_does_not_have(saved: Path, tiny_spec: BackboneSpec) -> None:
    rewrite(saved, lambda data: data["freeze_plan"].update(patterns=[], until="layer9"))
    message = (
        f"Cannot build the model of the artifact `{saved}`: Unknown stage `layer9`. Did you mean "
        f"`layer1`? `[stage.name for stage in model.stages]` names all 2."
    )
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        load_artifact(saved, backbone=tiny_spec)


def test_pretrained_head_is_not_in_the_file(tiny_spec: BackboneSpec, tmp_path: Path) -> None:
    state = tiny_spec.build().state_dict()
    spec = replace(tiny_spec, load_weights=lambda: state, class_names=tuple(map(str, range(10))))
    model = build_model(spec, 2)
    assert model.pretrained_head is not None
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=NAMES)
    assert set(safetensors.torch.load_file(path)) == {
        *(f"model.{name}" for name in model.state_dict()),
        "self_test.images", "self_test.preprocessed", "self_test.model_logits", "self_test.logits",
        "self_test.jpeg", "self_test.jpeg_pixels", "self_test.png", "self_test.png_pixels",
    }  # fmt: skip
    assert load_artifact(path, backbone=spec).model.pretrained_head is None
