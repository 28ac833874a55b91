from __future__ import annotations

import copy
import platform
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.models.test_folding import difference, noise, settle
from torch import Tensor, nn

from transferkit.models import build_model, fusing
from transferkit.models.engines import make_engine
from transferkit.models.folding import fold_batch_norms
from transferkit.models.fusing import (
    FusedConvolution,
    fuse_convolutions,
    has_fused_convolutions,
)
from transferkit.models.tracing import copy_modules

needs_onednn = pytest.mark.skipif(
    not has_fused_convolutions(), reason="this PyTorch has no oneDNN to fuse with"
)


@pytest.fixture
def _tried_anew() -> Iterator[None]:
    """What was found to be there is looked for again, and once more after the test."""
    has_fused_convolutions.cache_clear()
    yield
    has_fused_convolutions.cache_clear()


def count_activations(network: nn.Module) -> int:
    kinds = tuple(fusing._ATTRIBUTES)
    return sum(isinstance(each, kinds) for each in network.modules())


# How many convolutions are replaced, and how many activations are gone.
FAMILIES = {
    "resnet18": (20, 1),
    "mobilenet_v3_small": (52, 32),
    "densenet121": (120, 59),
    "squeezenet1_1": (25, 25),
    "efficientnet_b0": (81, 49),
    "convnext_tiny": (22, 0),
}


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="may lack oneDNN"
)
def test_linux_on_x86_has_them() -> None:
    assert has_fused_convolutions()
    engine = make_engine(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), device=torch.device("cpu"))
    assert engine.describe()["num_fused"] == 1


@pytest.mark.usefixtures("_tried_anew")
def test_what_the_caller_computes_in_does_not_matter() -> None:
    expected, state = has_fused_convolutions(), torch.get_rng_state()
    for each in (torch.float64, torch.bfloat16):
        has_fused_convolutions.cache_clear()
        torch.set_default_dtype(each)
        try:
            with torch.autocast("cpu", torch.bfloat16):
                assert has_fused_convolutions() is expected
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


@needs_onednn
@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_networks_compute_the_same(name: str) -> None:
    network = settle(build_model(name, 2, weights=None).backbone)
    fused = copy.deepcopy(network)
    fold_batch_norms(fused)
    before = count_activations(fused)
    num_fused = fuse_convolutions(fused)
    assert (num_fused, before - count_activations(fused)) == FAMILIES[name]
    for images in (noise(64), noise(50, 1)):
        assert difference(network, fused, images) < 1e-4


@needs_onednn
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet26d", "mobilenetv3_small_050"])
def test_timm_networks_compute_the_same(name: str) -> None:
    timm = pytest.importorskip("timm")
    network = settle(timm.create_model(name, pretrained=False, num_classes=0))
    fused = copy.deepcopy(network)
    fold_batch_norms(fused)
    before = count_activations(fused)
    assert fuse_convolutions(fused) > 0
    assert count_activations(fused) < before
    for images in (noise(64), noise(50, 3)):
        assert difference(network, fused, images) < 1e-4


ACTIVATIONS = [
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.Hardtanh(-1, 2),
    nn.LeakyReLU(0.2),
    nn.Hardswish(),
    nn.SiLU(inplace=True),
]


@needs_onednn
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"groups": 4}, {"stride": (2, 1), "padding": (0, 2), "dilation": 2}],
    ids=repr,
)
def test_activations_are_applied_by_convolutions(
    activation: nn.Module, options: dict[str, Any]
) -> None:
    layers = nn.Conv2d(8, 12, 3, **options), nn.Identity(), activation, nn.Conv2d(12, 4, 1)
    network = settle(nn.Sequential(*layers))
    fused = copy.deepcopy(network)
    assert fuse_convolutions(fused) == 2
    kinds = [type(each) for each in fused]
    assert kinds == [FusedConvolution, nn.Identity, nn.Identity, FusedConvolution]
    assert difference(network, fused, torch.ones(8, 9, 9)) < 1e-5
    for size, count in ((9, 2), (16, 1), (16, 5)):
        draw = torch.Generator().manual_seed(size)
        images = 3 * torch.randn(count, 8, size, size, generator=draw)
        assert difference(network, fused, images) < 1e-5
        assert difference(network, fused, images.contiguous(memory_format=torch.channels_last)) < (
            1e-5
        )


