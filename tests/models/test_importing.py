from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision import models

from transferkit.artifacts import load_artifact, save_artifact
from transferkit.errors import ConfigError, UnknownNameError, WeightsError
from transferkit.images import Preprocess
from transferkit.models import BackboneSpec, import_model
from transferkit.models.state_dicts import strip_prefixes

NAMES = ["ants", "bees"]


def make_resnet(num_classes: int = 2) -> nn.Module:
    torch.manual_seed(3)
    network: nn.Module = models.resnet18(num_classes=num_classes).eval()
    return network


def write(content: Any, folder: Path, name: str = "weights.pth") -> Path:
    path = folder / name
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(dict(content), path)
    else:
        torch.save(content, path)
    return path


def assert_same_logits(model: nn.Module, network: nn.Module, size: int = 64) -> None:
    images = torch.randn(3, 3, size, size)
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(images), network.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("extension", [".pth", ".pt", ".safetensors"])
def test_trained_network_becomes_an_artifact(extension: str, tmp_path: Path) -> None:
    network = make_resnet()
    path = write(network.state_dict(), tmp_path, f"weights{extension}")
    model = import_model("resnet18", path, class_names=NAMES)
    assert_same_logits(model, network)
    artifact = save_artifact(tmp_path / "artifact.safetensors", model, class_names=NAMES)
    assert_same_logits(load_artifact(artifact).model, network)


@pytest.mark.parametrize(
    "name", ["densenet121", "mobilenet_v3_small", "shufflenet_v2_x0_5", "swin_t"]
)
def test_networks_of_torchvision(name: str, tmp_path: Path) -> None:
    network = models.get_model(name, weights=None, num_classes=3)
    path = write(network.state_dict(), tmp_path)
    model = import_model(name, path, class_names=["a", "b", "c"])
    assert_same_logits(model, network)


@pytest.mark.parametrize(("name", "size"), [("resnet10t", 64), ("vit_tiny_patch16_224", 224)])
def test_networks_of_timm(name: str, size: int, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model(name, pretrained=False, num_classes=2)
    path = write(network.state_dict(), tmp_path, "weights.safetensors")
    assert_same_logits(import_model(f"timm:{name}", path, class_names=NAMES), network, size)


def test_efficientnet_lite0_of_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=2)
    path = write(network.state_dict(), tmp_path)
    assert_same_logits(import_model("efficientnet_lite0", path, class_names=NAMES), network)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        lambda network: nn.DataParallel(nn.ModuleDict({"_orig_mod": network})),
        lambda network: nn.ModuleDict({"model": network}),
    ],
    ids=["DataParallel", "compile", "both", "Lightning"],
)
def test_prefixes_of_wrappers_are_taken_off(wrap: Any, tmp_path: Path) -> None:
    network = make_resnet()
    path = write(wrap(network).state_dict(), tmp_path)
    assert_same_logits(import_model("resnet18", path, class_names=NAMES), network)


def test_prefixes_keep_the_versions_of_modules() -> None:
    network = models.mnasnet0_5()
    wrapped = nn.DataParallel(network).state_dict()
    found: Any = strip_prefixes(wrapped, network.state_dict())
    expected: Any = network.state_dict()
    assert list(found) == list(expected)
    assert dict(found._metadata) == dict(expected._metadata)


def test_prefixes_that_are_the_networks_own_stay() -> None:
    state = {"model.0.weight": torch.zeros(1)}
    assert strip_prefixes(state, ["model.0.weight"]) is state
    state = {"module.0.weight": torch.zeros(1), "0.bias": torch.zeros(1)}
    assert strip_prefixes(state, ["0.weight", "0.bias"]) is state


@pytest.mark.parametrize("key", ["state_dict", "model", "anything"])
def test_checkpoints_with_one_state_dict(key: str, tmp_path: Path) -> None:
    network = make_resnet()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    content = {
        "epoch": 3, key: network.state_dict(), "optimizer": optimizer.state_dict(),
        "scaler": {}, "best": torch.tensor(0.5),
    }  # fmt: skip
    path = write(content, tmp_path)
    assert_same_logits(import_model("resnet18", path, class_names=NAMES), network)


def test_files_that_would_run_code_are_not_opened(tmp_path: Path) -> None:
    path = write(make_resnet(), tmp_path)
    message = (
        f"Cannot read the weights file `{path}`: it is damaged, or holds more than tensors "
        f"(UnpicklingError). Expected a state dict."
    )
    with pytest.raises(WeightsError, match=f"^{re.escape(message)}$"):
        import_model("resnet18", path, class_names=NAMES)


def test_head_may_lie_behind_dropout(tmp_path: Path) -> None:
    network: Any = make_resnet()
    network.fc = nn.Sequential(nn.Dropout(0.5), nn.Linear(512, 2))
    path = write(network.state_dict(), tmp_path)
    assert_same_logits(import_model("resnet18", path, class_names=NAMES), network)


def test_head_without_a_bias(tmp_path: Path) -> None:
    network: Any = make_resnet()
    network.fc = nn.Linear(512, 2, bias=False)
    path = write(network.state_dict(), tmp_path)
    assert_same_logits(import_model("resnet18", path, class_names=NAMES), network)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    network = make_resnet().half()
    path = write(network.state_dict(), tmp_path)
    model = import_model("resnet18", path, class_names=NAMES)
    assert all(each.dtype == torch.float32 for each in model.parameters())
    assert_same_logits(model, network.float())


