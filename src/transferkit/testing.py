"""Checks for plug-ins, and a maker of small picture folders for tests.

`check_backbone` and `check_scheduler` hold a backbone or a scheduler of yours to what the
library relies on, and raise an error that names the first broken promise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from transferkit._files import make_folder
from transferkit.errors import BackboneError, ConfigError
from transferkit.models import BackboneSpec, Classifier, build_model
from transferkit.training.schedulers import Schedule, make_schedule

__all__ = ["check_backbone", "check_scheduler", "make_image_folder"]

_TOLERANCE = 1e-3
_COLORS = {"blue": (40, 60, 200), "red": (200, 50, 40)}


def check_backbone(spec: BackboneSpec, *, image_size: int | None = None) -> None:
    """Check that a backbone keeps its contract, with random weights.

    Features are `(N, D)` and logits `(N, C)`, finite and in float32, and those of an image are
    its own, whatever else is in the batch; gradients reach the backbone; its stages share out
    its parameters; freezing all of it, or up to the stage in the middle, holds through
    `train()` and optimizer steps, buffers included; two builds of one seed agree.

    Args:
        spec: The backbone.
        image_size: Height and width of the test images; None takes the preprocessing's.

    Raises:
        BackboneError: A promise is broken; the message says which.

    Example:
        >>> from transferkit.models import get_backbone
        >>> check_backbone(get_backbone("squeezenet1_1"), image_size=64)
    """
    size = image_size or spec.preprocess.crop_size
    channels = spec.preprocess.num_channels
    images = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    model, twin = (build_model(spec, 3, weights=None) for _ in range(2))
    same = all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))
    _require(spec, same, "two builds with the same seed give other weights")
    _check_shapes(spec, model, images)
    _check_gradients(spec, model, images)
    _check_stages(spec, model)
    if any(True for _ in model.backbone.parameters()):
        _check_frozen(spec, model.freeze("backbone"), images, model.backbone.state_dict())
    if model.stages:
        middle = (len(model.stages) - 1) // 2
        held = [
            name
            for name in model.backbone.state_dict()
            if any(stage.holds(name) for stage in model.stages[: middle + 1])
        ]
        _check_frozen(spec, model.freeze(f"until:{model.stages[middle].name}"), images, held)


def _check_shapes(spec: BackboneSpec, model: Classifier, images: torch.Tensor) -> None:
    model.eval()
    with torch.inference_mode():
        features = model.features(images)
        dtype = features.dtype
        _require(spec, dtype == torch.float32, f"features are {dtype}, not float32")
        logits, alone = model(images), model.features(images[:1])
    model.train()
    _require(spec, bool(torch.isfinite(logits).all()), "its logits are not finite")
    allowed = _TOLERANCE * float(features.abs().max())
    same = torch.allclose(alone, features[:1], rtol=0, atol=allowed)
    _require(spec, same, "the features of an image depend on the others in the batch")


def _check_gradients(spec: BackboneSpec, model: Classifier, images: torch.Tensor) -> None:
    model.eval()  # BatchNorm over two tiny images says nothing about the gradients.
    model(images).sum().backward()
    reached = [each for each in model.backbone.parameters() if each.grad is not None]
    trainable = any(True for _ in model.backbone.parameters())
    _require(spec, bool(reached) or not trainable, "no gradient reaches its parameters")
    model.zero_grad(set_to_none=True)
    model.train()


def _check_stages(spec: BackboneSpec, model: Classifier) -> None:
    for name, _ in model.backbone.named_parameters():
        count = sum(stage.holds(name) for stage in model.stages)
        _require(
            spec, count == 1 or not model.stages, f"its parameter `{name}` lies in {count} stages"
        )


def _check_frozen(
    spec: BackboneSpec, model: Classifier, images: torch.Tensor, held: Iterable[str]
) -> None:
    """Check that the tensors of these names stand still while the rest trains."""
    before = {name: each.clone() for name, each in model.backbone.state_dict().items()}
    optimizer = torch.optim.SGD(
        model.trainable_parameters(), lr=0.01, momentum=0.9, weight_decay=0.01
    )
    for act in (model.train, model.backbone.train):
        act()
        loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    after = model.backbone.state_dict()
    changed = [name for name in held if not torch.equal(after[name], before[name])]
    _require(spec, not changed, f"frozen tensors changed in training: {changed[:3]}")


def _require(spec: BackboneSpec, holds: bool, problem: str) -> None:
    if not holds:
        raise BackboneError(f"Backbone `{spec.name}` breaks its contract: {problem}.")


def check_scheduler(
    factory: Callable[..., Schedule | LRScheduler],
    *,
    num_epochs: int = 3,
    steps_per_epoch: int = 4,
) -> list[float]:
    """Check a scheduler factory by running a fit's worth of steps, and return the rates.

    Args:
        factory: A `SchedulerFactory`.
        num_epochs: Epochs of the fit.
        steps_per_epoch: Optimizer updates in an epoch.

    Returns:
        The learning rate at each step, `num_epochs * steps_per_epoch` of them, from 1.0.

    Raises:
        ConfigError: It cannot be built, or gives a rate that is negative or not finite.

    Example:
        >>> from torch.optim.lr_scheduler import ExponentialLR
        >>> def halving(optimizer, *, num_epochs, steps_per_epoch):
        ...     return ExponentialLR(optimizer, gamma=0.5)
        >>> check_scheduler(halving, num_epochs=2, steps_per_epoch=2)
        [1.0, 1.0, 0.5, 0.5]
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    schedule = make_schedule(
        factory, optimizer, num_epochs=num_epochs, steps_per_epoch=steps_per_epoch, options={}
    )
    rates = []
    for _ in range(num_epochs):
        for _ in range(steps_per_epoch):
            rates.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            schedule.step("step")
        schedule.step("epoch", lambda _: 0.5)
    wrong = [rate for rate in rates if not 0 <= rate < float("inf")]
    if wrong:
        raise ConfigError(f"The scheduler gives the learning rate {wrong[0]}; expected at least 0.")
    return rates


def make_image_folder(
    root: str | os.PathLike[str],
    *,
    class_names: Sequence[str] = ("blue", "red"),
    num_train: int = 8,
    num_val: int = 4,
    size: tuple[int, int] = (40, 32),
    seed: int = 0,
) -> Path:
    """Write a small folder of easy pictures: each class has a colour of its own.

    Args:
        root: Where to write; created if it is not there.
        class_names: The names of the classes.
        num_train: Training pictures of each class.
        num_val: Validation pictures of each class.
        size: Width and height in pixels.
        seed: Rules the noise, and the colours of classes other than "blue" and "red".

    Returns:
        The root.

    Raises:
        OutputError: The folder cannot be written.

    Example:
        >>> import tempfile
        >>> root = make_image_folder(tempfile.mkdtemp(), num_train=2, num_val=1)
        >>> len(sorted(root.rglob("*.png")))
        6
    """
    rng = np.random.default_rng(seed)
    for split, count in (("train", num_train), ("val", num_val)):
        for name in class_names:
            folder = make_folder(Path(root, split, name))
            own = np.random.default_rng((seed, *name.encode())).integers(0, 256, 3)
            color = np.asarray(_COLORS.get(name, own))
            for index in range(count):
                noise = rng.normal(0, 25, (size[1], size[0], 3))
                pixels = np.clip(color + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:03}.png")
    return Path(root)
