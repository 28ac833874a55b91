"""L2-SP, against the gradient of its formula."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transferkit.errors import ConfigError
from transferkit.models import BackboneSpec, Classifier, build_model
from transferkit.training.regularizers import L2SP, check_strength

STRENGTH = 0.3


@pytest.fixture
def model(tiny_spec: BackboneSpec) -> Classifier:
    torch.manual_seed(0)
    return build_model(tiny_spec, 2, weights=None)


def names_of(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for each in model.parameters():
            each.add_(torch.randn_like(each))


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def backward(model: Classifier, start: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the gradients of a loss, with the penalty as a term of it where `start` is given."""
    model.zero_grad()
    loss = model.eval()(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)).square().sum()
    for name, each in model.named_parameters():
        if start is not None and name in start and each.requires_grad:
            loss = loss + STRENGTH / 2 * (each - start[name]).square().sum()
    loss.backward()
    return {name: grad.clone() for name, grad in grads(model).items()}


def backbone_values(model: Classifier) -> dict[str, Tensor]:
    values = {name: each.detach().clone() for name, each in model.named_parameters()}
    return {name: value for name, value in values.items() if name.startswith("backbone.")}


def test_gradients_are_those_of_the_formula(model: Classifier) -> None:
    start = backbone_values(model)
    penalty = L2SP(model, names_of(model), strength=STRENGTH)
    move(model)
    expected = backward(model, start)
    plain = backward(model)
    penalty.add_to_gradients()
    torch.testing.assert_close(grads(model), expected)
    assert not torch.allclose(plain["backbone.conv1.weight"], expected["backbone.conv1.weight"])
    assert torch.equal(plain["head.weight"], grads(model)["head.weight"])
    assert all(each.grad_fn is None for each in grads(model).values())


def test_at_the_start_it_adds_nothing(model: Classifier) -> None:
    penalty = L2SP(model, names_of(model), strength=STRENGTH)
    plain = backward(model)
    penalty.add_to_gradients()
    assert all(torch.equal(each, plain[name]) for name, each in grads(model).items())


def test_what_is_unfrozen_later_goes_back_to_where_it_started(model: Classifier) -> None:
    model.freeze("backbone")
    start = backbone_values(model)
    penalty = L2SP(model, names_of(model), strength=STRENGTH)
    move(model.head)
    backward(model)
    penalty.add_to_gradients()
    assert set(grads(model)) == {"head.weight", "head.bias"}
    model.freeze("backbone.conv1.*")
    move(model.backbone.get_submodule("layer1"))
    expected = backward(model, start)
    backward(model)
    penalty.add_to_gradients()
    torch.testing.assert_close(grads(model), expected)


def test_a_step_towards_the_start_ends_there(model: Classifier) -> None:
    start = backbone_values(model)
    penalty = L2SP(model, names_of(model), strength=0.5)
    move(model)
    for each in model.parameters():
        each.grad = torch.zeros_like(each)
    penalty.add_to_gradients()
    torch.optim.SGD(model.backbone.parameters(), lr=2.0).step()
    torch.testing.assert_close(backbone_values(model), start, atol=1e-6, rtol=0)


def test_only_what_ever_trains_is_copied(
    model: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[torch.Size] = []
    clone = Tensor.clone

    def counted(self: Tensor, **options: Any) -> Tensor:
        copied.append(self.shape)
        return clone(self, **options)

    monkeypatch.setattr(Tensor, "clone", counted)
    L2SP(model, {"backbone.bn1.weight", "head.weight"}, strength=0.1)
    assert copied == [torch.Size([8])]


def test_half_precision(model: Classifier) -> None:
    model.to(torch.bfloat16)
    penalty = L2SP(model, names_of(model), strength=0.5)
    bias = model.backbone.get_parameter("bn1.bias")
    nn.init.ones_(bias)
    bias.grad = torch.zeros_like(bias)
    penalty.add_to_gradients()
    assert bias.grad.dtype == torch.bfloat16
    assert bias.grad.tolist() == [0.5] * 8


def test_a_frozen_backbone_is_an_error(model: Classifier) -> None:
    message = (
        "`l2_sp` keeps the backbone near the weights that it starts from, but no parameter of the "
        "backbone trains. Leave it out, or unfreeze something of the backbone."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        L2SP(model, {"head.weight", "head.bias"}, strength=0.1)


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf"), "0.1", None, True])
def test_bad_strengths_are_errors(model: Classifier, strength: Any) -> None:
    message = f"should be a finite number of at least 0, found {strength!r}."
    with pytest.raises(ConfigError, match=f"^{re.escape(f'`l2_sp` {message}')}$"):
        check_strength(strength)
    with pytest.raises(ConfigError, match=f"^{re.escape(f'`strength` {message}')}$"):
        L2SP(model, names_of(model), strength=strength)


def test_strengths_are_floats() -> None:
    assert isinstance(check_strength(0), float)
    assert check_strength(0.01) == 0.01
