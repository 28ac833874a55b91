"""Phases: parts of a fit, each with its own freezing, learning rates and schedule, as data."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from numbers import Real
from typing import Any

import numpy as np
from torch import nn

from transferkit._checks import check_integer, check_number, check_type
from transferkit.errors import ConfigError, FreezeError, UnknownNameError
from transferkit.models import Classifier, FreezePlan
from transferkit.models.freezing import is_batch_norm
from transferkit.training.groups import stage_of

RATE_NAMES = ("lr", "backbone_lr_factor", "stage_lr_factor")
"""The learning rates that a phase may set."""

_FREEZE_WORDS = '"none", "backbone", "until:<stage>", a glob or several, or a FreezePlan'
_UNFREEZE_WORDS = (
    '"all", "from:<stage>", a stage\'s name, a glob or several, "next", or a share of the '
    "stages in (0, 1]"
)


@dataclass(frozen=True)
class Phase:
    """A part of a fit. What is None stays as the recipe, or the phase before, has it.

    Args:
        name: Its name, in the history and in the plan; no two phases of a fit share one.
        epochs: Passes over the training pictures, at least 1.
        freeze: What is frozen from its start on: "none", "backbone", "until:<stage>", a glob
            over parameter names or several, or a `FreezePlan`. BatchNorm keeps the mode that
            it had (`bn`), unless a plan says another.
        unfreeze: What of it is unfrozen at its start: "all", "from:<stage>", a stage's name,
            a glob or several, or "next" for the last stage that is still frozen. A share s in
            (0, 1] lets at least the last ones train, s of all stages rounded up; 1 is
            everything. It fits backbones with any number of stages, also with none.
        lr: Learning rate of the head, above 0.
        backbone_lr_factor: Learning rate of the backbone's last stage relative to it, above 0.
        stage_lr_factor: Learning rate of each stage relative to the stage after it, above 0
            (discriminative learning rates).
        scheduler: The name of a scheduler, which runs over the epochs of this phase. None
            takes the fit's, which starts anew.
        scheduler_options: Its options, plain JSON data.
        warmup: The share of the phase's steps, in [0, 1), over which all learning rates rise
            linearly from near 0 to what the scheduler says.

    Raises:
        ConfigError: A value cannot work.

    Example:
        >>> [Phase(name="head", epochs=2, freeze="backbone"),
        ...  Phase(name="all", epochs=3, unfreeze="all", lr=1e-3, warmup=0.2)][1].epochs
        3

    References:
        Howard and Ruder, Universal Language Model Fine-tuning for Text Classification, 2018,
        https://arxiv.org/abs/1801.06146 (gradual unfreezing, discriminative rates).
    """

    name: str
    epochs: int
    _: KW_ONLY
    freeze: str | tuple[str, ...] | FreezePlan | None = None
    unfreeze: str | tuple[str, ...] | float | None = None
    lr: float | None = None
    backbone_lr_factor: float | None = None
    stage_lr_factor: float | None = None
    scheduler: str | None = None
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    warmup: float = 0.0

    def __post_init__(self) -> None:
        check_type("name", self.name, str, "a text")
        if not self.name:
            raise ConfigError("`name` should be a text that is not empty, found ''.")
        checked: dict[str, Any] = {
            "epochs": check_integer("epochs", self.epochs, minimum=1),
            "freeze": _check_freeze(self.freeze),
            "unfreeze": _check_unfreeze(self.unfreeze),
            "scheduler_options": self._check_scheduler(),
            "warmup": check_number(
                "warmup", self.warmup, lambda share: 0 <= share < 1, "in [0, 1), a share of steps"
            ),
        }
        for name in RATE_NAMES:
            value = getattr(self, name)
            if value is not None:
                checked[name] = check_number(name, value, lambda rate: rate > 0, "above 0")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def _check_scheduler(self) -> dict[str, Any]:
        """Return the options as data that JSON gives back as it is."""
        if self.scheduler is not None:
            check_type("scheduler", self.scheduler, str, "the name of a scheduler")
        check_type("scheduler_options", self.scheduler_options, dict, "a dict of options")
        if self.scheduler is None and self.scheduler_options:
            raise ConfigError(
                f"The `scheduler_options` of the phase `{self.name}` belong to a `scheduler`, "
                f"which it does not name. Name it, or leave them out."
            )
        options = {name: to_plain(each) for name, each in self.scheduler_options.items()}
        try:
            plain: dict[str, Any] = json.loads(json.dumps(options, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"The `scheduler_options` of the phase `{self.name}` should be plain JSON data, "
                f"which a checkpoint can hold, found {self.scheduler_options!r}."
            ) from error
        return plain

    def to_dict(self) -> dict[str, Any]:
        """Return the phase as plain JSON data."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        if isinstance(self.freeze, FreezePlan):
            values["freeze"] = self.freeze.to_dict()
        values["scheduler_options"] = dict(self.scheduler_options)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Phase:
        """Build the phase from what `to_dict` returned.

        Raises:
            ConfigError: A field is missing or unknown, or a value cannot work.
        """
        names = {each.name for each in fields(cls)}
        if not {"name", "epochs"} <= set(data) <= names:
            raise ConfigError(
                f"A phase as data should have `name`, `epochs` and what else there is of "
                f"{sorted(names)}, found {sorted(data)}."
            )
        values = dict(data)
        if isinstance(values.get("freeze"), Mapping):
            values["freeze"] = FreezePlan.from_dict(values["freeze"])
        return cls(**values)


