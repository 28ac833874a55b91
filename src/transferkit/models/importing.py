"""`import_model`: from the weights of a plain torchvision or timm network to a classifier."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from transferkit._checks import check_path
from transferkit.errors import ConfigError, WeightsError
from transferkit.images import Preprocess
from transferkit.models.build import build_model
from transferkit.models.classifier import Classifier
from transferkit.models.registry import get_backbone
from transferkit.models.spec import BackboneSpec
from transferkit.models.weights import MAX_NAMED_KEYS, load_into, read_state_dict


def import_model(
    backbone: str | BackboneSpec,
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str],
    preprocess: Preprocess | None = None,
) -> Classifier:
    """Make a classifier of the weights of a network that was trained elsewhere, with its head.

    The file is read without running code. It may hold the state dict alone, or a checkpoint
    with one state dict among other things; the names may have the prefixes of `DataParallel`,
    `torch.compile` or Lightning.

    Args:
        backbone: The network's name here: torchvision's own, `timm:<name>` for one of timm, or
            a spec.
        path: A `.pth` or `.safetensors` file with the state dict of the whole network, in the
            names of torchvision or timm. Its last layer is linear and has a row for each class;
            dropout before it does not matter.
        class_names: The names of the classes, in the order of the rows, at least 2.
        preprocess: How pictures were made the network's images; None takes the backbone's own.

    Returns:
        The classifier, on the CPU, in eval mode. `save_artifact` makes an artifact of it.

    Raises:
        UnknownNameError: There is no such backbone.
        WeightsError: The file cannot be read, or does not fit the backbone or the classes; the
            tensors are named.
        ConfigError: An argument cannot work.
        MissingDependencyError: The backbone needs a package that is not installed.

    Example:
        >>> import tempfile
        >>> from torchvision.models import mnasnet0_5
        >>> file = f"{tempfile.mkdtemp()}/trained.pth"
        >>> torch.save(mnasnet0_5(num_classes=2).state_dict(), file)
        >>> import_model("mnasnet0_5", file, class_names=["ants", "bees"]).num_classes
        2
    """
    names = _check_class_names(class_names)
    spec = get_backbone(backbone) if isinstance(backbone, str) else backbone
    if not isinstance(spec, BackboneSpec):
        raise ConfigError(
            f"`backbone` should be a name or a BackboneSpec, found {type(backbone).__name__}."
        )
    if preprocess is not None and preprocess.num_channels != spec.preprocess.num_channels:
        raise ConfigError(
            f"`preprocess` gives {preprocess.num_channels} channels, the backbone `{spec.name}` "
            f"reads {spec.preprocess.num_channels}. An import does not adapt weights; "
            f"`build_model(..., weights=PATH)` does, with a new head."
        )
    file = check_path("path", path)
    if not file.is_file():
        raise WeightsError(
            f"The weights file `{file}` does not exist. Expected `path` to be that of a .pth or "
            f".safetensors file."
        )
    state = read_state_dict(file)
    model = build_model(spec, len(names), weights=None, preprocess=preprocess)
    head = load_into(model.backbone, state, spec)
    weight, bias = _find_last_layer(head, spec)
    _check_shapes(weight, bias, (len(names), model.num_features))
    with torch.no_grad():
        model.head.get_parameter("weight").copy_(weight)
        model.head.get_parameter("bias").copy_(bias)
    return model.eval()


def _check_class_names(class_names: Sequence[str]) -> tuple[str, ...]:
    names = () if isinstance(class_names, str) else tuple(class_names)
    are_texts = all(isinstance(name, str) for name in names)
    if not are_texts or len(names) < 2 or len(set(names)) != len(names):
        raise ConfigError(
            f"`class_names` should be at least 2 different texts, in the order of the rows of "
            f"the last layer, found {class_names!r}."
        )
    return names


def _find_last_layer(head: Mapping[str, Tensor], spec: BackboneSpec) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias of the one layer that the weights have for a head.

    It may lie deeper than the backbone's own, as behind dropout in a `Sequential`.
    """
    last = spec.last_layer_key
    own = {name: each for name, each in head.items() if last and name.startswith(f"{last}.")}
    layers = {name.rpartition(".")[0] for name in own}
    kinds = {name.rpartition(".")[2] for name in own}
    if len(layers) == 1 and {"weight"} <= kinds <= {"weight", "bias"}:
        layer = layers.pop()
        weight = own[f"{layer}.weight"]
        # MaxViT's has no bias.
        return weight, own.get(f"{layer}.bias", weight.new_zeros(len(weight)))
    found = [f"{name} {tuple(each.shape)}" for name, each in head.items()]
    more = ", ..." if len(found) > MAX_NAMED_KEYS else ""
    words = f"{', '.join(found[:MAX_NAMED_KEYS])}{more}" if found else "none"
    raise WeightsError(
        f"The weights should have one linear layer for a head, at `{last}`, the last of the "
        f"backbone `{spec.name}`; tensors of a head are {words}. "
        f"`build_model(..., weights=PATH)` takes the rest of them and a new head."
    )


def _check_shapes(weight: Tensor, bias: Tensor, expected: tuple[int, int]) -> None:
    if tuple(weight.shape) != expected or tuple(bias.shape) != expected[:1]:
        raise WeightsError(
            f"The last layer of the weights has a weight {tuple(weight.shape)} and a bias "
            f"{tuple(bias.shape)}; expected {expected} and {expected[:1]}, a row of "
            f"{expected[1]} features for each of {expected[0]} `class_names`. "
            f"`build_model(..., weights=PATH)` takes the weights with a new head."
        )
