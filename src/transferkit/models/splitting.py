"""Cutting a backbone in two at the end of a stage: a prefix and a suffix that share its modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from transferkit.models.modes import evaluating, modes_kept
from transferkit.models.stages import Stage

_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Split:
    """Two networks that one after the other compute what the backbone computes.

    Their modules are the backbone's own, so that they train, freeze and change mode with it.
    The suffix leaves the activations that it is given as they are.

    Args:
        prefix: From images `(N, C, H, W)` to activations `(N, ...)`.
        suffix: From activations to features `(N, D)`.
        num_stages: The number of stages in the prefix.
    """

    prefix: nn.Module
    suffix: nn.Module
    num_stages: int

    @property
    def is_whole(self) -> bool:
        """Whether the whole backbone is in the prefix."""
        return isinstance(self.suffix, nn.Identity)


def split_backbone(
    backbone: nn.Module, stages: Sequence[Stage], counts: Iterable[int], images: Tensor
) -> Split | None:
    """Cut a backbone after its first stages.

    The forward pass of the backbone itself is traced with `torch.fx`; the modules of its
    stages are taken as they are, with whatever Python they run. A forward pass that itself
    does something else in training than in evaluation, such as calling
    `F.dropout(x, training=self.training)`, is not cut.

    Args:
        backbone: The network; it is not changed.
        stages: Its stages.
        counts: Numbers of stages in the prefix, tried in this order. All stages make the
            whole backbone the prefix, which needs no tracing.
        images: Some images `(N, C, H, W)` to compare the two parts with the backbone by, where
            it is cut: at least two, so that it shows that the activations are `(N, ...)`.

    Returns:
        The two parts. None where the backbone cannot be cut there: its forward pass cannot
        be traced, or something else than one tensor `(N, ...)` crosses the cut.

    Example:
        >>> import torch
        >>> from transferkit.models.stages import find_stages
        >>> network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> x = torch.ones(5, 4)
        >>> split = split_backbone(network, find_stages(network), [1], x)
        >>> bool((split.suffix(split.prefix(x)) == network(x)).all())
        True
    """
    nodes: list[fx.Node] | None = None
    for count in counts:
        if count == len(stages):
            return Split(backbone, nn.Identity(), count)
        if nodes is None:
            nodes = _trace(backbone, stages)
        split = _cut(backbone, nodes, stages, count)
        if split is not None and _agrees(split, backbone, images):
            return split
    return None


class _OutlineTracer(fx.Tracer):
    """Trace how a network calls the modules of its stages, without looking into them."""

    proxy_buffer_attributes = True  # Else what it computes of its buffers would be a constant.

    def __init__(self, stages: Sequence[Stage]) -> None:
        super().__init__()
        paths = [module for stage in stages for module in stage.modules]
        self._open = {
            ".".join(path.split(".")[:depth])
            for path in paths
            for depth in range(path.count(".") + 1)
        }

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._open

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], *others: Any, **options: Any
    ) -> Any:
        if kind == "placeholder" and args:
            return args[0]  # An argument beside the images, with its default.
        return super().create_proxy(kind, target, args, *others, **options)

    def get_fresh_qualname(self, prefix: str) -> str:
        raise NotImplementedError("A constant tensor would be written into the backbone.")


def _trace(backbone: nn.Module, stages: Sequence[Stage]) -> list[fx.Node]:
    """Return the nodes of the forward pass; none where it has no single, traceable course."""
    graphs = []
    with modes_kept(backbone):
        for training in (True, False):
            for module in backbone.modules():
                module.training = training  # Not `train()`: networks have their own.
            try:
                graphs.append(_OutlineTracer(stages).trace(backbone))
            except Exception:  # Whatever Python a forward pass runs on a stand-in for a tensor.
                return []
    first, second = (graph.python_code("self").src for graph in graphs)
    return list(graphs[0].nodes) if first == second else []


def _cut(
    backbone: nn.Module, nodes: Sequence[fx.Node], stages: Sequence[Stage], count: int
) -> Split | None:
    place = _find_cut(nodes, stages[count:])
    if place is None:
        return None
    early = set(nodes[:place])
    crossing = [node for node in early if any(user not in early for user in node.users)]
    if len(crossing) != 1:
        return None
    prefix, suffix = _cut_graph(nodes, place, crossing[0])
    return Split(fx.GraphModule(backbone, prefix), fx.GraphModule(backbone, suffix), count)


def _find_cut(nodes: Sequence[fx.Node], later: Sequence[Stage]) -> int | None:
    """Return the place of the first node that runs something of the later stages."""
    for place, node in enumerate(nodes):
        if node.op in ("call_module", "get_attr") and isinstance(node.target, str):
            target = node.target
            if any(stage.holds(target) for stage in later):
                return place
    return None


def _cut_graph(
    nodes: Sequence[fx.Node], place: int, crossing: fx.Node
) -> tuple[fx.Graph, fx.Graph]:
    prefix, suffix = fx.Graph(), fx.Graph()
    early: dict[fx.Node, fx.Node] = {}
    for node in nodes[:place]:
        early[node] = prefix.node_copy(node, lambda each: early[each])
    prefix.output(early[crossing])
    # What comes next may work in place, such as nn.ReLU(inplace=True).
    activations = suffix.call_method("clone", (suffix.placeholder("activations"),))
    late = {crossing: activations}
    for node in nodes[place:]:
        late[node] = suffix.node_copy(node, lambda each: late[each])
    for each in (prefix, suffix):
        each.lint()
    return prefix, suffix


def _agrees(split: Split, backbone: nn.Module, images: Tensor) -> bool:
    """Tell whether the parts compute what the backbone computes, from activations `(N, ...)`."""
    with evaluating(backbone), torch.no_grad():
        wanted = backbone(images)
        activations = split.prefix(images)
        if not isinstance(activations, Tensor) or activations.shape[:1] != images.shape[:1]:
            return False
        found = split.suffix(activations)
    scale = float(wanted.abs().max())
    return torch.allclose(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE * scale)