def to_plain(value: Any) -> Any:
    """Return NumPy's numbers as Python's, which JSON can hold, and all else as it is.

    Example:
        >>> to_plain(np.float64(0.5)), to_plain("cosine")
        (0.5, 'cosine')
    """
    return value.item() if isinstance(value, np.generic) else value


def _check_freeze(freeze: Any) -> str | tuple[str, ...] | FreezePlan | None:
    if freeze is None or isinstance(freeze, FreezePlan):
        return freeze
    if callable(freeze) and not isinstance(freeze, type):
        raise ConfigError(
            f"`freeze` of a phase is data and no callable, found {freeze!r}. Ask it beforehand: "
            f"freeze=FreezePlan.parse(callable, model=model)."
        )
    return _check_texts("freeze", freeze, _FREEZE_WORDS)


def _check_unfreeze(unfreeze: Any) -> str | tuple[str, ...] | float | None:
    if unfreeze is None:
        return None
    is_number = isinstance(unfreeze, Real) and not isinstance(unfreeze, bool)
    if is_number and 0 < float(unfreeze) <= 1:
        return float(unfreeze)
    return _check_texts("unfreeze", unfreeze, _UNFREEZE_WORDS)


def _check_texts(name: str, value: Any, words: str) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return value
    is_list = isinstance(value, (list, tuple)) and len(value) > 0
    if not is_list or not all(isinstance(each, str) for each in value):
        raise ConfigError(f"`{name}` of a phase should be {words}, found {value!r}.")
    return tuple(value)


@dataclass(frozen=True)
class ResolvedPhase:
    """A phase for one model: what is frozen in it is known.

    Args:
        phase: The phase.
        freeze_plan: What is frozen in it.
        trainable: The names of the parameters that train in it.
        first_epoch: The number of its first epoch, from 1.
    """

    phase: Phase
    freeze_plan: FreezePlan
    trainable: frozenset[str]
    first_epoch: int

    @property
    def epochs(self) -> range:
        """The numbers of its epochs."""
        return range(self.first_epoch, self.first_epoch + self.phase.epochs)


def resolve_phases(model: Classifier, phases: Sequence[Phase]) -> tuple[ResolvedPhase, ...]:
    """Work out what is frozen in each phase of a fit. The model is not changed.

    Args:
        model: The model, as it is before the fit.
        phases: The phases in their order.

    Returns:
        The phases for this model.

    Raises:
        ConfigError: There is no phase, something else among them, or a name twice.
        FreezeError: A phase freezes everything, names nothing that there is, or unfreezes
            what is not frozen.
        UnknownNameError: A phase names a stage that the backbone does not have.
    """
    _check_phases(phases)
    resolved: list[ResolvedPhase] = []
    plan = model.freeze_plan
    epoch = 1
    for phase in phases:
        try:
            plan = _next_plan(plan, phase, model)
            trainable = trainable_names(plan, model)
        except (FreezeError, UnknownNameError) as error:
            raise type(error)(f"In the phase `{phase.name}`: {error}") from error
        if not trainable:
            raise FreezeError(
                f"In the phase `{phase.name}` all parameters are frozen: nothing is left to "
                f'train. Freeze less, such as freeze="backbone".'
            )
        resolved.append(ResolvedPhase(phase, plan, trainable, epoch))
        epoch += phase.epochs
    return tuple(resolved)


