from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from transferkit.artifacts import load_artifact, read_info, save_artifact
from transferkit.artifacts.fit_summary import summarize_fit, wilson_interval
from transferkit.errors import ArtifactError
from transferkit.models import BackboneSpec, Classifier, HeadSpec, build_model
from transferkit.training import EpochRecord, History

Forge = Callable[..., None]

HISTORY = History(
    [
        EpochRecord(1, 0.7, 0.5, 0.6, 0.8, 0.01, 2.0),
        EpochRecord(2, 0.6, 0.6, 0.5, 0.9, 0.01, 2.0),
        EpochRecord(3, 0.5, 0.7, float("nan"), 0.9, 0.01, 2.0),
    ],
    settings={"name": "probe", "seed": 3, "num_train": 1234, "num_val": 40},
    seconds=75.0,
).to_dict()


@pytest.fixture
def with_history(model: Classifier, tmp_path: Path) -> Path:
    return save_artifact(
        tmp_path / "full.safetensors", model, class_names=("ants", "bees"), history=HISTORY
    )


def test_info(with_history: Path, model: Classifier) -> None:
    info = read_info(with_history)
    assert info.path == with_history
    assert info.num_bytes == with_history.stat().st_size
    assert info.format_version == 1
    assert re.fullmatch("[0-9a-f]{64}", info.digest)
    assert (info.verified, info.file_sha256) == (False, None)
    assert (info.backbone, info.head) == ("tiny", HeadSpec())
    assert info.num_values == sum(each.numel() for each in model.state_dict().values())
    assert info.num_tensors == len(model.state_dict())
    assert info.class_names == ("ants", "bees")
    assert info.preprocess == model.preprocess
    assert info.weights_license is None
    assert info.stages == ("decode", "preprocess", "model")
    assert "torch" in info.versions
    assert info.fit is not None
    assert (info.fit.num_epochs, info.fit.best_epoch) == (3, 2)
    assert info.fit.best_epoch == History.from_dict(HISTORY).best.epoch
    assert (info.fit.val_accuracy, info.fit.val_loss) == (0.9, 0.5)
    assert (info.fit.num_train, info.fit.num_val, info.fit.seed) == (1234, 40, 3)


def test_info_in_words(with_history: Path) -> None:
    info = read_info(with_history)
    versions = ", ".join(f"{name} {each}" for name, each in sorted(info.versions.items()))
    assert info.describe() == (
        f"{with_history}\n"
        f"  classes     2: ants, bees\n"
        f"  backbone    tiny\n"
        f"  head        linear\n"
        f"  pictures    3 channels, {info.preprocess.describe()}\n"
        f"  fit         best epoch 2 of 3: validation accuracy 0.9000 (95 % interval 0.7695 to "
        f"0.9604, 40 pictures), loss 0.5000, 1,234 training pictures, recipe probe, seed 3, "
        f"completed after 1 min 15 s\n"
        f"  size        {info.num_bytes:,} bytes, {info.num_values:,} numbers in 16 tensors of the "
        f"model\n"
        f"  format      version 1, self-test of decode, preprocess, model\n"
        f"  digest      {info.digest} (not verified)\n"
        f"  weights     the licence of those that training started from is not known\n"
        f"  written by  {versions}"
    )


def test_info_as_json(with_history: Path) -> None:
    data = read_info(with_history).to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["class_names"] == ["ants", "bees"]
    assert data["preprocess"]["crop_size"] == 32
    assert data["preprocess"]["in_words"].startswith("shorter side to 32")
    assert data["fit"]["best_epoch"] == 2
    assert data["fit"]["accuracy_interval"] == pytest.approx([0.7695, 0.9604], abs=1e-4)


def test_info_without_history(saved: Path) -> None:
    info = read_info(saved)
    assert info.fit is None
    assert info.to_dict()["fit"] is None
    assert "  fit         no history\n" in info.describe()


def test_info_of_another_head(tiny_spec: BackboneSpec, tmp_path: Path) -> None:
    head = HeadSpec(kind="mlp", hidden=(7, 1000), dropout=0.5)
    model = build_model(tiny_spec, 2, head=head, weights=None)
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=("a", "b"))
    assert "  head        MLP, hidden layers of 7, 1,000, dropout 0.5\n" in (
        read_info(path).describe()
    )


def test_info_of_many_classes(tiny_spec: BackboneSpec, tmp_path: Path) -> None:
    model = build_model(tiny_spec, 25, weights=None)
    names = [f"c{index}" for index in range(25)]
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=names)
    assert ", c18, c19 and 5 more\n" in read_info(path).describe()


