"""Parameter groups: one for the head and one for each stage that trains, kept by identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transferkit.models import Classifier
from transferkit.models.names import BACKBONE

_HEAD, _OUTSIDE = "head", "backbone"


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The learning rates of a phase.

    Args:
        lr: That of the head.
        backbone_lr_factor: That of the backbone's last stage relative to it.
        stage_lr_factor: That of each stage relative to the stage after it.

    Example:
        >>> rates = Rates(lr=0.1, backbone_lr_factor=0.5, stage_lr_factor=0.1)
        >>> [round(rates.of_stage(place, 3), 6) for place in (2, 1, 0)]
        [0.05, 0.005, 0.0005]
    """

    lr: float
    backbone_lr_factor: float = 1.0
    stage_lr_factor: float = 1.0

    def of_stage(self, place: int, count: int) -> float:
        """Return the learning rate of stage number `place` of `count`, from 0."""
        return self.lr * self.backbone_lr_factor * self.stage_lr_factor ** (count - 1 - place)


def stage_of(name: str, model: Classifier) -> int | None:
    """Return the place of the stage that holds a parameter.

    Args:
        name: The parameter's name: "backbone.layer1.0.conv1.weight".
        model: The model.

    Returns:
        The place in `model.stages`; None for the head, and what else lies in no stage.
    """
    path = name.removeprefix(BACKBONE)
    if path == name:
        return None
    return next((place for place, stage in enumerate(model.stages) if stage.holds(path)), None)


def make_groups(
    model: Classifier, rates: Rates | None, trainable: frozenset[str] | None = None
) -> list[dict[str, Any]]:
    """Return the parameter groups of what trains: the head's first, then the last stage's.

    Args:
        model: The model.
        rates: The learning rates; None leaves them to the optimizer.
        trainable: The names of the parameters that train; None takes those that require grad.

    Returns:
        Dicts with "name" and "params", and "lr" where there are rates. Parameters of the
        backbone that lie in no stage are the group "backbone", with the first stage's rate.
    """
    if trainable is None:
        trainable = frozenset(name for name, each in model.named_parameters() if each.requires_grad)
    count = len(model.stages)
    members: dict[int, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name in trainable:
            members.setdefault(_place_of(name, model), []).append(parameter)
    groups: list[dict[str, Any]] = []
    for place in sorted(members, reverse=True):
        group: dict[str, Any] = {"name": _name_of(place, model), "params": members[place]}
        if rates is not None:
            is_head = place == count
            group["lr"] = rates.lr if is_head else rates.of_stage(max(0, place), max(1, count))
        groups.append(group)
    return groups


def _place_of(name: str, model: Classifier) -> int:
    """Return a parameter's stage, with the head after the last and -1 for what is in none."""
    place = stage_of(name, model)
    if place is not None:
        return place
    return -1 if name.startswith(BACKBONE) else len(model.stages)


def _name_of(place: int, model: Classifier) -> str:
    if place == len(model.stages):
        return _HEAD
    if place < 0:
        return _OUTSIDE
    name = model.stages[place].name
    return f"{BACKBONE}{name}" if name in (_HEAD, _OUTSIDE) else name


def regroup(optimizer: Optimizer, model: Classifier, rates: Rates | None) -> None:
    """Bring an optimizer's parameter groups up to date with what trains, in place.

    Groups that go on keep their identity, and parameters that go on their state, such as
    momentum. What is frozen now leaves the optimizer with its state; what is unfrozen joins
    the group of its name, or a new one with the optimizer's defaults. Groups are in the order
    of `make_groups`, after those of other names.

    Args:
        optimizer: The optimizer; changed in place.
        model: The model, frozen as it is to be.
        rates: The learning rates, which are set; None leaves those that there are.
    """
    groups = make_groups(model, rates)
    names = {parameter: name for name, parameter in model.named_parameters()}
    is_named = any("param_names" in group for group in optimizer.param_groups)
    _drop_others(optimizer, {each for group in groups for each in group["params"]})
    held = {each for group in optimizer.param_groups for each in group["params"]}
    by_name = {group.get("name"): group for group in optimizer.param_groups}
    for group in groups:
        new = [each for each in group["params"] if each not in held]
        known = by_name.get(group["name"])
        if known is not None:
            known["params"].extend(new)
            set_option(known, "lr", group.get("lr", known["lr"]))
        elif new:
            members: list[Any] = [(names[each], each) for each in new] if is_named else new
            optimizer.add_param_group({**group, "params": members})
    if is_named:
        for group in optimizer.param_groups:
            group["param_names"] = [names[each] for each in group["params"]]
    order = {group["name"]: place for place, group in enumerate(groups)}
    optimizer.param_groups.sort(key=lambda group: order.get(group.get("name"), -1))


def _drop_others(optimizer: Optimizer, wanted: set[nn.Parameter]) -> None:
    """Take parameters out of an optimizer, their state and groups that are empty then, too."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in wanted:
                optimizer.state.pop(parameter, None)
        group["params"] = [each for each in group["params"] if each in wanted]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def set_option(group: dict[str, Any], name: str, value: Any) -> None:
    """Set an option of a parameter group; a rate that is a tensor stays the same tensor."""
    if isinstance(group.get(name), Tensor):
        group[name].copy_(torch.as_tensor(value))
    else:
        group[name] = value
