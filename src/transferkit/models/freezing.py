"""Freezing: which parameters do not train, as data, and what that means for their modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from transferkit.errors import FreezeError

BatchNormMode: TypeAlias = Literal["frozen", "adapt", "fixed"]


@dataclass(frozen=True)
class FreezePlan:
    """Say which parameters are frozen, by glob patterns over their names.

    A frozen parameter does not require grad. A module whose parameters are all frozen is
    pinned in eval mode through every `train()`: its BatchNorm statistics, dropout and
    stochastic depth stand still too.

    Args:
        patterns: Globs over parameter names; `*` crosses dots: "backbone.layer1.*".
        bn: "frozen" keeps the BatchNorm statistics of frozen modules as they are;
            "adapt" lets them follow the training batches, as a plain loop does that only
            sets `requires_grad = False`; "fixed" keeps those of all modules as they are,
            also of modules that train, which spares a few hundred pictures the noise of
            small batches.

    Raises:
        FreezeError: `bn` is none of these, or is "adapt" where nothing is frozen.

    Example:
        >>> FreezePlan.parse("backbone")
        FreezePlan(patterns=('backbone.*',), bn='frozen')
    """

    patterns: tuple[str, ...] = ()
    bn: BatchNormMode = "frozen"

    def __post_init__(self) -> None:
        if self.bn not in get_args(BatchNormMode):
            raise FreezeError(f'`bn` should be "frozen", "adapt" or "fixed", found {self.bn!r}.')
        if self.bn == "adapt" and not self.patterns:
            raise FreezeError(
                'bn="adapt" has no effect where nothing is frozen: BatchNorm trains anyway. '
                'Leave it out, or freeze something, such as freeze="backbone".'
            )

    @classmethod
    def parse(
        cls, freeze: str | Sequence[str] | FreezePlan, *, bn: BatchNormMode = "frozen"
    ) -> FreezePlan:
        """Build a plan from what `build_model` takes.

        Args:
            freeze: "none", "backbone", a glob over parameter names, several of them, or
                a plan, which is returned as it is.
            bn: See `FreezePlan`.

        Returns:
            The plan.

        Raises:
            FreezeError: It is none of these, or `bn` does not fit or contradicts the plan.
        """
        if isinstance(freeze, FreezePlan):
            if bn not in ("frozen", freeze.bn):
                raise FreezeError(f"The freeze plan says bn={freeze.bn!r}, the argument bn={bn!r}.")
            return freeze
        if isinstance(freeze, str):
            shortcuts: dict[str, tuple[str, ...]] = {"none": (), "backbone": ("backbone.*",)}
            return cls(shortcuts.get(freeze, (freeze,)), bn)
        patterns = tuple(freeze) if isinstance(freeze, Sequence) else ()
        if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
            raise FreezeError(
                f'`freeze` should be "none", "backbone", a glob over parameter names or a list '
                f"of globs, found {freeze!r}."
            )
        return cls(patterns, bn)

    def frozen_names(self, model: nn.Module) -> set[str]:
        """Return the names of the model's parameters that the plan freezes.

        Raises:
            FreezeError: A pattern matches no parameter.
        """
        names = [name for name, _ in model.named_parameters()]
        frozen: set[str] = set()
        for pattern in self.patterns:
            matches = {name for name in names if fnmatchcase(name, pattern)}
            if not matches:
                raise FreezeError(_no_match(pattern, names))
            frozen |= matches
        return frozen

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON data."""
        return {"patterns": list(self.patterns), "bn": self.bn}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FreezePlan:
        """Build the plan from what `to_dict` returned."""
        return cls(tuple(data["patterns"]), data["bn"])


def _no_match(pattern: str, names: Sequence[str]) -> str:
    text = f"The freeze pattern `{pattern}` matches no parameter."
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"{text} Did you mean `{pattern}.*`?"
    prefixes = sorted({".".join(name.split(".")[:2]) for name in names})
    return f"{text} The parameters' names start with: {', '.join(prefixes)}."


def find_pinned(model: nn.Module, frozen: set[str]) -> list[str]:
    """Return the topmost modules whose parameters are all frozen, by name.

    Args:
        model: The model; its root is never among them.
        frozen: The names of the frozen parameters.

    Returns:
        Module names, none of which lies within another.
    """
    pinned: list[str] = []
    for name, module in model.named_modules():
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
        inside = any(name.startswith(f"{outer}.") for outer in pinned)
        if name and own and not inside and frozen.issuperset(own):
            pinned.append(name)
    return pinned


def pin(module: nn.Module, bn: BatchNormMode) -> None:
    """Put a frozen module into eval mode, its BatchNorm layers into the mode that `bn` says."""
    module.eval()
    if bn == "adapt":
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                layer.train()
