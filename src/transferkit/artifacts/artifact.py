"""Saving a trained model as an artifact, and building the model again from one."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transferkit._checks import check_flag
from transferkit.artifacts.claims import check_backbone, check_tensors, read_head
from transferkit.artifacts.format import read_file, write_file
from transferkit.artifacts.schema import check_class_names, check_data, check_image_size, explained
from transferkit.artifacts.self_test import make_self_test, run_self_test
from transferkit.errors import (
    ArtifactError,
    ConfigError,
    FreezeError,
    UnknownNameError,
)
from transferkit.images import Preprocess
from transferkit.models import (
    BackboneSpec,
    Classifier,
    FreezePlan,
    HeadSpec,
    build_model,
    get_backbone,
)

_MODEL_PREFIX = "model."


@dataclass(frozen=True)
class Artifact:
    """What an artifact holds, ready to use.

    Args:
        model: The classifier, in eval mode, with the weights of the best epoch.
        class_names: The names of the classes, by index.
        history: The history of the fit as plain data, or None.
        versions: The versions of the libraries that wrote it.
    """

    model: Classifier
    class_names: tuple[str, ...]
    history: dict[str, Any] | None
    versions: dict[str, str]

    @property
    def preprocess(self) -> Preprocess:
        """How pictures become images for the model."""
        return self.model.preprocess


def save_artifact(
    path: str | os.PathLike[str],
    model: Classifier,
    *,
    class_names: Sequence[str],
    history: Mapping[str, Any] | None = None,
) -> Path:
    """Save a model with all that prediction needs as one safetensors file.

    Args:
        path: Where to write; an existing file is replaced only when all is written.
        model: The model; its mode and weights are left as they are.
        class_names: The names of the classes, by index, all different and none empty.
        history: Plain JSON data about the fit.

    Returns:
        The path.

    Raises:
        ConfigError: The class names do not fit the model, its weights are not finite, its
            images are too large, or the history is no JSON data.
        OutputError: The file cannot be written.
    """
    names = check_class_names(class_names, model.num_classes)
    check_image_size(model.preprocess)
    tensors = {f"{_MODEL_PREFIX}{name}": value for name, value in model.state_dict().items()}
    tensors |= make_self_test(model)
    data = {
        "format_version": _format_version(model),
        "backbone": model.backbone_name,
        "num_features": model.num_features,
        "class_names": list(names),
        "preprocess": model.preprocess.to_dict(),
        "head": model.head_spec.to_dict(),
        "freeze_plan": model.freeze_plan.to_dict(),
        "weights_license": model.weights_license,
        "history": None if history is None else dict(history),
        "versions": _versions(),
    }
    return write_file(path, tensors, data)


def load_artifact(
    path: str | os.PathLike[str],
    *,
    backbone: BackboneSpec | nn.Module | None = None,
    self_test: bool = True,
    strict: bool = False,
) -> Artifact:
    """Load an artifact and check that it still gives the logits that it gave.

    Nothing is downloaded and nothing in the file is executed. The file may be anybody's: it is
    checked before memory is taken for what it claims to hold.

    Args:
        path: The file.
        backbone: The spec or the network for an artifact whose backbone is not registered.
            A network is filled with the artifact's weights, in place.
        self_test: Decode, preprocess and classify the stored tiny inputs, and compare each stage
            with what it gave. A drift is an `ArtifactWarning`, useless results are an error.
        strict: Let a drift be an error, too.

    Returns:
        The model and what belongs to it.

    Raises:
        ArtifactError: The file is no artifact, is damaged or too new, its backbone is not
            known here, or the self-test gives other results.
        ConfigError: `strict` without `self_test`.
    """
    check_flag("self_test", self_test)
    if check_flag("strict", strict) and not self_test:
        raise ConfigError("strict=True is about the self-test: leave `self_test=False` out.")
    tensors, data = read_file(path)
    try:
        with explained(path):
            check_data(data)
            artifact = _build(tensors, data, backbone)
    except UnknownNameError as error:
        raise ArtifactError(
            f"The artifact `{path}` needs the backbone `{data.get('backbone')}`, which is not "
            f"registered here. Call `register_backbone` with that name first, or pass `backbone=`."
        ) from error
    if self_test:
        run_self_test(path, artifact.model, tensors, strict=strict)
    return artifact


def _format_version(model: Classifier) -> int:
    """Return the lowest version whose readers understand all that is said of the model.

    Readers of version 1 pass over fields that they do not know: they would take dropout
    before the head for none, and a backbone that is frozen up to a stage for one that trains.
    """
    plan = model.freeze_plan
    is_plain = model.head_spec == HeadSpec() and plan.until is None and plan.bn != "train"
    return 1 if is_plain else 2


def _build(
    tensors: Mapping[str, Tensor],
    data: Mapping[str, Any],
    backbone: BackboneSpec | nn.Module | None,
) -> Artifact:
    class_names = data["class_names"]
    state = {
        name.removeprefix(_MODEL_PREFIX): value
        for name, value in tensors.items()
        if name.startswith(_MODEL_PREFIX)
    }
    head = read_head(data, state)
    preprocess = Preprocess.from_dict(data["preprocess"])
    check_image_size(preprocess)
    if backbone is None:
        backbone = get_backbone(data["backbone"])
        check_backbone(backbone, preprocess.num_channels, state)
    own = isinstance(backbone, nn.Module)
    model = build_model(
        backbone,
        num_classes=len(class_names),
        head=head,
        weights=None,
        num_features=data["num_features"] if own else None,
        preprocess=preprocess,
    )
    check_tensors(state, model.state_dict())
    # Not `load_state_dict`: some networks want a module version there that no file carries.
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(state[name])
    _freeze(model, data)
    model.weights_license = data.get("weights_license")
    return Artifact(model.eval(), tuple(class_names), data["history"], data["versions"])


def _freeze(model: Classifier, data: Mapping[str, Any]) -> None:
    try:
        model.freeze(FreezePlan.from_dict(data["freeze_plan"]))
    except UnknownNameError as error:  # Of a stage: the backbone has been found by its name.
        raise FreezeError(str(error)) from error


def _versions() -> dict[str, str]:
    packages = ("transferkit", "torch", "torchvision", "pillow", "numpy", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
