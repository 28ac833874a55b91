"""Convolutions that apply the activation after them, and keep their weights as kernels want them.

On the CPU PyTorch's convolutions are those of oneDNN, which can apply an activation to what is
still in the cache, and which brings weights into an order of its own in each call unless they
are in it already. `torch.compile` makes use of both, by operators that eager PyTorch leaves alone;
they are called here without a compiler.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from transferkit._seeding import generator_for
from transferkit.models.conversion import relative_difference
from transferkit.models.folding import TIMM_CONVOLUTION
from transferkit.models.tracing import (
    TracedPart,
    is_timm_class,
    replace_module,
    trace_parts,
)

_Attribute: TypeAlias = "tuple[str, list[float | None], str]"
"""An activation as oneDNN's operator takes it: name, numbers, and the way to compute it."""

_ATTRIBUTES: dict[type[nn.Module], Callable[[Any], _Attribute]] = {
    nn.ReLU: lambda _: ("relu", [], ""),
    nn.ReLU6: lambda _: ("hardtanh", [0.0, 6.0], ""),
    nn.Hardtanh: lambda layer: ("hardtanh", [float(layer.min_val), float(layer.max_val)], ""),
    nn.LeakyReLU: lambda layer: ("leaky_relu", [float(layer.negative_slope)], ""),
    nn.Hardswish: lambda _: ("hardswish", [], ""),
    nn.SiLU: lambda _: ("swish", [], ""),
}
_NO_ACTIVATION: _Attribute = ("none", [], "")
_TOLERANCE = 1e-5
# Not annotated, and not part of the documented interface: `has_fused_convolutions` tries them.
_OPERATORS: Any = torch.ops.mkldnn
_BINDINGS: Any = torch._C._nn


class _Packed:
    """Weights in the order of oneDNN's kernels, which all copies of a convolution share."""

    def __init__(self) -> None:
        self.weight: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Packed:
        return self


class FusedConvolution(nn.Conv2d):
    """A convolution with the activation after it, on the CPU, in float32, without gradients.

    The weights are those of the convolution that it is made from when it first runs.

    Args:
        convolution: The convolution.
        activation: The activation; None applies none.
    """

    def __init__(self, convolution: nn.Conv2d, activation: nn.Module | None) -> None:
        nn.Module.__init__(self)
        # All that anybody may ask a convolution for.
        self.__dict__.update(convolution.__dict__)
        self._pad: Any = None
        if is_timm_class(convolution, TIMM_CONVOLUTION):
            self._pad = importlib.import_module("timm.layers").pad_same
        self._packed = _Packed()
        self._attribute = _NO_ACTIVATION
        if activation is not None:
            self._attribute = _ATTRIBUTES[type(activation)](activation)

    def forward(self, images: Tensor) -> Tensor:
        """Return float32 `(N, C, H, W)` for images `(N, C, H, W)`, or without N for one image."""
        if images.dim() == 3:
            outputs: Tensor = self(images[None])[0]
            return outputs
        if self._pad is not None:
            images = self._pad(images, self.kernel_size, self.stride, self.dilation)
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        if self._packed.weight is None:
            # Of other sizes of images, kernels may want another order: they see to it.
            self._packed.weight = _BINDINGS.mkldnn_reorder_conv2d_weight(
                self.weight.contiguous().to_mkldnn(), *geometry, images.shape
            )
        outputs = _OPERATORS._convolution_pointwise(
            images, self._packed.weight, self.bias, *geometry, *self._attribute
        )
        return outputs


def fuse_convolutions(network: nn.Module) -> int:
    """Let convolutions apply the activations that alone see their outputs, in place.

    Those without such an activation keep their weights in the order of the kernels, too. What
    cannot be traced stays as it is, as for `fold_batch_norms`, which comes first.

    Args:
        network: The network, in eval mode, on the CPU, in float32. Its modules change; it must
            not be trained afterwards.

    Returns:
        The number of convolutions that were replaced; 0 where this PyTorch cannot do it.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
        >>> fuse_convolutions(network) in (0, 1)  # 0 on processors without oneDNN.
        True
    """
    if not has_fused_convolutions():
        return 0
    pairs = [pair for part in trace_parts(network) for pair in _find_pairs(part)]
    for convolution, activation in pairs:
        if activation is not None:
            replace_module(network, activation, nn.Identity())
        replace_module(network, convolution, FusedConvolution(convolution, activation))
    return len(pairs)


def _find_pairs(part: TracedPart) -> Iterator[tuple[nn.Conv2d, nn.Module | None]]:
    """Yield each convolution that can be replaced, with the activation that it may apply."""
    for node in part.nodes:
        convolution = part.layer(node)
        if not _is_fusible(convolution):
            continue
        after = part.follower(node)
        while after is not None and isinstance(part.layer(after), nn.Identity):
            after = part.follower(after)
        layer = None if after is None else part.layer(after)
        yield convolution, layer if type(layer) in _ATTRIBUTES else None  # type: ignore[misc]


def _is_fusible(layer: nn.Module | None) -> bool:
    return (
        isinstance(layer, nn.Conv2d)
        and (type(layer) is nn.Conv2d or is_timm_class(layer, TIMM_CONVOLUTION))
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and layer.weight.dtype == torch.float32
    )


@functools.cache
def has_fused_convolutions() -> bool:
    """Return whether oneDNN's operators are there and compute what they should.

    They are not part of PyTorch's documented interface, so that they are tried.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    draw = functools.partial(torch.randn, generator=generator_for(0), dtype=torch.float32)
    # Far enough from 0 for the activation to cut off on both sides.
    images = 5 * draw(2, 8, 9, 9)
    convolution = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2, device="meta")
    convolution.weight, convolution.bias = (
        nn.Parameter(draw(each.shape), requires_grad=False) for each in convolution.parameters()
    )
    try:
        # Whatever the caller computes in.
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            found = FusedConvolution(convolution, nn.ReLU6())(images)
            expected = functional.relu6(convolution(images))
    except Exception:  # Another version of PyTorch may raise anything.
        return False
    return relative_difference(found, expected) <= _TOLERANCE
