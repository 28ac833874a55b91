"""`model.summary()`: what a classifier consists of and what of it trains, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from transferkit.models.classifier import Classifier
from transferkit.models.modes import evaluating, modes_kept

_COLUMNS = ("stage", "modules", "output", "parameters", "trains", "BatchNorm")
_RIGHT = {3, 4}  # The columns of numbers.


@dataclass(frozen=True)
class StageSummary:
    """What there is to know about a stage of the backbone, or about the head.

    Args:
        name: The stage's name, or "head".
        modules: The classes of its modules, in their order; an `nn.Sequential` is given by
            what is in it.
        output_shape: The shape of what it gives for one image, without the batch; None where
            none of its modules is called or gives a tensor.
        num_parameters: The number of its parameters.
        num_trainable: The number of those that train.
        batch_norm: What its BatchNorm layers do in training, in the words of `FreezePlan`:
            "frozen" where all of them stands still, "train" where they train, "adapt" where
            only the statistics move, "fixed" where only the weights do; several where they
            differ, none where there are no such layers.
    """

    name: str
    modules: tuple[str, ...]
    output_shape: tuple[int, ...] | None
    num_parameters: int
    num_trainable: int
    batch_norm: tuple[str, ...]


@dataclass(frozen=True)
class ModelSummary:
    """What a classifier consists of, stage by stage.

    Args:
        backbone_name: The backbone's name.
        image_shape: The shape of an image, `(C, H, W)`.
        stages: The stages in their order, the head last.
    """

    backbone_name: str
    image_shape: tuple[int, ...]
    stages: tuple[StageSummary, ...]

    @property
    def num_parameters(self) -> int:
        """The number of all parameters."""
        return sum(stage.num_parameters for stage in self.stages)

    @property
    def num_trainable(self) -> int:
        """The number of parameters that train."""
        return sum(stage.num_trainable for stage in self.stages)

    def __str__(self) -> str:
        """Return the table, a line for each stage and one with the sums."""
        rows = [_COLUMNS, *(_cells(stage) for stage in self.stages)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
        lines = [_line(row, widths) for row in rows]
        lines.insert(1, "-" * len(lines[0]))
        shape = "x".join(map(str, self.image_shape))
        end = (
            f"{self.backbone_name} for images of {shape}: {self.num_trainable:,} of "
            f"{self.num_parameters:,} parameters train, "
            f"{self.num_parameters - self.num_trainable:,} are frozen"
        )
        return "\n".join([*lines, end])


def summarize(model: Classifier) -> ModelSummary:
    """Describe a classifier; one image of zeros is run through it.

    Args:
        model: The model; its modes and weights are left as they are.

    Returns:
        A row for each stage and one for the head.

    Example:
        >>> from transferkit.models import build_model
        >>> model = build_model("resnet18", 2, weights=None, freeze="until:layer3")
        >>> [stage.num_trainable for stage in summarize(model).stages]
        [0, 0, 0, 0, 8393728, 1026]
    """
    size = model.preprocess.crop_size
    image_shape = (model.preprocess.num_channels, size, size)
    groups = list(_groups(model))
    shapes = _output_shapes(
        model, [each for group in groups for each in group.modules], image_shape
    )
    with modes_kept(model):
        model.train()
        stages = tuple(_describe(group, shapes) for group in groups)
    return ModelSummary(model.backbone_name, image_shape, stages)


@dataclass(frozen=True)
class _Group:
    """What makes a row of the table."""

    name: str
    modules: list[nn.Module]
    loose: list[nn.Parameter]


def _groups(model: Classifier) -> Iterator[_Group]:
    if not model.stages:
        yield _Group("backbone", [model.backbone], [])
    for stage in model.stages:
        modules = [model.backbone.get_submodule(path) for path in stage.modules]
        seen = [each for each in modules if not isinstance(each, nn.Identity)]
        loose = [model.backbone.get_parameter(path) for path in stage.parameters]
        yield _Group(stage.name, seen, loose)
    yield _Group("head", [model.head], [])


def _describe(group: _Group, shapes: Mapping[nn.Module, tuple[int, ...]]) -> StageSummary:
    """Describe a stage of a model that is in training mode."""
    own = [each for module in group.modules for each in module.parameters()]
    parameters = [*group.loose, *own]
    layers = [each for module in group.modules for each in module.modules()]
    modes = [_batch_norm_mode(each) for each in layers if isinstance(each, _BatchNorm)]
    known = [shapes[module] for module in group.modules if module in shapes]
    return StageSummary(
        name=group.name,
        modules=tuple(name for module in group.modules for name in _class_names(module)),
        output_shape=known[-1] if known else None,
        num_parameters=sum(each.numel() for each in parameters),
        num_trainable=sum(each.numel() for each in parameters if each.requires_grad),
        batch_norm=tuple(dict.fromkeys(modes)),
    )


def _class_names(module: nn.Module) -> Iterator[str]:
    if type(module) is nn.Sequential:
        for each in module:
            yield from _class_names(each)
    elif not isinstance(module, nn.Identity):
        yield type(module).__name__


def _batch_norm_mode(layer: _BatchNorm) -> str:
    """Tell what a layer does, by its mode and by whether its weight or bias trains."""
    trains = any(each.requires_grad for each in layer.parameters())
    if layer.training:
        return "train" if trains else "adapt"
    return "fixed" if trains else "frozen"


def _output_shapes(
    model: Classifier, modules: Iterable[nn.Module], image_shape: tuple[int, ...]
) -> dict[nn.Module, tuple[int, ...]]:
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            shapes[module] = tuple(output.shape[1:])

    handles = [module.register_forward_hook(note) for module in modules]
    parameter = next(model.parameters())
    try:
        with evaluating(model), torch.no_grad():
            model(torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _cells(stage: StageSummary) -> tuple[str, ...]:
    counts = Counter(stage.modules)
    names = [name if count == 1 else f"{count} {name}" for name, count in counts.items()]
    shape = "-" if stage.output_shape is None else "x".join(map(str, stage.output_shape))
    return (
        stage.name,
        ", ".join(names) or "-",
        shape,
        f"{stage.num_parameters:,}",
        _share(stage),
        ", ".join(stage.batch_norm) or "-",
    )


def _share(stage: StageSummary) -> str:
    if stage.num_parameters == 0:
        return "-"
    if stage.num_trainable == 0:
        return "frozen"
    if stage.num_trainable == stage.num_parameters:
        return "all"
    return f"{stage.num_trainable:,} of them"


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [
        cell.rjust(width) if column in _RIGHT else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
