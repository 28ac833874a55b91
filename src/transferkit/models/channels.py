"""Other numbers of channels: a first convolution and a preprocessing adapted to them."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from transferkit.errors import BackboneError
from transferkit.images import Preprocess
from transferkit.models.modes import evaluating


def adapt_preprocess(preprocess: Preprocess, num_channels: int) -> Preprocess:
    """Describe the same preprocessing for another number of channels.

    Args:
        preprocess: The backbone's own.
        num_channels: The number of channels C.

    Returns:
        A description with the average of its means and stds for 1 channel, and for any
        other number with its means and stds repeated in order.

    Example:
        >>> adapt_preprocess(Preprocess(mean=(0.25, 0.5, 0.75)), 1).mean
        (0.5,)
        >>> adapt_preprocess(Preprocess(mean=(0.25, 0.5, 0.75)), 5).mean
        (0.25, 0.5, 0.75, 0.25, 0.5)
    """
    if num_channels == preprocess.num_channels:
        return preprocess
    if num_channels == 1:
        return replace(preprocess, mean=(fmean(preprocess.mean),), std=(fmean(preprocess.std),))
    order = [channel % preprocess.num_channels for channel in range(num_channels)]
    mean, std = (tuple(each[i] for i in order) for each in (preprocess.mean, preprocess.std))
    return replace(preprocess, mean=mean, std=std)


def adapt_weight(weight: Tensor, num_channels: int) -> Tensor:
    """Make the filters of a convolution over I channels into filters over C.

    For 1 channel they are summed, so that a grey picture gives what its three equal
    channels gave. For any other number they are repeated in order and scaled by I / C, so
    that the sum over all channels stays of the same size.

    Args:
        weight: `(O, I, height, width)`. Not changed.
        num_channels: The number of channels C, at least 1.

    Returns:
        `(O, C, height, width)`.

    Example:
        >>> adapt_weight(torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1), 1).flatten()
        tensor([6.])
        >>> adapt_weight(torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1), 6).flatten()
        tensor([0.5000, 1.0000, 1.5000, 0.5000, 1.0000, 1.5000])

    References:
        The practice of Wightman's PyTorch Image Models (timm), `adapt_input_conv`,
        https://github.com/huggingface/pytorch-image-models
    """
    if num_channels == 1:
        return weight.sum(dim=1, keepdim=True)
    own = weight.shape[1]
    order = torch.arange(num_channels, device=weight.device) % own
    return weight[:, order] * (own / num_channels)


def adapt_channels(
    network: nn.Module, num_channels: int, *, preprocess: Preprocess, name: str
) -> None:
    """Make a network read another number of channels, in place.

    The convolution that the images reach first is found by a forward pass, gets new
    filters from its own ones (`adapt_weight`), and a second pass shows that the network
    works with them. Parameter names stay what they are.

    Args:
        network: Maps images `(N, I, H, W)` to features, with its weights loaded.
        num_channels: The number of channels C that it is to read.
        preprocess: The network's own, which says I, H and W.
        name: The backbone's name, for the error text.

    Raises:
        BackboneError: The network cannot be adapted; the message says why.
    """
    first = _find_first(network, num_channels, preprocess, name)
    weight = adapt_weight(first.weight.detach(), num_channels)
    first.weight = nn.Parameter(weight, requires_grad=first.weight.requires_grad)
    first.in_channels = num_channels
    size = preprocess.crop_size
    _run(network, torch.zeros(1, num_channels, size, size), num_channels, name)


def _find_first(
    network: nn.Module, num_channels: int, preprocess: Preprocess, name: str
) -> nn.Conv2d:
    """Return the convolution that the images reach first, or say why it cannot be changed."""
    calls: list[tuple[nn.Conv2d, Tensor]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Conv2d) and not calls:
            calls.append((module, inputs[0]))

    size = preprocess.crop_size
    images = torch.zeros(1, preprocess.num_channels, size, size)
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        _run(network, images, num_channels, name)
    finally:
        for hook in hooks:
            hook.remove()
    if not calls:
        raise _refusal(name, num_channels, "it has no 2-D convolution that reads the images")
    first, seen = calls[0]
    if seen is not images:
        reason = "its network changes the images before the first convolution"
        raise _refusal(name, num_channels, reason)
    if first.groups != 1 or is_parametrized(first):
        reason = "its first convolution has groups or a parametrised weight"
        raise _refusal(name, num_channels, reason)
    return first


def _run(network: nn.Module, images: Tensor, num_channels: int, name: str) -> None:
    try:
        with evaluating(network), torch.no_grad():
            network(images)
    except Exception as error:  # A network of any origin may raise any class.
        text = f": {str(error).splitlines()[0]}" if str(error) else ""
        reason = (
            f"on images of the shape {tuple(images.shape)} its network raises "
            f"{type(error).__name__}{text}"
        )
        raise _refusal(name, num_channels, reason) from error


def _refusal(name: str, num_channels: int, reason: str) -> BackboneError:
    channels = "1 channel" if num_channels == 1 else f"{num_channels} channels"
    return BackboneError(
        f"Backbone `{name}` cannot be adapted to {channels}: {reason.removesuffix('.')}. Take "
        f"another one, such as `resnet18`, or leave `num_channels` out: grey pictures are then "
        f"read as RGB."
    )
