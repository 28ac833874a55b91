"""Freezing: which parameters do not train, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from glob import escape
from typing import Any, Literal, TypeAlias, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from transferkit.errors import FreezeError
from transferkit.models.names import (
    backbone_names,
    beginnings,
    match_names,
    names_in,
    parameter_names,
)
from transferkit.models.pinning import find_pinned
from transferkit.models.stages import Stage, find_stage

BatchNormMode: TypeAlias = Literal["frozen", "train", "adapt", "fixed"]

Freeze: TypeAlias = "str | Sequence[str] | Callable[[str, nn.Parameter], bool] | FreezePlan"
"""What says what is frozen: "none", "backbone", "until:<stage>", a glob over parameter names,
several of them, a callable that tells it of a parameter and its name, or a plan."""

_UNTIL = "until:"
_FROM = "from:"
_SHORTCUTS: dict[str, tuple[str, ...]] = {"none": (), "backbone": ("backbone.*",)}


@dataclass(frozen=True)
class FreezePlan:
    """Say which parameters are frozen: up to a stage, by glob patterns over names, or both.

    A frozen parameter does not require grad. A module whose parameters are all frozen is
    pinned in eval mode through every `train()`: its BatchNorm statistics, dropout and
    stochastic depth stand still too.

    Args:
        patterns: Globs over parameter names; `*` crosses dots: "backbone.layer1.*". Their
            order says nothing: they are kept sorted, each once.
        bn: What the BatchNorm layers of frozen modules do. "frozen" keeps them as they are;
            "train" trains them, weight, bias and statistics, while the rest is frozen;
            "adapt" lets only their statistics follow the training batches, as a plain loop
            does that just sets `requires_grad = False`. "fixed" keeps the statistics of all
            modules of the backbone as they are, also of those that train, which spares a
            few hundred pictures the noise of small batches.
        until: The name of a stage; it and all stages before it are frozen.

    Raises:
        FreezeError: A field is of the wrong kind, or `bn` is "adapt" or "train" where nothing
            is frozen.

    Example:
        >>> FreezePlan.parse("backbone")
        FreezePlan(patterns=('backbone.*',), bn='frozen', until=None)
        >>> FreezePlan.parse("until:layer3").until
        'layer3'
    """

    patterns: tuple[str, ...] = ()
    bn: BatchNormMode = "frozen"
    until: str | None = None

    def __post_init__(self) -> None:
        is_list = isinstance(self.patterns, (tuple, list))
        if not is_list or not all(isinstance(each, str) for each in self.patterns):
            raise FreezeError(
                f"`patterns` should be a tuple of globs over parameter names, found "
                f"{self.patterns!r}. `FreezePlan.parse` takes a single one."
            )
        object.__setattr__(self, "patterns", tuple(sorted(set(self.patterns))))
        if self.until is not None and not isinstance(self.until, str):
            raise FreezeError(f"`until` should be a stage's name or None, found {self.until!r}.")
        if self.bn not in get_args(BatchNormMode):
            raise FreezeError(
                f'`bn` should be "frozen", "train", "adapt" or "fixed", found {self.bn!r}.'
            )
        if self.bn in ("adapt", "train") and not self.freezes:
            raise FreezeError(
                f'bn="{self.bn}" has no effect where nothing is frozen: BatchNorm trains anyway. '
                'Leave it out, or freeze something, such as freeze="backbone".'
            )

    @property
    def freezes(self) -> bool:
        """Whether the plan freezes anything."""
        return bool(self.patterns) or self.until is not None

    @classmethod
    def parse(
        cls,
        freeze: Freeze,
        *,
        bn: BatchNormMode = "frozen",
        model: nn.Module | None = None,
        stages: Sequence[Stage] = (),
    ) -> FreezePlan:
        """Build a plan from what `build_model` takes.

        Args:
            freeze: "none", "backbone", "until:<stage>", a glob over parameter names, several
                of them, a callable from a parameter's name and the parameter to whether it
                is frozen, or a plan, which is returned as it is.
            bn: See `FreezePlan`.
            model: What a callable is asked about, once for each parameter; the plan names
                what it chose.
            stages: The stages of its backbone.

        Returns:
            The plan.

        Raises:
            FreezeError: It is none of these, `bn` does not fit or contradicts the plan, or a
                callable chooses nothing.
        """
        if isinstance(freeze, FreezePlan):
            if bn not in ("frozen", freeze.bn):
                raise FreezeError(
                    f'The freeze plan says bn="{freeze.bn}", the argument is bn="{bn}". Leave '
                    f"the argument out, or make a plan that says so."
                )
            return freeze
        if isinstance(freeze, str) and freeze.startswith(_UNTIL):
            return cls(bn=bn, until=freeze.removeprefix(_UNTIL))
        if isinstance(freeze, str):
            return cls(_SHORTCUTS.get(freeze, (freeze,)), bn)
        if _is_chooser(freeze):
            if model is None:
                raise FreezeError(
                    "A callable `freeze` chooses from the parameters of a model: pass `model=`."
                )
            return _shortest_plan(_choose(freeze, model), bn, model, stages)
        return cls(_check_globs(freeze, "freeze", '"none", "backbone", "until:<stage>"'), bn)

    def frozen_names(self, model: nn.Module, stages: Sequence[Stage] = ()) -> set[str]:
        """Return the names of the model's parameters that the plan freezes.

        With bn="train" the weights and biases of BatchNorm are among them, though they train.

        Args:
            model: The model.
            stages: The stages of its backbone, for a plan with `until`.

        Raises:
            FreezeError: A pattern matches no parameter, the backbone has no stages, or the
                plan freezes BatchNorm layers alone, which bn="train" trains.
            UnknownNameError: There is no such stage.
        """
        names = parameter_names(model)
        frozen = match_names(self.patterns, names, stages)
        if self.until is not None:
            frozen |= names_in(names, stages[: find_stage(stages, self.until) + 1])
        if self.bn == "train" and all(is_batch_norm(name, model) for name in frozen):
            raise FreezeError(
                'bn="train" trains the BatchNorm layers of frozen modules, and the plan freezes '
                "nothing else. Leave it out, or freeze more."
            )
        return frozen

    def unfreeze(self, what: Freeze, model: nn.Module, stages: Sequence[Stage] = ()) -> FreezePlan:
        """Return the plan that freezes what this one does but for what is named.

        Args:
            what: "all"; "backbone"; "from:<stage>" for everything but the stages before it;
                "until:<stage>" for it and those before it; a stage's name; "next" for the last
                stage of which anything is frozen; a glob over parameter names, several of
                them, a callable as for `parse`, or a plan.
            model: The model.
            stages: The stages of its backbone.

        Returns:
            The shortest plan that does, with the same `bn` as far as anything is still frozen.

        Raises:
            FreezeError: A pattern matches nothing, or nothing of it was frozen.
            UnknownNameError: There is no such stage.
        """
        frozen = self.frozen_names(model, stages)
        thawed = _thawed_names(what, frozen, model, stages)
        if not frozen & thawed:
            held = f" Frozen are: {', '.join(beginnings(frozen))}." if frozen else ""
            raise FreezeError(f"There is nothing to unfreeze in {_words(what)}.{held}")
        rest = frozen - thawed
        if self.bn == "train" and all(is_batch_norm(name, model) for name in rest):
            rest = set()
        if not rest:
            return FreezePlan(bn="fixed" if self.bn == "fixed" else "frozen")
        return _shortest_plan(rest, self.bn, model, stages)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON data."""
        return {**asdict(self), "patterns": list(self.patterns)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FreezePlan:
        """Build the plan from what `to_dict` returned, in this version or an older one.

        Raises:
            FreezeError: A field is missing, unknown or of the wrong kind.

        Example:
            >>> FreezePlan.from_dict({"patterns": ["backbone.*"], "bn": "frozen"})
            FreezePlan(patterns=('backbone.*',), bn='frozen', until=None)
        """
        known = [field.name for field in fields(cls)]
        if not {"patterns", "bn"} <= set(data) <= set(known):
            raise FreezeError(
                f"A freeze plan should have the fields {', '.join(known)}, "
                f"found {', '.join(map(str, data)) or 'none'}."
            )
        return cls(**data)


def _is_chooser(freeze: object) -> bool:
    return callable(freeze) and not isinstance(freeze, type)


def _choose(freeze: Any, model: nn.Module) -> set[str]:
    """Return the names that a callable chooses, at least one."""
    chosen = set()
    for name, parameter in model.named_parameters():
        try:
            answer = freeze(name, parameter)
        except TypeError as error:
            raise FreezeError(
                f"The callable failed for the parameter `{name}`: {error}. It should take a "
                f"parameter's name and the parameter, and return True or False."
            ) from error
        if not isinstance(answer, bool):
            raise FreezeError(
                f"The callable should return True or False for each parameter, found {answer!r} "
                f"for `{name}`."
            )
        if answer:
            chosen.add(name)
    if not chosen:
        raise FreezeError("The callable chooses no parameter: it returns False for all of them.")
    return chosen


def _check_globs(value: object, argument: str, shortcuts: str) -> tuple[str, ...]:
    globs = tuple(value) if isinstance(value, Sequence) else ()
    if not globs or not all(isinstance(each, str) for each in globs):
        raise FreezeError(
            f"`{argument}` should be {shortcuts}, a glob over parameter names, a list of globs, "
            f"a callable from (name, parameter) or a FreezePlan, found {value!r}."
        )
    return globs


def _thawed_names(
    what: Freeze, frozen: set[str], model: nn.Module, stages: Sequence[Stage]
) -> set[str]:
    """Return the names that `what` means, whether they are frozen or not."""
    names = parameter_names(model)
    if isinstance(what, FreezePlan):
        return what.frozen_names(model, stages)
    if not isinstance(what, str):
        if _is_chooser(what):
            return _choose(what, model)
        shortcuts = '"all", "backbone", "next", a stage\'s name, "from:<stage>"'
        return match_names(_check_globs(what, "unfreeze", shortcuts), names, stages)
    if what == "next":
        held = [stage for stage in stages if frozen & names_in(frozen, [stage])]
        return names_in(names, held[-1:]) if held else set(names)
    if what == "all":
        return set(names)
    if what.startswith(_FROM):
        place = find_stage(stages, what.removeprefix(_FROM))
        return set(names) - names_in(names, stages[:place])
    if any(stage.name == what for stage in stages):
        return names_in(names, [stages[find_stage(stages, what)]])
    return FreezePlan.parse(what).frozen_names(model, stages)


def _shortest_plan(
    frozen: set[str], bn: BatchNormMode, model: nn.Module, stages: Sequence[Stage]
) -> FreezePlan:
    """Return a plan that freezes exactly these names: by stages, then modules, then names."""
    names, rest, until = parameter_names(model), frozen, None
    if not frozen >= backbone_names(names):
        for place, stage in enumerate(stages, start=1):
            leading = names_in(names, stages[:place])
            if not leading <= frozen:
                break
            until, rest = stage.name, frozen - leading
    patterns = []
    for module in find_pinned(model, rest):
        inside = {name for name in rest if name.startswith(f"{module}.")}
        patterns += [f"{escape(module)}.*"] if inside else []
        rest = rest - inside
    return FreezePlan((*patterns, *map(escape, rest)), bn, until)


def _words(what: Freeze) -> str:
    if isinstance(what, str):
        return f"`{what}`"
    if isinstance(what, Sequence):
        return ", ".join(f"`{each}`" for each in what)
    return f"what the {'plan freezes' if isinstance(what, FreezePlan) else 'callable chooses'}"


def is_batch_norm(name: str, model: nn.Module) -> bool:
    """Tell whether a parameter, by its name, is the weight or bias of a BatchNorm layer."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), _BatchNorm)
