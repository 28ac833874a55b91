"""Activation checkpointing: forget what a stage computed, and compute it again for its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from transferkit.models.classifier import Classifier


@contextmanager
def recomputing(model: Classifier) -> Iterator[None]:
    """Run a block in which training keeps only what goes into each stage of the backbone.

    What is in between is computed once more in the backward pass: about a third more time for
    memory that grows with the largest stage instead of with all of them. The results are the
    same. Stages without modules in them, such as a single convolution, are kept as they are.

    Args:
        model: The model. Its forward pass is changed within the block only.

    References:
        Chen, Xu, Zhang and Guestrin, Training Deep Nets with Sublinear Memory Cost, 2016,
        https://arxiv.org/abs/1604.06174.
    """
    paths = [path for stage in model.stages for path in stage.modules]
    modules = [model.backbone.get_submodule(path) for path in paths]
    changed = [each for each in modules if next(each.children(), None) is not None]
    own = [each.__dict__.get("forward") for each in changed]
    try:
        for module in changed:
            module.forward = _recomputed(module, module.forward)
        yield
    finally:
        for module, forward in zip(changed, own, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:  # One that was set on this very module.
                module.forward = forward


def _recomputed(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any, **options: Any) -> Any:
        return checkpoint(
            forward, *inputs, use_reentrant=False, context_fn=lambda: _contexts(module), **options
        )

    return run


_Context: TypeAlias = "AbstractContextManager[None]"


def _contexts(module: nn.Module) -> tuple[_Context, _Context]:
    """Return what the first and the second computation run in."""
    return nullcontext(), _statistics_kept(module)


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Run a block in which BatchNorm's statistics take nothing in from its batches.

    They took the batch in when it was computed first; they must not take it twice.
    """
    layers = [each for each in module.modules() if isinstance(each, _BatchNorm) and each.training]
    before = [(layer, layer.momentum, _count_of(layer)) for layer in layers]
    try:
        for layer in layers:
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum, count in before:
            layer.momentum = momentum
            if count is not None and layer.num_batches_tracked is not None:
                layer.num_batches_tracked.copy_(count)


def _count_of(layer: _BatchNorm) -> Tensor | None:
    return None if layer.num_batches_tracked is None else layer.num_batches_tracked.clone()