def _check_phases(phases: Sequence[Phase]) -> None:
    is_list = isinstance(phases, (list, tuple)) and len(phases) > 0
    if not is_list or not all(isinstance(each, Phase) for each in phases):
        raise ConfigError(f"`phases` should be a list of at least one Phase, found {phases!r}.")
    name, number = Counter(each.name for each in phases).most_common(1)[0]
    if number > 1:
        raise ConfigError(
            f"The phases of a fit should have different names, which the history tells them "
            f"apart by, found `{name}` {number} times."
        )


def _next_plan(plan: FreezePlan, phase: Phase, model: Classifier) -> FreezePlan:
    if isinstance(phase.freeze, FreezePlan):
        plan = phase.freeze
    elif phase.freeze is not None:
        bn = plan.bn
        plan = FreezePlan.parse(phase.freeze)
        plan = replace(plan, bn=bn if plan.freezes or bn == "fixed" else "frozen")
    if isinstance(phase.unfreeze, float):
        return _unfreeze_share(plan, phase.unfreeze, model)
    if phase.unfreeze is None:
        return plan
    if not plan.freezes:
        raise FreezeError(
            "Nothing is frozen any more, so that there is nothing to unfreeze. Leave `unfreeze` "
            "out."
        )
    return plan.unfreeze(phase.unfreeze, model, model.stages)


def _unfreeze_share(plan: FreezePlan, share: float, model: Classifier) -> FreezePlan:
    """Return the plan under which at least the last stages train, so many of them."""
    count = len(model.stages)
    num_open = math.ceil(round(share * count, 6))  # 0.1 * 30 is more than 3.
    first = count - num_open
    frozen = plan.frozen_names(model, model.stages)
    if not first:
        return plan.unfreeze("all", model, model.stages) if frozen else plan
    places = {stage_of(name, model) for name in frozen}
    if not any(place is None or place >= first for place in places):
        return plan
    return plan.unfreeze(f"from:{model.stages[first].name}", model, model.stages)


def trainable_names(plan: FreezePlan, model: Classifier) -> frozenset[str]:
    """Return the names of the parameters that train under a plan."""
    frozen = plan.frozen_names(model, model.stages)
    if plan.bn == "train":
        frozen = {name for name in frozen if not is_batch_norm(name, model)}
    return frozenset(name for name, _ in model.named_parameters() if name not in frozen)


def spread_epochs(phases: Sequence[Phase], epochs: int) -> tuple[Phase, ...]:
    """Share out epochs over phases in the proportion of their own, at least one to each.

    Args:
        phases: The phases.
        epochs: The number of all epochs.

    Returns:
        The phases with their new epochs.

    Raises:
        ConfigError: There are fewer epochs than phases.

    Example:
        >>> phases = [Phase(name="head", epochs=2), Phase(name="all", epochs=3)]
        >>> [phase.epochs for phase in spread_epochs(phases, 25)]
        [10, 15]
    """
    if epochs < len(phases):
        names = ", ".join(phase.name for phase in phases)
        raise ConfigError(
            f"`epochs` should be at least {len(phases)}, one for each phase ({names}), "
            f"found {epochs}."
        )
    total = sum(phase.epochs for phase in phases)
    shares = [1] * len(phases)
    for _ in range(epochs - len(phases)):
        # One more to the phase that lacks most; in integers, so that no rounding decides.
        lacks = [epochs * phase.epochs - total * shares[n] for n, phase in enumerate(phases)]
        shares[lacks.index(max(lacks))] += 1
    return tuple(replace(phase, epochs=share) for phase, share in zip(phases, shares, strict=True))


def count(model: nn.Module, names: frozenset[str]) -> int:
    """Return the number of values in the parameters of these names."""
    return sum(each.numel() for name, each in model.named_parameters() if name in names)
