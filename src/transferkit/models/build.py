"""`build_model`: from a backbone's name to a classifier that is ready to train."""

from __future__ import annotations

import os

import torch
from torch import nn

from transferkit._checks import check_integer, check_type
from transferkit._seeding import check_seed, seeded_torch
from transferkit.errors import BackboneError, ConfigError, WeightsError
from transferkit.images import Preprocess
from transferkit.models.channels import adapt_channels, adapt_preprocess
from transferkit.models.classifier import Classifier
from transferkit.models.freezing import BatchNormMode, Freeze, FreezePlan
from transferkit.models.heads import HeadSpec
from transferkit.models.pretrained_head import PretrainedHead
from transferkit.models.registry import get_backbone
from transferkit.models.spec import BackboneSpec
from transferkit.models.weights import find_pretrained_head, load_into, read_state_dict


def build_model(
    backbone: str | BackboneSpec | nn.Module,
    num_classes: int,
    *,
    head: str | HeadSpec = "linear",
    freeze: Freeze = "none",
    bn: BatchNormMode = "frozen",
    weights: str | os.PathLike[str] | None = "default",
    seed: int = 0,
    num_features: int | None = None,
    preprocess: Preprocess | None = None,
    num_channels: int | None = None,
) -> Classifier:
    """Build a classifier: a backbone with its weights and a new head.

    Args:
        backbone: A name (`list_backbones()` names them, `timm:<name>` any model of timm), a
            `BackboneSpec`, or a network of your own that gives features `(N, D)`; the
            network is taken as it is, not copied.
        num_classes: The number of classes, at least 2.
        head: What turns features into logits: "linear", "mlp" with a hidden layer before the
            last one, "cosine", or a `HeadSpec`, which has dropout and widths too.
        freeze: What does not train: "none" for fine-tuning, "backbone" for linear probing,
            "until:<stage>" for the stages up to that one, globs over parameter names, a
            callable from a parameter's name and the parameter to True or False, or a
            `FreezePlan`.
        bn: What BatchNorm layers of frozen modules do: "frozen" ones stand still; with "train"
            their weights and statistics train; with "adapt" the statistics alone follow the
            training batches, as in the PyTorch lesson on transfer learning. With "fixed" all
            statistics of the backbone stand still, also where the weights train.
        weights: "default" loads the backbone's own weights from the cache, a package or the
            network; None keeps random ones; a path reads a `.pth` or `.safetensors` state
            dict in the provider's names. A network of your own keeps its weights unless
            a path is given.
        seed: Rules all random weights. The caller's random state is left alone.
        num_features: The D of a network of your own; only for that case.
        preprocess: Takes the place of the backbone's own preprocessing. The default for
            a network of your own is 224 pixels with the ImageNet mean and std.
        num_channels: The number of channels C of the pictures: 1 for grey, 3 for RGB, more
            for multispectral arrays; None takes that of `preprocess`, where it is given, or
            else the backbone's own, which is 3. For another number than its own the
            backbone is adapted: the filters of its first convolution, random ones too, are
            summed for 1 channel, else repeated in order and scaled by 3 / C; mean and std
            are averaged for 1 channel, else repeated in order, unless `preprocess` is given.

    Returns:
        The classifier, on the CPU, in training mode. Its `pretrained_head` is what the
        weights' own head was, where the names of its classes are known.

    Raises:
        UnknownNameError: There is no such backbone.
        WeightsError: The weights cannot be found, read or fitted.
        BackboneError: The backbone cannot be adapted to so many channels.
        FreezeError: A freeze pattern matches nothing.
        ConfigError: Another argument cannot work.
        MissingDependencyError: The backbone needs a package that is not installed.

    Example:
        >>> model = build_model("resnet18", num_classes=2, weights=None, freeze="backbone")
        >>> model.num_trainable_parameters
        1026
        >>> grey = build_model("resnet18", num_classes=2, weights=None, num_channels=1)
        >>> grey.preprocess.num_channels
        1

    References:
        Filters for other numbers of channels: the practice of Wightman's PyTorch Image
        Models (timm), https://github.com/huggingface/pytorch-image-models
    """
    num_classes = check_integer("num_classes", num_classes, minimum=2)
    if preprocess is not None:
        check_type("preprocess", preprocess, Preprocess, "a Preprocess or None")
    head = HeadSpec.parse(head)
    if not callable(freeze) or isinstance(freeze, type):
        freeze = FreezePlan.parse(freeze, bn=bn)  # Before anything is built.
    spec = _resolve_spec(backbone, num_features, preprocess)
    own_network = isinstance(backbone, nn.Module)
    wanted = _resolve_preprocess(spec, preprocess, num_channels, own_network=own_network)
    with seeded_torch(check_seed(seed), torch.device("cpu")):
        network, dim = spec.build_features()
        model = Classifier(
            network,
            num_features=dim,
            num_classes=num_classes,
            backbone_name=spec.name,
            preprocess=wanted,
            head=head,
            stages=spec.find_stages(network),
        )
        plan = FreezePlan.parse(freeze, bn=bn, model=model, stages=model.stages)
        plan.frozen_names(model, model.stages)  # A wrong name shows before weights are loaded.
        model.pretrained_head = _load_weights(model, spec, weights, own_network=own_network)
        # That of a file of the user's is not known, nor are random weights anybody's.
        model.weights_license = spec.weights_license if weights == "default" else None
        if wanted.num_channels != spec.preprocess.num_channels:
            adapt_channels(
                model.backbone, wanted.num_channels, preprocess=spec.preprocess, name=spec.name
            )
    return model.freeze(plan).train()


