"""`FeatureCache`: how the features of a frozen part are computed once and kept, as data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from transferkit._checks import check_choice, check_integer, check_number, check_path
from transferkit.errors import ConfigError
from transferkit.models.engines import EngineName, Precision

Views: TypeAlias = 'int | Literal["epochs"]'

DEFAULT_VIEWS = 4


@dataclass(frozen=True, kw_only=True)
class FeatureCache:
    """Say how the features of the frozen part of a network are computed once and kept.

    Args:
        views: How many augmented views of each training picture are computed; epoch e uses
            view e mod `views`. 0 takes the evaluation view alone, without augmentation.
            "epochs" computes a new view for every epoch and keeps none: the very pictures
            that training without a cache sees.
        engine: What computes them: "pytorch", or "openvino" or "onnxruntime" where the extra
            `openvino` or `onnx` is installed.
        precision: "float32", or "bfloat16" where the processor has it: faster, with features
            that differ by up to about a hundredth.
        memory_bytes: Features are held in memory up to so many bytes, 1 GiB by default, the
            rest in a memory-mapped temporary file.
        folder: Keep features here for later runs, under a key of everything that they depend
            on; None keeps none.
        batch_size: Pictures in a batch of the frozen part; "auto" takes the size that is
            fastest on this machine.
        tolerance: How far features that are computed anew for comparison may differ, relative
            to the largest; None takes 0.0001 on the CPU, 0.01 on an accelerator, and 0.06 for
            bfloat16.

    Raises:
        ConfigError: A value cannot work.

    Example:
        >>> FeatureCache(views=0).views
        0
    """

    views: Views = DEFAULT_VIEWS
    engine: EngineName = "pytorch"
    precision: Precision = "float32"
    memory_bytes: int = 2**30
    folder: str | os.PathLike[str] | None = None
    batch_size: int | Literal["auto"] = "auto"
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.views != "epochs":
            try:
                check_integer("views", self.views, minimum=0)
            except ConfigError:
                raise ConfigError(
                    f'`views` should be "epochs" or an integer of at least 0, found {self.views!r}.'
                ) from None
        for name, kind in (("engine", EngineName), ("precision", Precision)):
            check_choice(name, getattr(self, name), get_args(kind))
        check_integer("memory_bytes", self.memory_bytes, minimum=0)
        if self.batch_size != "auto":
            check_integer("batch_size", self.batch_size, minimum=1)
        if self.folder is not None:
            check_path("folder", self.folder)
        if self.tolerance is not None:
            check_number("tolerance", self.tolerance, lambda value: value > 0, "above 0")

    def describe(self, epochs: int | None = None) -> str:
        """Say in words what is computed.

        Args:
            epochs: In so many epochs, which may show fewer views; None for all.

        Example:
            >>> FeatureCache().describe()
            '4 augmented views of each training picture, by pytorch in float32'
        """
        views = "a new augmented view in every epoch"
        if self.views != "epochs":
            count = self.views if epochs is None else self.num_passes(epochs)
            views = f"{count} augmented view{'s' if count > 1 else ''}"
        views = views if self.views else "the evaluation view"
        return f"{views} of each training picture, by {self.engine} in {self.precision}"

    def views_of(self, epochs: range) -> frozenset[int]:
        """Return the numbers of the views that epochs, numbered from 1, show; 0 is evaluation's.

        Example:
            >>> sorted(FeatureCache(views=3).views_of(range(3, 5)))
            [1, 3]
        """
        if self.views == "epochs":
            return frozenset(epochs)
        return frozenset((epoch - 1) % self.views + 1 if self.views else 0 for epoch in epochs)

    def num_passes(self, epochs: int) -> int:
        """Return how often the frozen part sees each training picture in so many epochs."""
        return epochs if self.views == "epochs" else max(1, min(int(self.views), epochs))
