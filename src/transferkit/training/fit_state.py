"""The state of a fit between two updates: as a checkpoint keeps it, and back."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transferkit.data import ImageDataset
from transferkit.data.paths import PathArray
from transferkit.errors import CheckpointError
from transferkit.evaluation.evaluate import RunningMean
from transferkit.models import Classifier
from transferkit.training.checkpoints import START, Checkpoint, Place
from transferkit.training.fingerprints import structure_digest, tensors_digest
from transferkit.training.history import EpochRecord, History
from transferkit.training.packing import pack, unpack

if TYPE_CHECKING:
    from transferkit.training.fitting import Fit
    from transferkit.training.job import Job

_PARTS = "parts"

_FREE = ("activation_checkpointing", "device", "execution")
"""Settings that may change where a fit goes on: they change no result, or the last bits only.

How it runs is taken from the checkpoint, whatever would be chosen now."""


@dataclass
class Progress:
    """How far a fit has come.

    Args:
        place: What it does next.
        phase: The place of the phase that the optimizer is in; None before the first one.
        step: Updates in the running epoch so far.
        lr: The learning rate at the start of the running epoch.
        seconds: Duration of the running epoch so far, in this process and before.
        elapsed: Duration of the fit in the processes before.
        is_over: Whether nothing is left to do.
        batch_sizes: By phase, in how many pictures at a time cached features are computed.
    """

    place: Place = START
    phase: int | None = None
    step: int = 0
    lr: float = 0.0
    seconds: float = 0.0
    elapsed: float = 0.0
    is_over: bool = False
    batch_sizes: dict[str, int] = field(default_factory=dict)


def capture(
    fit: Fit, mean: RunningMean | None, statistics: dict[str, Tensor], *, elapsed: float
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the state of a fit as JSON data and tensors, which are those of the fit.

    Args:
        fit: The fit, between two updates.
        mean: What the running epoch gave so far.
        statistics: Buffers in the place of the model's own, where several processes have theirs.
        elapsed: The duration of the fit so far.

    Raises:
        CheckpointError: Something in the state is no plain data.
    """
    job, progress = fit.job, fit.progress
    average = job.average
    parts: dict[str, Any] = {
        "progress": asdict(progress) | {"place": list(progress.place), "elapsed": elapsed},
        "history": asdict(fit.history) | {"skipped": fit.list_skipped()},
        "model": changing(job.model, fit.trainable) | statistics,
        "mean": None if mean is None else mean.state_dict(),
        "updates": None if fit.updates.optimizer is None else fit.updates.state_dict(),
        "average": None if average is None else average.state_dict(),
        "best": fit.best.state_dict(is_present=fit.is_best_present),
        "penalty": None if fit.penalty is None else fit.penalty.state_dict(),
        "criterion": changing(job.criterion) if isinstance(job.criterion, nn.Module) else {},
        "before_finetuning": fit.before_finetuning,
        "nonfinite": fit.losses.skipped,
        "scaler": None if job.precision.scaler is None else job.precision.scaler.state_dict(),
        "callbacks": [[type(each).__qualname__, each.state_dict()] for each in fit.callbacks],
    }
    tensors: dict[str, Tensor] = {}
    packed = {name: pack(value, tensors, name) for name, value in parts.items()}
    return {"identity": fit.identity, _PARTS: packed}, tensors


def restore(fit: Fit, checkpoint: Checkpoint) -> dict[str, Any]:
    """Bring the parts of a fit that do not depend on its phase to the state of a checkpoint.

    Args:
        fit: The fit, which has not begun.
        checkpoint: The checkpoint.

    Returns:
        All parts; those that belong to the phase are left to the phase.

    Raises:
        CheckpointError: It is of another fit, or is damaged.
    """
    check_identity(fit.identity, checkpoint)
    packed = checkpoint.data.get(_PARTS)
    try:
        parts: dict[str, Any] = unpack(packed, checkpoint.tensors)
        progress = parts["progress"]
        fit.progress = Progress(**progress | {"place": Place(*progress["place"])})
        _restore_history(fit.history, parts["history"], is_over=fit.progress.is_over)
        load_tensors(fit.job.model, parts["model"])
        fit.best.load_state_dict(parts["best"])
        fit.losses.skipped[:] = parts["nonfinite"]
        if isinstance(fit.job.criterion, nn.Module):
            load_tensors(fit.job.criterion, parts["criterion"])
        fit.before_finetuning = _on_device(parts["before_finetuning"], fit.job.device)
        if fit.penalty is not None:
            fit.penalty.load_state_dict(parts["penalty"])
        if fit.job.precision.scaler is not None:
            fit.job.precision.scaler.load_state_dict(parts["scaler"])
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"The checkpoint `{checkpoint.path}` is not of the form that this version writes "
            f"({type(error).__name__}: {error}). Resume with the version that wrote it."
        ) from error
    return parts


