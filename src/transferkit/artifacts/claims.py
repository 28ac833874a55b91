"""Checks that a file holds the network that it names, before the network takes any memory.

A file of a few bytes may name a network of gigabytes, or a head of a million features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from transferkit._seeding import seeded_torch
from transferkit.artifacts.schema import parse_head
from transferkit.errors import ArtifactError
from transferkit.models import BackboneSpec, HeadSpec

_BACKBONE_PREFIX = "backbone."
_HEAD_PREFIX = "head."


def check_tensors(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Check that tensors have the names, shapes and dtypes that a network has.

    Args:
        found: What the file has.
        own: What the network has, on any device.

    Raises:
        ArtifactError: They differ; the first difference is named.
    """
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


def check_backbone(spec: BackboneSpec, num_channels: int, state: Mapping[str, Tensor]) -> None:
    """Check that a file has the tensors of the backbone that it names.

    Args:
        spec: What is registered under that name.
        num_channels: The number of channels of the model's images.
        state: The model's tensors in the file.

    Raises:
        ArtifactError: It has not.
    """
    read = {
        name for name, each in state.items() if each.dim() == 4 and each.shape[1] == num_channels
    }
    is_adapted = num_channels != spec.preprocess.num_channels
    if is_adapted and not read:
        raise ArtifactError(f"none of its filters reads the {num_channels} channels of its images.")
    try:
        with seeded_torch(0, torch.device("cpu")), _WithoutMemory():
            network, _ = spec.build_features()
    except Exception:  # A network of the user's, which asks for values: it is built as it is.
        return
    own = {f"{_BACKBONE_PREFIX}{name}": value for name, value in network.state_dict().items()}
    found = {name: each for name, each in state.items() if name.startswith(_BACKBONE_PREFIX)}
    for name in read & own.keys() if is_adapted else ():
        if own[name].dim() == 4:  # Perhaps the first filters, which differ in that number alone.
            own[name] = own[name][:, :1].expand(-1, num_channels, -1, -1)
    check_tensors(found, own)


def read_head(data: Mapping[str, Any], state: Mapping[str, Tensor]) -> HeadSpec:
    """Return the description of the head, when the file holds the tensors of such a head.

    Args:
        data: The JSON data of the artifact.
        state: The model's tensors in the file.

    Raises:
        ArtifactError: It has other tensors.
        ConfigError: There is no such head.
    """
    spec = parse_head(data)
    found = {name: value for name, value in state.items() if name.startswith(_HEAD_PREFIX)}
    with torch.device("meta"):
        head = spec.build(data["num_features"], len(data["class_names"]))
    check_tensors(
        found, {f"{_HEAD_PREFIX}{name}": value for name, value in head.state_dict().items()}
    )
    return spec


class _WithoutMemory(TorchFunctionMode):
    """Let `torch.empty`, which makes the weights of all layers, take no memory.

    Other tensors stay real: some networks read numbers off them while they are built, which
    `torch.device("meta")` does not allow.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