def test_side_heads_are_passed_over(tmp_path: Path) -> None:
    network = models.googlenet(
        weights=None, num_classes=2, init_weights=False, transform_input=True
    )
    path = write(network.state_dict(), tmp_path)
    assert_same_logits(import_model("googlenet", path, class_names=NAMES), network)


def test_preprocessing_of_ones_own(tmp_path: Path) -> None:
    path = write(make_resnet().state_dict(), tmp_path)
    preprocess = Preprocess(crop_size=128, resize_size=128)
    model = import_model("resnet18", path, class_names=NAMES, preprocess=preprocess)
    assert model.preprocess == preprocess


def test_random_state_stays(tmp_path: Path) -> None:
    path = write(make_resnet().state_dict(), tmp_path)
    before = torch.get_rng_state()
    import_model("resnet18", path, class_names=NAMES)
    assert torch.equal(torch.get_rng_state(), before)


# What does not fit

NEW_HEAD = "`build_model(..., weights=PATH)` takes the rest of them and a new head."


def changed(change: Any) -> Mapping[str, Tensor]:
    network: Any = make_resnet()
    change(network)
    state: Mapping[str, Tensor] = network.state_dict()
    return state


def drop_head(network: Any) -> None:
    network.fc = nn.Identity()


def deepen_head(network: Any) -> None:
    network.fc = nn.Sequential(nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (drop_head, "none"),
        (
            deepen_head,
            "fc.0.weight (8, 512), fc.0.bias (8,), fc.2.weight (2, 8), ...",
        ),
    ],
)
def test_heads_that_are_no_linear_layer(change: Any, found: str, tmp_path: Path) -> None:
    path = write(changed(change), tmp_path)
    message = (
        f"The weights should have one linear layer for a head, at `fc`, the last of the backbone "
        f"`resnet18`; tensors of a head are {found}. {NEW_HEAD}"
    )
    with pytest.raises(WeightsError, match=f"^{re.escape(message)}$"):
        import_model("resnet18", path, class_names=NAMES)


def test_heads_for_other_classes(tmp_path: Path) -> None:
    path = write(make_resnet(5).state_dict(), tmp_path)
    message = (
        "The last layer of the weights has a weight (5, 512) and a bias (5,); expected (2, 512) "
        "and (2,), a row of 512 features for each of 2 `class_names`. `build_model(..., "
        "weights=PATH)` takes the weights with a new head."
    )
    with pytest.raises(WeightsError, match=f"^{re.escape(message)}$"):
        import_model("resnet18", path, class_names=NAMES)


def test_a_convolution_before_a_relu_is_no_linear_head(tmp_path: Path) -> None:
    path = write(models.squeezenet1_1(num_classes=2).state_dict(), tmp_path)
    with pytest.raises(WeightsError, match=r"^The last layer of the weights has a weight \(2, 512"):
        import_model("squeezenet1_1", path, class_names=NAMES)


def test_weights_of_another_network(tmp_path: Path) -> None:
    state = dict(make_resnet().state_dict())
    del state["bn1.bias"]
    state |= {"conv1.weight": torch.zeros(64, 1, 7, 7), "extra.weight": torch.zeros(1)}
    path = write(state, tmp_path)
    message = (
        "The weights do not fit the backbone `resnet18`: 1 missing (bn1.bias); 1 unexpected "
        "(extra.weight); 1 misshapen (conv1.weight (64, 1, 7, 7) instead of (64, 3, 7, 7)). "
        "Expected a state dict of this very architecture."
    )
    with pytest.raises(WeightsError, match=f"^{re.escape(message)}$"):
        import_model("resnet18", path, class_names=NAMES)


@pytest.mark.parametrize("names", [["ants"], ["ants", "ants"], ["ants", 1], "ab", []])
def test_class_names_that_cannot_work(names: Any, tmp_path: Path) -> None:
    message = (
        f"`class_names` should be at least 2 different texts, in the order of the rows of the "
        f"last layer, found {names!r}."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        import_model("resnet18", tmp_path / "weights.pth", class_names=names)


def test_backbones_that_are_none(tmp_path: Path) -> None:
    network: Any = nn.Flatten()
    message = "`backbone` should be a name or a BackboneSpec, found Flatten."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        import_model(network, tmp_path / "weights.pth", class_names=NAMES)
    with pytest.raises(UnknownNameError):
        import_model("resnet-18", tmp_path / "weights.pth", class_names=NAMES)


def test_weights_are_not_adapted(tiny_spec: BackboneSpec, tmp_path: Path) -> None:
    grey = Preprocess(crop_size=32, resize_size=32, mean=(0.5,), std=(0.5,))
    message = (
        "`preprocess` gives 1 channels, the backbone `tiny` reads 3. An import does not adapt "
        "weights; `build_model(..., weights=PATH)` does, with a new head."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        import_model(tiny_spec, tmp_path / "weights.pth", class_names=NAMES, preprocess=grey)
