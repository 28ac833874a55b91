"""Numbers about predictions: loss, accuracy, the confusion matrix.

This room may import `models`, `data`, `images` and what lies below.
"""

from transferkit.evaluation.evaluate import Evaluation, Metric, evaluate_model
from transferkit.evaluation.metrics import (
    accuracy,
    class_accuracies,
    confusion_matrix,
    top_k_accuracy,
)

__all__ = [
    "Evaluation",
    "Metric",
    "accuracy",
    "class_accuracies",
    "confusion_matrix",
    "evaluate_model",
    "top_k_accuracy",
]
