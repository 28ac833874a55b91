"""Prediction: from an artifact and a picture to a label.

This room may import `artifacts`, `evaluation`, `models`, `data`, `images` and what lies below,
and does not know `training`.
"""

from transferkit.inference.abstention import AbstentionReport
from transferkit.inference.bulk import predict_to_file
from transferkit.inference.bulk_report import BulkReport
from transferkit.inference.engine_choice import EngineChoice, EngineTrial, InferencePrecision
from transferkit.inference.prediction import (
    ClassProbability,
    Failure,
    FeatureVector,
    Prediction,
)
from transferkit.inference.predictor import Predictor
from transferkit.inference.results import predictions_to_dataframe
from transferkit.inference.tta import TTA

__all__ = [
    "TTA",
    "AbstentionReport",
    "BulkReport",
    "ClassProbability",
    "EngineChoice",
    "EngineTrial",
    "Failure",
    "FeatureVector",
    "InferencePrecision",
    "Prediction",
    "Predictor",
    "predict_to_file",
    "predictions_to_dataframe",
]
