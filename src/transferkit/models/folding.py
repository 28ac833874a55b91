"""Folding BatchNorm into the convolution before it: fewer passes over memory, the same function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# timm's classes that compute what their base class computes, with "same" padding before it or
# dropout and an activation after it. Other subclasses may compute anything.
_TIMM_CONVOLUTION = "Conv2dSame"
_TIMM_BATCH_NORM = "BatchNormAct2d"


class _LayerTracer(fx.Tracer):
    """Trace how layers are called one after the other, without looking into them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_layer = isinstance(m, (*_CONVOLUTIONS, _BatchNorm))
        return is_layer or super().is_leaf_module(m, module_qualified_name)


def fold_batch_norms(network: nn.Module) -> int:
    """Fold BatchNorm layers into the convolutions whose outputs they alone see, in place.

    `torch.fx` finds which layer sees what. The network still runs the Python of its own
    forward pass, with other layers: a convolution takes the weights of both, and nothing is
    left of the BatchNorm but the activation that timm puts into it. A part whose forward
    pass cannot be traced keeps its layers, but for those within its own parts.

    Args:
        network: The network, in eval mode. Its weights and modules change.

    Returns:
        The number of layers that were folded.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
        >>> fold_batch_norms(network), network[1]
        (1, Identity())
    """
    pairs = list(_find_pairs(network))
    for convolution, batch_norm in pairs:
        _fold(convolution, batch_norm)
        _replace(network, batch_norm, _rest_of(batch_norm))
    return len(pairs)


def _find_shared(network: nn.Module) -> set[int]:
    """Return the modules that have several places in a network, by their `id`."""
    places = Counter(id(module) for _, module in network.named_modules(remove_duplicate=False))
    return {module for module, count in places.items() if count > 1}


def count_batch_norms(network: nn.Module) -> int:
    """Return the number of BatchNorm layers of a network."""
    return sum(isinstance(module, _BatchNorm) for module in network.modules())


def _find_pairs(network: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield each convolution whose output one BatchNorm layer sees and nothing else does."""
    try:
        nodes = list(_LayerTracer().trace(network).nodes)
    except Exception:  # Whatever Python a forward pass runs on a stand-in for a tensor.
        # What stands in several of its parts may be called by each of them.
        shared = _find_shared(network)
        for child in network.children():
            yield from (pair for pair in _find_pairs(child) if shared.isdisjoint(map(id, pair)))
        return
    modules = dict(network.named_modules())
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr"}
    for node in nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        names = (str(before.target), str(node.target))
        alone = len(before.users) == 1 and all(calls[name] == 1 for name in names)
        first, second = (modules[name] for name in names)
        if alone and read.isdisjoint(names) and _are_foldable(first, second):
            yield first, second


def _are_foldable(convolution: nn.Module, batch_norm: nn.Module) -> bool:
    is_pair = (type(convolution) in _CONVOLUTIONS or _is_timm(convolution, _TIMM_CONVOLUTION)) and (
        type(batch_norm) in _BATCH_NORMS or _is_timm(batch_norm, _TIMM_BATCH_NORM)
    )
    return (
        is_pair
        and not batch_norm.training
        and getattr(batch_norm, "running_mean", None) is not None
        and not _has_hooks(convolution)
        and not _has_hooks(batch_norm)
    )


def _is_timm(module: nn.Module, name: str) -> bool:
    kind = type(module)
    return kind.__name__ == name and kind.__module__.partition(".")[0] == "timm"


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


@torch.no_grad()
def _fold(convolution: Any, batch_norm: Any) -> None:
    """Give the convolution the weights of both layers, computed in double precision."""
    weight, bias = convolution.weight, convolution.bias
    scale = (batch_norm.running_var.double() + batch_norm.eps).rsqrt()
    if batch_norm.weight is not None:
        scale = scale * batch_norm.weight.double()
    shift = -batch_norm.running_mean.double()
    if bias is not None:
        shift = shift + bias.double()
    shift = shift * scale
    if batch_norm.bias is not None:
        shift = shift + batch_norm.bias.double()
    scaled = weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))
    convolution.weight = nn.Parameter(scaled.to(weight.dtype), requires_grad=False)
    convolution.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)


def _rest_of(batch_norm: Any) -> nn.Module:
    if _is_timm(batch_norm, _TIMM_BATCH_NORM):
        return nn.Sequential(batch_norm.drop, batch_norm.act)
    return nn.Identity()


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under each of its names."""
    for parent in network.modules():
        for name, child in parent._modules.items():  # `named_children` names each once.
            if child is old:
                parent._modules[name] = new
