"""Penalties that keep a fine-tuned network near the pretrained one."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from transferkit._checks import check_number
from transferkit.errors import ConfigError
from transferkit.models import Classifier

_PREFIX = "backbone."


class L2SP:
    """Pull the weights of the backbone towards those from which the fit starts.

    The penalty is `strength / 2 * ||w - w0||^2` over the backbone's parameters, w0 being their
    values now. It goes straight into the gradients, so that no loss in the history contains
    it. The head has no weights worth going back to: its decay is the optimizer's.

    Only parameters that ever train are copied: a frozen backbone costs no memory, one that
    trains as a whole the size of its weights.

    Args:
        model: The model, with the weights to stay near to.
        trainable: The names of the parameters that train at any time of the fit. One that is
            still frozen has no gradient, and joins when it is unfrozen.
        strength: The weight of the penalty, at least 0. The weight decay of the backbone is
            best left at 0 beside it: it pulls towards 0.

    Raises:
        ConfigError: The strength is out of range, or no parameter of the backbone trains.

    Example:
        >>> from transferkit.models import build_model
        >>> model = build_model("resnet18", 2, weights=None)
        >>> trainable = {name for name, _ in model.named_parameters()}
        >>> penalty = L2SP(model, trainable, strength=0.01)
        >>> weight = model.backbone.conv1.weight
        >>> weight.grad = torch.zeros_like(weight)
        >>> weight.data += 1
        >>> penalty.add_to_gradients()
        >>> round(weight.grad.mean().item(), 4)
        0.01

    References:
        Li, Grandvalet and Davoine, Explicit Inductive Bias for Transfer Learning with
        Convolutional Networks, 2018, https://arxiv.org/abs/1802.01483.
    """

    def __init__(self, model: Classifier, trainable: Collection[str], *, strength: float) -> None:
        self.strength: float = check_strength(strength, name="strength")
        self._parameters: dict[str, nn.Parameter] = {
            name: parameter
            for name, parameter in model.named_parameters()
            if name.startswith(_PREFIX) and name in trainable
        }
        self._starts: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in self._parameters.items()
        }
        if not self._starts:
            raise ConfigError(
                "`l2_sp` keeps the backbone near the weights that it starts from, but no parameter "
                "of the backbone trains. Leave it out, or unfreeze something of the backbone."
            )

    @torch.no_grad()
    def add_to_gradients(self) -> None:
        """Add the penalty's gradient, `strength * (w - w0)`, to all gradients that there are."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                parameter.grad.add_(parameter - self._starts[name], alpha=self.strength)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights that the penalty pulls to."""
        return dict(self._starts)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Pull to the weights that `state_dict` returned."""
        for name, start in self._starts.items():
            start.copy_(state[name])


def check_strength(strength: float, *, name: str = "l2_sp") -> float:
    """Return the strength of a penalty as a float.

    Args:
        strength: What was given.
        name: The argument's name, for the error text.

    Returns:
        The strength.

    Raises:
        ConfigError: It is no finite number of at least 0.

    Example:
        >>> check_strength(1)
        1.0
    """
    return check_number(name, strength, lambda number: number >= 0, "of at least 0")