def restore_phase(fit: Fit, parts: dict[str, Any]) -> None:
    """Bring what belongs to the running phase to its state, after the phase's start.

    Args:
        fit: The fit; optimizer, schedule and average of the phase are new.
        parts: What `restore` returned.
    """
    fit.updates.load_state_dict(parts["updates"])
    if fit.job.average is not None:
        fit.job.average.load_state_dict(parts["average"], fit.job.model)


def restore_callbacks(fit: Fit, parts: dict[str, Any]) -> None:
    """Hand each callback its state, by its class and its place among those of the class."""
    states: dict[str, list[dict[str, Any]]] = {}
    for name, state in parts["callbacks"]:
        states.setdefault(name, []).append(state)
    for each in fit.callbacks:
        waiting = states.get(type(each).__qualname__)
        if waiting:
            each.load_state_dict(waiting.pop(0))


def changing(model: nn.Module, trainable: Collection[str] = ()) -> dict[str, Tensor]:
    """Return what may change in a fit: the parameters of some names, and all buffers."""
    tensors: dict[str, Tensor] = {
        name: each for name, each in model.named_parameters() if name in trainable
    }
    return {
        name: each.detach() for name, each in {**tensors, **dict(model.named_buffers())}.items()
    }


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into the parameters and buffers of their names."""
    present = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in tensors.items():
        present[name].copy_(value)


def identify(job: Job, told: dict[str, Any], trainable: Collection[str]) -> dict[str, Any]:
    """Return what has to be the same for a fit to go on from a checkpoint, as JSON data.

    Args:
        job: What is trained, and how.
        told: The settings of the fit.
        trainable: The names of the parameters that train at any time of the fit.
    """
    settings = {key: value for key, value in told.items() if key not in _FREE}
    start = job.head_start
    settings["head_start"] = dict(start) if isinstance(start, Mapping) else start
    if isinstance(job.criterion, nn.Module):  # Which shows its options and its weights.
        settings["criterion_digest"] = structure_digest(job.criterion) + tensors_digest(
            job.criterion
        )
    return {
        "settings": json.loads(json.dumps(settings)),
        "class_names": list(job.data.class_names),
        "pictures": {"train": _split_digest(job.data.train), "val": _split_digest(job.data.val)},
        "frozen_weights": _frozen_digest(job.model, trainable),
    }


def check_identity(identity: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Check that a checkpoint is of the same fit.

    Raises:
        CheckpointError: It is of another one; the message says in what they differ.
    """
    found = checkpoint.data.get("identity", {})
    start = f"The checkpoint `{checkpoint.path}` is of another fit: "
    end = "To train anew, name another folder for `checkpoints`."
    if found.get("class_names") != identity["class_names"]:
        raise CheckpointError(
            f"{start}its classes are {found.get('class_names')}, those of the data are "
            f"{identity['class_names']}. {end}"
        )
    for name, digest in identity["pictures"].items():
        if found.get("pictures", {}).get(name) != digest:
            raise CheckpointError(
                f"{start}the pictures of the {name} split changed since (their names, sizes, "
                f"order or classes). {end}"
            )
    theirs, ours = found.get("settings", {}), identity["settings"]
    for key in sorted({*theirs, *ours}):
        if theirs.get(key) != ours.get(key):
            raise CheckpointError(
                f"{start}`{key}` was {theirs.get(key)!r}, and is {ours.get(key)!r} now. {end}"
            )
    if found.get("frozen_weights") != identity["frozen_weights"]:
        raise CheckpointError(
            f"{start}the weights that do not train, which it does not hold, are others. Build the "
            f"model from the same weights. {end}"
        )


def _split_digest(dataset: ImageDataset) -> str:
    """Return the SHA-256 over names, sizes and classes of a split's pictures, in their order.

    Names count from the folder that holds all of them, so that the folder may be moved.
    """
    digest = hashlib.sha256(dataset.targets.tobytes())
    if isinstance(dataset.images, PathArray):
        paths = [os.fspath(each.absolute()) for each in dataset.images]
        start = len(os.path.commonpath(paths)) if len(paths) > 1 else 0
        for path in paths:
            digest.update(os.fsencode(path[start:]) + f"\0{_size(path)}\0".encode())
    return digest.hexdigest()


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:  # Reading it is the place to say what is wrong.
        return -1


def _frozen_digest(model: Classifier, trainable: Collection[str]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        if name in trainable:
            continue
        plain = value.detach().cpu().contiguous()
        digest.update(f"\0{name}\0{plain.dtype}\0{tuple(plain.shape)}\0".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _restore_history(history: History, state: dict[str, Any], *, is_over: bool) -> None:
    history.records[:] = [EpochRecord(**record) for record in state["records"]]
    history.settings = state["settings"] | {"device": history.settings["device"]}
    history.skipped[:] = state["skipped"]
    if is_over:
        history.status = state["status"]


def _on_device(tensors: dict[str, Tensor] | None, device: torch.device) -> dict[str, Tensor] | None:
    return None if tensors is None else {name: each.to(device) for name, each in tensors.items()}