def test_tensors_are_not_read_unless_it_is_to_be_verified(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(saved.read_bytes())
    content[-100] ^= 1
    saved.write_bytes(bytes(content))
    with monkeypatch.context() as patched:
        patched.setattr(safetensors, "safe_open", None)
        assert not read_info(saved).verified
    message = (
        f"The artifact `{saved}` is damaged: its content does not match its digest. "
        f"Copy it anew from where it came."
    )
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        read_info(saved, verify=True)


def test_verified(saved: Path) -> None:
    info = read_info(saved, verify=True)
    assert info.verified
    assert info.file_sha256 == hashlib.sha256(saved.read_bytes()).hexdigest()
    assert f"  digest      {info.digest} (the content agrees)\n" in info.describe()
    assert info.describe().endswith(f"  SHA-256     {info.file_sha256} (of the file)")


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("backbone", None, "its `backbone` should be a text, found None."),
        ("class_names", ["a", "a"], "`class_names` should be 2 different texts, one for each class "
         "of the model, found ['a', 'a']."),
        ("head", None, "`data` should be the mapping that `HeadSpec.to_dict` returns, found "
         "NoneType."),
    ],
)  # fmt: skip
def test_data_that_are_refused(
    field: str, value: object, problem: str, saved: Path, forge: Forge
) -> None:
    forge(saved, lambda data: data.update({field: value}))
    message = f"Cannot build the model of the artifact `{saved}`: {problem}"
    with pytest.raises(ArtifactError, match=f"^{re.escape(message)}$"):
        read_info(saved)


def test_nothing_in_the_file_moves_the_cursor(saved: Path, forge: Forge) -> None:
    forge(
        saved,
        lambda data: data.update(
            class_names=["\u202eants", "\ud800\x1b[2J"],
            versions={"\x1b[2J": "1\n2"},
            weights_license="a\rb",
        ),
    )
    text = read_info(saved).describe()
    assert all(line.isprintable() for line in text.split("\n"))
    assert "2: \\u202eants, \\ud800\\x1b[2J\n" in text
    assert "\\x1b[2J 1\\n2" in text
    assert "a\\rb" in text


# The licence of the weights


def test_licence_of_the_weights_is_kept(tiny_spec: BackboneSpec, tmp_path: Path) -> None:
    state = tiny_spec.build().state_dict()
    spec = replace(tiny_spec, load_weights=lambda: state, weights_license="Apache-2.0")
    model = build_model(spec, 2)
    assert model.weights_license == "Apache-2.0"
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=("a", "b"))
    assert read_info(path).weights_license == "Apache-2.0"
    assert (
        "  weights     licence of those that training started from: Apache-2.0\n"
        in read_info(path).describe()
    )
    again = save_artifact(path, load_artifact(path, backbone=spec).model, class_names=("a", "b"))
    assert read_info(again).weights_license == "Apache-2.0"


def test_weights_of_unknown_origin_have_no_licence(tiny_spec: BackboneSpec, tmp_path: Path) -> None:
    spec = replace(tiny_spec, weights_license="Apache-2.0")
    assert build_model(spec, 2, weights=None).weights_license is None
    path = tmp_path / "own.safetensors"
    safetensors.torch.save_file(spec.build().state_dict(), path)
    assert build_model(spec, 2, weights=path).weights_license is None


# The history


def record(**changes: Any) -> dict[str, Any]:
    return {"epoch": 1, "val_accuracy": 0.5, "val_loss": 1.0, **changes}


@pytest.mark.parametrize(
    "history",
    [
        None, {}, {"records": {}}, {"records": []}, {"records": [1, None, []]},
        {"records": [record(epoch="1")]}, {"records": [record(val_accuracy=2)]},
        {"records": [record(val_accuracy=True)]}, {"records": [record(val_accuracy=None)]},
        {"records": [record(val_accuracy=10**400)]}, {"records": [record(epoch=10**400)]},
    ],
)  # fmt: skip
def test_history_of_another_form(history: Any) -> None:
    assert summarize_fit(history) is None


def test_history_in_part() -> None:
    fit = summarize_fit(
        {
            "records": [record(val_loss=None), "?", record(epoch=2, val_loss="?")],
            "settings": {"num_val": -1, "seed": 0.5, "name": 3, "num_train": True},
            "seconds": "long",
            "status": 4,
        }
    )
    assert fit is not None
    assert (fit.num_epochs, fit.best_epoch, fit.val_loss) == (2, 1, None)
    rest = (fit.num_train, fit.num_val, fit.recipe, fit.seed, fit.seconds, fit.status)
    assert rest == (None,) * 6
    assert fit.accuracy_interval is None
    assert summarize_fit({"records": [record()], "settings": []}) is not None


def test_interval_against_values_of_the_literature() -> None:
    # Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I, method 3.
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0 / 20, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1 / 29, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
