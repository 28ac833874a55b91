"""What a prediction says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ClassProbability:
    """One class with its probability.

    Args:
        label: The class's name.
        index: The class's index.
        probability: Softmax of the logits over the temperature, in [0, 1].
    """

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What the model says about one picture.

    Args:
        top_k: The likeliest classes, from high to low; their probabilities sum to at most 1.
        path: The picture's path, where it came from one.
        abstains: Whether the likeliest class is less probable than the predictor's threshold.

    Example:
        >>> prediction = Prediction((ClassProbability("ants", 0, 0.9),))
        >>> prediction.label, prediction.probability
        ('ants', 0.9)
    """

    top_k: tuple[ClassProbability, ...]
    path: Path | None = None
    abstains: bool = False

    @property
    def label(self) -> str:
        """The name of the likeliest class."""
        return self.top_k[0].label

    @property
    def index(self) -> int:
        """The index of the likeliest class."""
        return self.top_k[0].index

    @property
    def probability(self) -> float:
        """The probability of the likeliest class, in [0, 1]."""
        return self.top_k[0].probability

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as plain JSON data."""
        return {
            "path": None if self.path is None else str(self.path),
            "label": self.label,
            "index": self.index,
            "probability": self.probability,
            "abstains": self.abstains,
            "top_k": [asdict(each) for each in self.top_k],
        }


@dataclass(frozen=True, eq=False)
class FeatureVector:
    """The features of one picture.

    Args:
        values: float32 `(D,)`, what the backbone gives before the head.
        path: The picture's path, where it came from one.
    """

    values: npt.NDArray[np.float32]
    path: Path | None = None


@dataclass(frozen=True)
class Failure:
    """Why a picture has no prediction, or no features.

    Args:
        reason: The message of the error.
        path: The picture's path, where it came from one.
    """

    reason: str
    path: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the failure as plain JSON data."""
        return {"path": None if self.path is None else str(self.path), "error": self.reason}
