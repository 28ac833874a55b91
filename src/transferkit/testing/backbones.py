"""The contract of a backbone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from transferkit.errors import BackboneError
from transferkit.models import BackboneSpec, Classifier, build_model

_TOLERANCE = 1e-3


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
