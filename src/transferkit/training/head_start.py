"""Where the head starts: at random, from features, or from the pretrained classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

from transferkit.data import ImageSplits
from transferkit.errors import ConfigError
from transferkit.models import Classifier
from transferkit.models.features import compute_features
from transferkit.models.head_starts import LinearStart, class_means, ridge
from transferkit.models.heads import set_linear
from transferkit.models.logistic import logistic
from transferkit.models.pretrained_head import (
    Fitting,
    PretrainedHead,
    match_class_names,
    pretrained_rows,
)
from transferkit.training.loading import Loading

HeadStart: TypeAlias = "str | Mapping[str, Fitting] | None"
"""None leaves the head as it is; "class_means", "ridge" and "logistic" fit it to the features of
the training pictures; "pretrained" takes the rows of the pretrained classifier whose names fit,
and a mapping says which they are where names do not."""

_FITTED = {"class_means": class_means, "ridge": ridge, "logistic": logistic}


def check_head_start(start: HeadStart, model: Classifier, data: ImageSplits) -> HeadStart:
    """Return the start.

    Raises:
        ConfigError: There is no such start, or it does not fit the model or its classes.
    """
    if start is None:
        return start
    is_fitted = isinstance(start, str) and start in _FITTED
    if is_fitted or start == "pretrained" or isinstance(start, Mapping):
        if model.head_spec.kind == "mlp":
            name = start if isinstance(start, str) else "pretrained"
            raise ConfigError(
                f'head_start="{name}" writes a linear classifier into the head, which a head of '
                f'the kind "mlp" cannot take. Build the model with head="linear", or leave '
                f"`head_start` out."
            )
        if not is_fitted:
            _find_rows(start, model, data)
        return start
    names = ", ".join(f'"{name}"' for name in (*_FITTED, "pretrained"))
    raise ConfigError(
        f"`head_start` should be None, {names} or a mapping from class names to those of the "
        f"pretrained classifier, found {start!r}."
    )


def start_head(
    start: HeadStart, model: Classifier, data: ImageSplits, loading: Loading
) -> dict[str, Any] | None:
    """Write the start into the model's head, in place.

    Args:
        start: The start, checked.
        model: The model.
        data: The splits; features are those of the training pictures, without augmentation.
        loading: How pictures are loaded.

    Returns:
        What was done, as plain JSON data; None where the head stays as it is.
    """
    if start is None:
        return None
    if start == "pretrained" or isinstance(start, Mapping):
        head, rows = _find_rows(start, model, data)
        _write(model, pretrained_rows(head, rows, data.class_names))
        names = head.class_names
        return {
            "start": "pretrained",
            "rows": {
                label: [f"{row} {names[row]}" for row in chosen] for label, chosen in rows.items()
            },
        }
    features = compute_features(model, loading.loader(data.train, loading.eval_transform()))
    _write(model, _FITTED[start](features.values, features.targets, model.num_classes))
    return {"start": start, "num_features": len(features.values)}


def describe_start(report: Mapping[str, Any]) -> str:
    """Say in words where the head starts, from what `start_head` returned.

    Example:
        >>> describe_start({"start": "pretrained", "rows": {"ants": ["310 ant"]}})
        'The head starts from rows of the pretrained classifier: ants from 310 ant'
    """
    if report["start"] != "pretrained":
        return f"The head starts from {report['start']} on {report['num_features']:,} features"
    rows = "; ".join(f"{name} from {', '.join(rows)}" for name, rows in report["rows"].items())
    return f"The head starts from rows of the pretrained classifier: {rows}"


def _write(model: Classifier, start: LinearStart) -> None:
    with torch.no_grad():
        set_linear(model.head, start.weight, start.bias)


def _find_rows(
    start: HeadStart, model: Classifier, data: ImageSplits
) -> tuple[PretrainedHead, dict[str, tuple[int, ...]]]:
    head = model.pretrained_head
    if head is None:
        raise ConfigError(
            f'head_start="pretrained" needs the classifier that `{model.backbone_name}` was '
            f"trained with, which this model does not have: it was built without weights, or "
            f'these came without a head. Take head_start="ridge" or None.'
        )
    mapping = start if isinstance(start, Mapping) else None
    return head, match_class_names(
        data.class_names, head.class_names, mapping, argument="head_start"
    )
