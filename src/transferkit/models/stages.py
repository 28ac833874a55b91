"""Stages: the parts of a backbone that a picture passes one after the other, by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from transferkit.errors import BackboneError, FreezeError, unknown_name


@dataclass(frozen=True)
class Stage:
    """A part of a backbone that can be frozen as one, up to which a prefix can be cut.

    Args:
        name: The path of its first module with weights, such as "layer3" or "blocks.2".
        modules: The paths of its modules within the backbone, in their order. Modules
            without parameters, and normalisation on its own, belong to the stage before them;
            dropout, and what follows it, belongs to the stage after it, whose input it thins
            out.
        parameters: Parameters that belong to no module of a stage, such as a class token.

    Example:
        >>> Stage("conv1", ("conv1", "bn1")).holds("bn1.weight")
        True
    """

    name: str
    modules: tuple[str, ...]
    parameters: tuple[str, ...] = ()

    def holds(self, name: str) -> bool:
        """Tell whether a parameter or module of the backbone, by its path, lies in this stage."""
        return name in self.parameters or any(
            name == module or name.startswith(f"{module}.") for module in self.modules
        )


def find_stages(backbone: nn.Module, parents: Sequence[str] = ()) -> tuple[Stage, ...]:
    """Find the stages of a backbone: its children, and the children of some of them.

    Args:
        backbone: The network without its head.
        parents: The paths of modules that are no stage themselves, nor what they lie in:
            their children are.

    Returns:
        The stages in the order in which the modules are defined, which for nearly all networks
        is that in which they run. Empty where no module of the backbone has parameters.

    Raises:
        BackboneError: There is no module of one of these paths.

    Example:
        >>> network = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()
        ... )
        >>> [(stage.name, stage.modules) for stage in find_stages(network)]
        [('0', ('0', '1', '2')), ('3', ('3', '4'))]
    """
    for path in parents:
        try:
            backbone.get_submodule(path)
        except AttributeError as error:
            children = ", ".join(name for name, _ in backbone.named_children())
            raise BackboneError(
                f"The backbone has no module `{path}`, whose children should be stages. "
                f"Its children are: {children}."
            ) from error
    groups: dict[str, list[str]] = {}
    last: list[str] = []
    waiting: list[str] = []  # Modules that belong to the next stage.
    opened = _with_ancestors(parents)
    for path, module in _units(backbone, "", opened):
        if _starts_stage(module) or (not groups and _has_parameters(module)):
            groups[path] = last = [*waiting, path]
            waiting = []
        elif waiting or not groups or _drops(module):
            waiting.append(path)
        else:
            last.append(path)
    last += waiting
    loose = tuple(_loose_parameters(backbone, opened))
    return tuple(
        Stage(name, tuple(group), loose if number == 0 else ())
        for number, (name, group) in enumerate(groups.items())
    )


def _with_ancestors(paths: Sequence[str]) -> list[str]:
    """Return the paths and those of the modules around them, each once."""
    pieces = [path.split(".") for path in paths]
    return list(
        dict.fromkeys(".".join(each[: end + 1]) for each in pieces for end in range(len(each)))
    )


def _units(module: nn.Module, path: str, parents: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if inner in parents:
            yield from _units(child, inner, parents)
        else:
            yield inner, child


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _starts_stage(module: nn.Module) -> bool:
    """Tell whether a module has parameters beside those of normalisation."""
    return any(
        "Norm" not in type(each).__name__ and next(each.parameters(recurse=False), None) is not None
        for each in module.modules()
    )


def _drops(module: nn.Module) -> bool:
    """Tell whether a module does nothing but drop values, by the names of the classes in it."""
    drops = any("Drop" in type(each).__name__ for each in module.modules())
    return drops and not _has_parameters(module)


def _loose_parameters(backbone: nn.Module, parents: Sequence[str]) -> Iterator[str]:
    for path in ("", *parents):
        for name, _ in backbone.get_submodule(path).named_parameters(recurse=False):
            yield f"{path}.{name}" if path else name


def find_stage(stages: Sequence[Stage], name: str) -> int:
    """Return the place of the stage called `name`.

    Raises:
        FreezeError: The backbone has no stages.
        UnknownNameError: There is no such stage; the nearest name is suggested.
    """
    names = [stage.name for stage in stages]
    if not names:
        raise FreezeError(f"There is no stage `{name}`: the backbone has no stages.")
    if name not in names:
        raise unknown_name("stage", name, names, lister="[stage.name for stage in model.stages]")
    return names.index(name)
