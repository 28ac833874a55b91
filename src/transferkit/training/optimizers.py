"""Optimizers by name, by factory, or ready made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from transferkit._checks import check_callable
from transferkit._registry import Registry
from transferkit.errors import ConfigError
from transferkit.models import Classifier
from transferkit.training.groups import Rates, make_groups


class OptimizerFactory(Protocol):
    """A callable that builds an optimizer over the parameters that train."""

    def __call__(self, params: Iterable[nn.Parameter], /) -> Optimizer:
        """Return the optimizer, with its own learning rate."""
        ...


_NAMED: Registry[Callable[..., Optimizer]] = Registry(
    "optimizer", lister="transferkit.training.list_optimizers()"
)
_NAMED.add("sgd", torch.optim.SGD)
_NAMED.add("adam", torch.optim.Adam)
_NAMED.add("adamw", torch.optim.AdamW)


def list_optimizers() -> list[str]:
    """Return the names that `Trainer(optimizer=...)` takes, sorted.

    Example:
        >>> list_optimizers()
        ['adam', 'adamw', 'sgd']
    """
    return _NAMED.names()


def make_optimizer(
    optimizer: str | OptimizerFactory | Optimizer,
    model: Classifier,
    *,
    rates: Rates | None,
    momentum: float,
    weight_decay: float,
) -> Optimizer:
    """Build the optimizer over the model's parameters that train.

    Args:
        optimizer: "sgd", "adam" or "adamw"; a factory; or an optimizer over parameters
            of this model, which is taken as it is.
        model: The model.
        rates: The learning rates; only for a name.
        momentum: Momentum of "sgd", in [0, 1).
        weight_decay: Weight decay, at least 0; only for a name.

    Returns:
        The optimizer. Frozen parameters are not in it.

    Raises:
        UnknownNameError: There is no such optimizer.
        ConfigError: The optimizer holds other parameters than those that train.
        FreezeError: All parameters are frozen.
    """
    parameters = list(model.trainable_parameters())
    if isinstance(optimizer, str):
        options: dict[str, Any] = {"weight_decay": weight_decay}
        if optimizer == "sgd":
            options["momentum"] = momentum
        if rates is not None:
            options["lr"] = rates.lr
        return _NAMED.get(optimizer)(make_groups(model, rates), **options)
    if not isinstance(optimizer, Optimizer):
        check_callable("optimizer", optimizer, "a name, a factory or a torch.optim.Optimizer")
    built = optimizer if isinstance(optimizer, Optimizer) else optimizer(parameters)
    if isinstance(built, torch.optim.LBFGS):
        raise ConfigError(
            "LBFGS evaluates the loss several times in a step, which the training loop does not. "
            "Take a first-order optimizer, such as SGD or AdamW."
        )
    _check_parameters(built, parameters)
    return built


def _check_parameters(optimizer: Optimizer, trainable: list[nn.Parameter]) -> None:
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"The optimizer factory should return a torch.optim.Optimizer, "
            f"found {type(optimizer).__name__}."
        )
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    wanted = {id(each) for each in trainable}
    if held != wanted:
        raise ConfigError(
            f"The optimizer should hold the model's {len(wanted)} trainable parameters; it lacks "
            f"{len(wanted - held)} of them and holds {len(held - wanted)} others (frozen, or of "
            f"another model). Build it from `model.trainable_parameters()`, after freezing."
        )


def group_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the options of each parameter group: learning rate, momentum and so on.

    A rate that is a tensor, which a scheduler changes in place, comes as a number.
    """
    left_out = ("params", "param_names", "initial_lr")
    return [
        {name: _to_number(value) for name, value in group.items() if name not in left_out}
        for group in optimizer.param_groups
    ]


def _to_number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
