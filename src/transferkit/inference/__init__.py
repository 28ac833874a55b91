"""Prediction: from an artifact and a picture to a label.

This room may import `artifacts`, `evaluation`, `models`, `data`, `images` and what lies below,
and does not know `training`.
"""

from transferkit.inference.prediction import ClassProbability, Failure, Prediction
from transferkit.inference.predictor import Predictor

__all__ = ["ClassProbability", "Failure", "Prediction", "Predictor"]
