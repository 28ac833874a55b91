"""Numbers about predictions: loss, accuracy, the confusion matrix.

This room may import `models`, `data`, `images` and what lies below.
"""

from transferkit.evaluation.evaluate import Evaluation, evaluate_model
from transferkit.evaluation.metrics import (
    accuracy,
    class_accuracies,
    confusion_matrix,
    top_k_accuracy,
)

__all__ = [
    "Evaluation",
    "accuracy",
    "class_accuracies",
    "confusion_matrix",
    "evaluate_model",
    "top_k_accuracy",
]
