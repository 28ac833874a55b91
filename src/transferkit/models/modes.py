"""Changing a model's mode for a while, and putting every module back into its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Run a block that may change modes; afterwards each module is in the mode it was in.

    Args:
        model: The model.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block with the model in eval mode; afterwards each module is in the mode it was in.

    Args:
        model: The model. Only the modes of its modules change, and only for the block.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluating(model):
        ...     model.training
        False
        >>> [module.training for module in model]
        [True, False]
    """
    with modes_kept(model):
        model.eval()
        yield
