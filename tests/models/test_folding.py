from __future__ import annotations

import copy
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from transferkit.models import build_model
from transferkit.models.folding import count_batch_norms, fold_batch_norms

Network = TypeVar("Network", bound=nn.Module)


def settle(network: Network, *, seed: int = 0) -> Network:
    """Put a network into eval mode, its BatchNorm layers with values of their own."""
    draw = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 0.1, generator=draw)
            layer.running_var.uniform_(0.5, 2, generator=draw)
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.5, 2, generator=draw)
                nn.init.normal_(layer.bias, 0, 0.1, generator=draw)
    return network.eval()


def noise(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(network: nn.Module, other: nn.Module, images: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    expected = network(images)
    return float((other(images) - expected).abs().max() / expected.abs().max())


# How many of their BatchNorm layers a convolution precedes.
FAMILIES = {
    "resnet18": (20, 20),
    "mobilenet_v3_small": (34, 34),
    "densenet121": (59, 121),
    "regnet_y_400mf": (53, 53),
    "shufflenet_v2_x0_5": (56, 56),
    "efficientnet_b0": (49, 49),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_networks_compute_the_same(name: str) -> None:
    network = settle(build_model(name, 2, weights=None).backbone)
    folded = copy.deepcopy(network)
    num_layers = count_batch_norms(network)
    num_folded = fold_batch_norms(folded)
    assert (num_folded, num_layers) == FAMILIES[name]
    assert count_batch_norms(folded) == num_layers - num_folded
    assert difference(network, folded, noise(64)) < 1e-4


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet26d", "mobilenetv3_small_050"])
def test_timm_networks_compute_the_same(name: str) -> None:
    timm = pytest.importorskip("timm")
    network = settle(timm.create_model(name, pretrained=False, num_classes=0))
    folded = copy.deepcopy(network)
    assert fold_batch_norms(folded) == count_batch_norms(network) > 0
    assert count_batch_norms(folded) == 0
    assert difference(network, folded, noise(64)) < 1e-4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_layers_of_all_kinds_compute_the_same(bias: bool, affine: bool, groups: int) -> None:
    layers = (
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect", bias=bias),
        nn.BatchNorm2d(8, affine=affine),
        nn.SiLU(),
        nn.Conv2d(8, 12, 3, stride=2, dilation=2, groups=groups, bias=bias),
        nn.BatchNorm2d(12, affine=affine, eps=0.1),
    )
    network = settle(nn.Sequential(*layers))
    folded = copy.deepcopy(network)
    assert fold_batch_norms(folded) == 2
    assert [type(folded[place]) for place in (1, 4)] == [nn.Identity, nn.Identity]
    assert difference(network, folded, noise(16)) < 1e-5


class Chosen(nn.Module):
    """Layers that are called in a way of their own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.other = self.bn

    def forward(self, images: Tensor) -> Any:
        x = self.conv(images)
        if self.kind == "branch":
            return self.bn(x) + x
        if self.kind == "twice":
            return self.bn(self.conv(self.bn(x)))
        if self.kind == "read":
            return self.bn(x) * self.conv.weight.sum()
        if self.kind == "apart":
            return self.bn(torch.relu(x))
        return self.other(x)


@pytest.mark.parametrize("kind", ["branch", "twice", "read", "apart"])
def test_layers_that_others_see_stay(kind: str) -> None:
    network = settle(Chosen(kind))
    folded = copy.deepcopy(network)
    assert fold_batch_norms(folded) == 0
    assert difference(network, folded, noise(4)) == 0


def test_layer_under_two_names_is_folded_under_both() -> None:
    network = settle(Chosen("named"))
    folded = copy.deepcopy(network)
    assert fold_batch_norms(folded) == 1
    assert all(isinstance(each, nn.Identity) for each in (folded.bn, folded.other))
    assert difference(network, folded, noise(4)) < 1e-5


class OwnConv2d(nn.Conv2d):
    """Computes what no convolution does."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).square()


class OwnBatchNorm2d(nn.BatchNorm2d):
    """Computes what no BatchNorm does."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).abs()


def test_layers_of_unknown_classes_stay() -> None:
    for layers in (
        (OwnConv2d(3, 4, 1), nn.BatchNorm2d(4)),
        (nn.Conv2d(3, 4, 1), OwnBatchNorm2d(4)),
        (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)),
    ):
        assert fold_batch_norms(settle(nn.Sequential(*layers))) == 0


def test_layers_with_hooks_stay() -> None:
    network = settle(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    handle = network[0].register_forward_hook(lambda module, args, output: output + 1)
    assert fold_batch_norms(network) == 0
    handle.remove()
    assert fold_batch_norms(network) == 1


def test_layers_that_train_stay() -> None:
    network = settle(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    network[1].train()
    assert fold_batch_norms(network) == 0


class Undecided(nn.Module):
    """A network whose forward pass depends on the values, around a part whose does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.bn(self.stem(images))
        if x.mean() > 0:
            x = -x
        return torch.relu(self.block(x))


def test_parts_of_a_network_that_cannot_be_traced_are_folded() -> None:
    network = settle(Undecided())
    folded = copy.deepcopy(network)
    assert fold_batch_norms(folded) == 1
    assert isinstance(folded.bn, nn.BatchNorm2d)
    assert isinstance(folded.get_submodule("block.1"), nn.Identity)
    for images in (noise(4), -noise(4)):
        assert difference(network, folded, images) < 1e-5


def test_layers_that_two_parts_share_are_left_alone() -> None:
    # Each part by itself would fold them: once too often.
    class Part(nn.Module):
        def __init__(self, convolution: nn.Module, batch_norm: nn.Module) -> None:
            super().__init__()
            self.convolution, self.batch_norm = convolution, batch_norm

        def forward(self, images: Tensor) -> Tensor:
            outputs: Tensor = self.batch_norm(self.convolution(images))
            return outputs

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.first, self.second = Part(*layers), Part(*layers)

        def forward(self, images: Tensor) -> Tensor:
            if float(images.sum()) > 1e9:  # What a tracer cannot follow.
                return images
            outputs: Tensor = self.second(self.first(images))
            return outputs

    network = Whole().eval()
    with torch.no_grad():
        network.first.batch_norm.get_buffer("running_mean").add_(1)
        images = torch.rand(2, 3, 4, 4)
        expected = network(images)
        assert fold_batch_norms(network) == 0
        assert torch.equal(network(images), expected)
