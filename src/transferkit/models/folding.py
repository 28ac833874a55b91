"""Folding BatchNorm into the convolution before it: fewer passes over memory, the same function."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from transferkit.models.tracing import (
    CONVOLUTIONS,
    TracedPart,
    is_timm_class,
    replace_module,
    trace_parts,
)

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# timm's classes that compute what their base class computes, with "same" padding before it or
# dropout and an activation after it. Other subclasses may compute anything.
TIMM_CONVOLUTION = "Conv2dSame"
_TIMM_BATCH_NORM = "BatchNormAct2d"


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
    pairs = [pair for part in trace_parts(network) for pair in _find_pairs(part)]
    for convolution, batch_norm in pairs:
        _fold(convolution, batch_norm)
        replace_module(network, batch_norm, _rest_of(batch_norm))
    return len(pairs)


def count_batch_norms(network: nn.Module) -> int:
    """Return the number of BatchNorm layers of a network."""
    return sum(isinstance(module, _BatchNorm) for module in network.modules())


def _find_pairs(part: TracedPart) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield each convolution whose output one BatchNorm layer sees and nothing else does."""
    for node in part.nodes:
        convolution, after = part.layer(node), part.follower(node)
        batch_norm = None if after is None else part.layer(after)
        if convolution is None or batch_norm is None:
            continue
        if _are_foldable(convolution, batch_norm):
            yield convolution, batch_norm


def _are_foldable(convolution: nn.Module, batch_norm: nn.Module) -> bool:
    is_convolution = type(convolution) in CONVOLUTIONS
    is_batch_norm = type(batch_norm) in _BATCH_NORMS
    return (
        (is_convolution or is_timm_class(convolution, TIMM_CONVOLUTION))
        and (is_batch_norm or is_timm_class(batch_norm, _TIMM_BATCH_NORM))
        and not batch_norm.training
        and getattr(batch_norm, "running_mean", None) is not None
    )


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
    if is_timm_class(batch_norm, _TIMM_BATCH_NORM):
        return nn.Sequential(batch_norm.drop, batch_norm.act)
    return nn.Identity()
