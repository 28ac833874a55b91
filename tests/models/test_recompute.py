from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from transferkit.models import Classifier, build_model
from transferkit.models.recompute import recomputing


def make(name: str, **options: str) -> Classifier:
    return build_model(name, 3, weights=None, **options).train()  # type: ignore[arg-type]


def step(model: Classifier, images: Tensor) -> tuple[Tensor, int]:
    """Return the loss of a step and the bytes that it kept for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    torch.manual_seed(0)  # Dropout and stochastic depth.
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = nn.functional.cross_entropy(model(images), torch.arange(len(images)) % 3)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), sum(size for place, size in kept.items() if place not in own)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_lite0"])
@pytest.mark.parametrize("freeze", ["none", "until:first"])
def test_gradients_and_statistics_are_the_same(name: str, freeze: str) -> None:
    model = make(name)
    if freeze != "none":
        model.freeze(f"until:{model.stages[1].name}")
    model.train()
    twin = copy.deepcopy(model)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected, usual = step(model, images)
    with recomputing(twin):
        found, kept = step(twin, images)
    assert torch.equal(found, expected)
    for (path, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), path
        if one.grad is not None:
            assert torch.equal(one.grad, other.grad), path  # type: ignore[arg-type]
    for (path, value), other_value in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(value, other_value), path
    assert kept < usual / 2


def test_the_forward_pass_is_as_before() -> None:
    model = make("resnet18")
    before = [each.__dict__.keys() for each in model.modules()]
    with pytest.raises(RuntimeError, match="within"), recomputing(model):
        raise RuntimeError("within")
    assert [each.__dict__.keys() for each in model.modules()] == before