def _resolve_spec(
    backbone: str | BackboneSpec | nn.Module,
    num_features: int | None,
    preprocess: Preprocess | None,
) -> BackboneSpec:
    if isinstance(backbone, nn.Module):
        if num_features is None:
            raise ConfigError(
                "A network of your own needs `num_features`, the D of its features (N, D)."
            )
        return BackboneSpec(
            name=type(backbone).__qualname__,
            build=lambda: backbone,
            num_features=check_integer("num_features", num_features, minimum=1),
            preprocess=preprocess or Preprocess(),
        )
    if num_features is not None:
        raise ConfigError(
            "`num_features` is for a network of your own; a named backbone knows it. Leave it out."
        )
    if isinstance(backbone, BackboneSpec):
        return backbone
    if isinstance(backbone, str):
        return get_backbone(backbone)
    raise ConfigError(
        f"`backbone` should be a name, a BackboneSpec or an nn.Module, "
        f"found {type(backbone).__name__}."
    )


def _resolve_preprocess(
    spec: BackboneSpec,
    preprocess: Preprocess | None,
    num_channels: int | None,
    *,
    own_network: bool,
) -> Preprocess:
    """Return the model's preprocessing, which says how many channels it reads."""
    if num_channels is None:
        return preprocess or spec.preprocess
    num_channels = check_integer("num_channels", num_channels, minimum=1)
    if preprocess is not None and preprocess.num_channels != num_channels:
        raise ConfigError(
            f"`num_channels` is {num_channels}, `preprocess` has the mean and std of "
            f"{preprocess.num_channels}. Make them agree, or leave one of them out."
        )
    if own_network and num_channels != spec.preprocess.num_channels:
        raise BackboneError(
            f"A network of your own is taken as it is and not adapted to `num_channels="
            f"{num_channels}`. Where it reads so many, say so by `preprocess=`, with the mean "
            f"and std of each channel."
        )
    return preprocess or adapt_preprocess(spec.preprocess, num_channels)


def _load_weights(
    model: Classifier,
    spec: BackboneSpec,
    weights: str | os.PathLike[str] | None,
    *,
    own_network: bool,
) -> PretrainedHead | None:
    """Load the weights into the backbone and return the head that came with them."""
    if weights is not None and not isinstance(weights, (str, os.PathLike)):
        raise ConfigError(
            f'`weights` should be "default", None or the path of a .pth or .safetensors file, '
            f"found {weights!r}."
        )
    if weights is None or (own_network and weights == "default"):
        return None
    if weights != "default":
        state = read_state_dict(weights)
    elif spec.load_weights is not None:
        state = spec.load_weights()
    else:
        raise WeightsError(
            f"Backbone `{spec.name}` has no default weights. Pass a file as `weights=PATH` or "
            f"keep random weights with `weights=None`."
        )
    head = load_into(model.backbone, state, spec)
    is_local = weights != "default"
    return find_pretrained_head(head, spec, model.num_features, is_local=is_local)