class Called(nn.Module):
    """Layers that are called in a way of their own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 3, 1)
        self.act = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.conv(images)
        if self.kind == "convolution twice":
            x = self.conv(x)
        outputs: Tensor = self.act(x)
        if self.kind == "branch":
            return outputs + x
        if self.kind == "activation twice":
            outputs = self.act(outputs - 0.1)
        if self.kind == "attributes":
            return outputs * self.conv.kernel_size[0] * self.conv.out_channels
        return outputs


@needs_onednn
@pytest.mark.parametrize(
    ("kind", "kinds"),
    [
        ("branch", [FusedConvolution, nn.ReLU]),
        ("activation twice", [FusedConvolution, nn.ReLU]),
        ("attributes", [FusedConvolution, nn.Identity]),
        ("convolution twice", [nn.Conv2d, nn.ReLU]),
    ],
)
def test_activations_that_others_see_stay(kind: str, kinds: list[type[nn.Module]]) -> None:
    network = settle(Called(kind))
    fused = copy.deepcopy(network)
    fuse_convolutions(fused)
    assert [type(fused.conv), type(fused.act)] == kinds
    assert difference(network, fused, noise(4)) < 1e-6


class OwnReLU(nn.ReLU):
    """Computes what no ReLU does."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + 1


@needs_onednn
def test_what_onednn_would_compute_otherwise_stays() -> None:
    hooked = nn.Conv2d(3, 4, 3)
    hooked.register_forward_hook(lambda *arguments: arguments[2] * 2)
    for layers, count in (
        ((hooked, nn.ReLU()), 0),
        ((nn.Conv2d(3, 4, 3, padding="same"), nn.ReLU()), 0),
        ((nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU()), 0),
        ((nn.Conv2d(3, 4, 3), OwnReLU()), 1),
        ((nn.Conv2d(3, 4, 3), nn.GELU()), 1),
    ):
        network = settle(nn.Sequential(*layers))
        fused = copy.deepcopy(network)
        assert fuse_convolutions(fused) == count
        assert type(fused[1]) is type(layers[1])
        assert difference(network, fused, noise(8)) < 1e-6
    for name in ("forward", "_conv_forward"):
        patched = nn.Conv2d(3, 4, 3)
        setattr(patched, name, lambda images, *_: images.flip(1))
        assert fuse_convolutions(nn.Sequential(patched, nn.ReLU())) == 0
        assert fold_batch_norms(nn.Sequential(patched, nn.BatchNorm2d(4)).eval()) == 0
    act = nn.ReLU()
    act.forward = torch.tanh  # type: ignore[method-assign]
    network = nn.Sequential(nn.Conv2d(3, 4, 3), act)
    assert (fuse_convolutions(network), network[1]) == (1, act)
    half = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).to(torch.bfloat16)
    assert fuse_convolutions(half) == 0


@needs_onednn
def test_copies_share_weights_in_the_order_of_the_kernels() -> None:
    network = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    fuse_convolutions(network)
    other: Any = copy_modules(network)
    with torch.no_grad():
        expected = network(noise(8))
    packed = other[0]._packed.weight
    assert packed is not None
    with torch.no_grad():
        assert torch.equal(other(noise(8)), expected)
    assert other[0]._packed.weight is packed


@pytest.mark.usefixtures("_tried_anew")
def test_without_the_operators_networks_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    for name, value in (
        ("_OPERATORS", torch.ops.transferkit_has_no_such_library),
        ("_BINDINGS", object()),
        ("_ATTRIBUTES", {**fusing._ATTRIBUTES, nn.ReLU6: lambda _: ("relu", [], "")}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(fusing, name, value)
            has_fused_convolutions.cache_clear()
            assert fuse_convolutions(network) == 0
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        has_fused_convolutions.cache_clear()
        assert fuse_convolutions(network) == 0
    assert [type(each) for each in network] == [nn.Conv2d, nn.ReLU]
