"""Saving a trained model as an artifact, and building the model again from one."""

from __future__ import annotations

import copy
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transferkit.artifacts.format import read_file, write_file
from transferkit.errors import (
    ArtifactError,
    ConfigError,
    FreezeError,
    TransferkitError,
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
from transferkit.models.modes import evaluating

SELF_TEST_TOLERANCE = 1e-3
"""Largest difference of a self-test's logits, absolute and relative to the largest logit."""

_SELF_TEST_SEED = 0
_SELF_TEST_SIZE = (48, 40)
_MODEL_PREFIX = "model."
_HEAD_PREFIX = "head."
_SELF_TEST_IMAGES = "self_test.images"
_SELF_TEST_LOGITS = "self_test.logits"


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
        class_names: The names of the classes, by index, all different.
        history: Plain JSON data about the fit.

    Returns:
        The path.

    Raises:
        ConfigError: The class names do not fit the model, its weights are not finite, or
            the history is no JSON data.
        OutputError: The file cannot be written.
    """
    names = _check_class_names(class_names, model.num_classes)
    images = _self_test_images(model.preprocess.num_channels)
    tensors = {f"{_MODEL_PREFIX}{name}": value for name, value in model.state_dict().items()}
    logits = _self_test_logits(model, images)
    if not bool(torch.isfinite(logits).all()):
        raise ConfigError(
            "The model's logits are not finite (NaN or infinite): its weights are broken, and "
            "an artifact of it would be of no use. Train again, perhaps with a smaller `lr`."
        )
    tensors |= {_SELF_TEST_IMAGES: images, _SELF_TEST_LOGITS: logits}
    data = {
        "format_version": _format_version(model),
        "backbone": model.backbone_name,
        "num_features": model.num_features,
        "class_names": list(names),
        "preprocess": model.preprocess.to_dict(),
        "head": model.head_spec.to_dict(),
        "freeze_plan": model.freeze_plan.to_dict(),
        "history": None if history is None else dict(history),
        "versions": _versions(),
    }
    return write_file(path, tensors, data)


def load_artifact(
    path: str | os.PathLike[str],
    *,
    backbone: BackboneSpec | nn.Module | None = None,
    self_test: bool = True,
) -> Artifact:
    """Load an artifact and check that it still gives the logits that it gave.

    Nothing is downloaded and nothing in the file is executed.

    Args:
        path: The file.
        backbone: The spec or the network for an artifact whose backbone is not registered.
            A network is filled with the artifact's weights, in place.
        self_test: Run the stored tiny inputs and compare their logits.

    Returns:
        The model and what belongs to it.

    Raises:
        ArtifactError: The file is no artifact, is damaged or too new, its backbone is not
            known here, or the self-test gives other logits.
    """
    tensors, data = read_file(path)
    try:
        artifact = _build(tensors, data, backbone)
    except UnknownNameError as error:
        raise ArtifactError(
            f"The artifact `{path}` needs the backbone `{data.get('backbone')}`, which is not "
            f"registered here. Call `register_backbone` with that name first, or pass `backbone=`."
        ) from error
    except TransferkitError as error:
        raise ArtifactError(f"Cannot build the model of the artifact `{path}`: {error}") from error
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        OverflowError,
        RuntimeError,
    ) as error:
        raise ArtifactError(
            f"The artifact `{path}` is incomplete or inconsistent "
            f"({type(error).__name__}: {str(error).splitlines()[0]})."
        ) from error
    if self_test:
        _run_self_test(path, artifact.model, tensors)
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
    if backbone is None:
        backbone = get_backbone(data["backbone"])
    own = isinstance(backbone, nn.Module)
    state = {
        name.removeprefix(_MODEL_PREFIX): value
        for name, value in tensors.items()
        if name.startswith(_MODEL_PREFIX)
    }
    model = build_model(
        backbone,
        num_classes=len(class_names),
        head=_read_head(data, state),
        weights=None,
        num_features=data["num_features"] if own else None,
        preprocess=Preprocess.from_dict(data["preprocess"]),
    )
    _check_class_names(class_names, model.num_classes)
    _check_tensors(state, model.state_dict())
    # Not `load_state_dict`: some networks want a module version there that no file carries.
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(state[name])
    _freeze(model, data)
    return Artifact(model.eval(), tuple(class_names), data["history"], data["versions"])


def _read_head(data: Mapping[str, Any], state: Mapping[str, Tensor]) -> HeadSpec:
    """Return the description of the head, when the file holds the tensors of such a head."""
    if "head" not in data and data["format_version"] == 1:
        return HeadSpec()  # From before there were others.
    spec = HeadSpec.from_dict(data["head"])
    # On no device, so that widths that the file only claims to have take no memory.
    with torch.device("meta"):
        head = spec.build(data["num_features"], len(data["class_names"]))
    found = {name: value for name, value in state.items() if name.startswith(_HEAD_PREFIX)}
    _check_tensors(
        found, {f"{_HEAD_PREFIX}{name}": value for name, value in head.state_dict().items()}
    )
    return spec


def _freeze(model: Classifier, data: Mapping[str, Any]) -> None:
    try:
        model.freeze(FreezePlan.from_dict(data["freeze_plan"]))
    except UnknownNameError as error:  # Of a stage: the backbone has been found by its name.
        raise FreezeError(str(error)) from error


def _check_tensors(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    if missing or extra:
        raise ArtifactError(
            f"{len(missing)} tensors are missing and {len(extra)} do not belong to it, "
            f"among them `{(missing + extra)[0]}`."
        )
    for name, value in own.items():
        if found[name].shape != value.shape or found[name].dtype != value.dtype:
            raise ArtifactError(
                f"`{name}` is {found[name].dtype} {tuple(found[name].shape)}, "
                f"expected {value.dtype} {tuple(value.shape)}."
            )


def _check_class_names(class_names: Sequence[str], num_classes: int) -> tuple[str, ...]:
    names = tuple(class_names)
    texts = all(isinstance(name, str) for name in names)
    if not texts or len(names) != num_classes or len(set(names)) != len(names):
        raise ConfigError(
            f"`class_names` should be {num_classes} different texts, one for each class of the "
            f"model, found {list(names)}."
        )
    return names


def _self_test_images(num_channels: int) -> Tensor:
    """Return two tiny pictures of smooth noise, uint8 `(2, num_channels, 48, 40)`."""
    generator = torch.Generator().manual_seed(_SELF_TEST_SEED)
    coarse = torch.rand((2, num_channels, 6, 5), generator=generator)
    smooth = nn.functional.interpolate(coarse, size=_SELF_TEST_SIZE, mode="bilinear")
    return (smooth * 255).round().to(torch.uint8)


def _self_test_logits(model: Classifier, images: Tensor) -> Tensor:
    """Run the pictures through preprocessing and model on the CPU, as loading will.

    An accelerator rounds otherwise (TF32 convolutions differ in the third digit), and the
    tolerance is for other versions of the same arithmetic.
    """
    if next(model.parameters()).device.type != "cpu":
        model = copy.deepcopy(model).cpu()
    transform = model.preprocess.eval()
    batch = torch.stack([transform(image) for image in images])
    with evaluating(model), torch.no_grad():
        logits: Tensor = model(batch)
    return logits.float()


def _run_self_test(
    path: str | os.PathLike[str], model: Classifier, tensors: Mapping[str, Tensor]
) -> None:
    images, expected = tensors.get(_SELF_TEST_IMAGES), tensors.get(_SELF_TEST_LOGITS)
    if images is None or expected is None:
        raise ArtifactError(f"The artifact `{path}` has no self-test. Save it anew.")
    try:
        found = _self_test_logits(model, images)
    except (MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"The self-test of the artifact `{path}` cannot be run "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]})."
        ) from error
    if found.shape != expected.shape:
        raise ArtifactError(
            f"The artifact `{path}` is inconsistent: its self-test has logits of the shape "
            f"{tuple(expected.shape)}, its model gives {tuple(found.shape)}."
        )
    difference = (found - expected).abs().max().item()
    limit = SELF_TEST_TOLERANCE * max(1.0, expected.abs().max().item())
    if not (math.isfinite(difference) and difference <= limit):
        raise ArtifactError(
            f"The artifact `{path}` does not give the logits that it gave when it was saved: "
            f"they differ by {difference:.3g}, allowed are {limit:.3g}. The installed libraries "
            f"compute something else; compare their versions, or pass `self_test=False` to "
            f"load it all the same."
        )


def _versions() -> dict[str, str]:
    packages = ("transferkit", "torch", "torchvision", "pillow", "numpy", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
