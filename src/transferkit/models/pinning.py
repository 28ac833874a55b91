"""Pinning: the modules whose parameters are all frozen, and the modes that they stay in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from transferkit.models.names import BACKBONE, names_in, parameter_names
from transferkit.models.stages import Stage

if TYPE_CHECKING:
    from transferkit.models.freezing import BatchNormMode

_MOVING = ("adapt", "train")


def find_pinned(model: nn.Module, frozen: set[str], stages: Sequence[Stage] = ()) -> list[str]:
    """Return the topmost modules whose parameters are all frozen, by name.

    Args:
        model: The model; its root is never among them.
        frozen: The names of the frozen parameters.
        stages: The stages of its backbone. Where all parameters of a stage are frozen, its
            modules without parameters are pinned too.

    Returns:
        Module names, none of which lies within another.
    """
    names = parameter_names(model)
    silent = {
        f"{BACKBONE}{module}"
        for stage in stages
        if (own := names_in(names, [stage])) and own <= frozen
        for module in stage.modules
    }
    # By identity: a parameter that two modules share has one name only.
    held = {id(parameter) for name, parameter in model.named_parameters() if name in frozen}
    pinned: list[str] = []
    for name, module in model.named_modules():
        parameters = [id(parameter) for parameter in module.parameters()]
        inside = any(name.startswith(f"{outer}.") for outer in pinned)
        is_frozen = held.issuperset(parameters) if parameters else name in silent
        if name and not inside and is_frozen:
            pinned.append(name)
    return pinned


def keep_pinned(
    model: nn.Module, backbone: nn.Module, pinned: Sequence[str], bn: BatchNormMode
) -> None:
    """Put pinned modules, and with bn="fixed" all BatchNorm of the backbone, into their modes.

    Args:
        model: The model; only modes of its modules change.
        backbone: Its backbone.
        pinned: The names of the pinned modules.
        bn: What BatchNorm layers do, see `FreezePlan`. "frozen" for a model in eval mode.
    """
    for name in pinned:
        modules = list(model.get_submodule(name).modules())
        wanted = [bn in _MOVING and isinstance(each, _BatchNorm) for each in modules]
        if [each.training for each in modules] != wanted:
            modules[0].eval()
            for module, training in zip(modules, wanted, strict=True):
                module.training = training  # Not `train()`: a layer may hold others.
    if bn == "fixed":
        for layer in backbone.modules():
            if isinstance(layer, _BatchNorm):
                layer.training = False


def count_inert_stages(
    backbone: nn.Module, stages: Sequence[Stage], pinned: Sequence[str], bn: BatchNormMode
) -> int:
    """Count the leading stages that compute one function of an image while others train.

    All their parameters are frozen, their modules are pinned, and none of them looks at the
    batch, as BatchNorm does that is not in eval mode or has no statistics of its own.

    Args:
        backbone: The network.
        stages: Its stages.
        pinned: The names of the classifier's modules that are pinned, see `find_pinned`.
        bn: What pinned BatchNorm layers do.

    Returns:
        The number.
    """
    for number, stage in enumerate(stages):
        if any(backbone.get_parameter(path).requires_grad for path in stage.parameters):
            return number
        for path in stage.modules:
            is_pinned = any(f"{BACKBONE}{path}.".startswith(f"{outer}.") for outer in pinned)
            if not (is_pinned and is_inert(backbone.get_submodule(path), bn)):
                return number
    return len(stages)


def is_inert(module: nn.Module, bn: BatchNormMode) -> bool:
    """Tell whether a pinned module neither trains nor looks at the batch."""
    if any(parameter.requires_grad for parameter in module.parameters()):
        return False
    return not any(
        isinstance(layer, _BatchNorm) and (bn in _MOVING or layer.running_mean is None)
        for layer in module.modules()
    )
