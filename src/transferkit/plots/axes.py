"""What the drawing functions give back."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy.typing as npt

AxesArray: TypeAlias = "npt.NDArray[Any]"
"""An array of Axes, object dtype, in reading order."""
