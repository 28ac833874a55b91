"""`BackboneSpec`: everything that there is to know about a backbone, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from transferkit.errors import BackboneError
from transferkit.images import Preprocess
from transferkit.models.stages import Stage, find_stages


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """Describe a backbone: how to build it, where its head is, what it expects.

    Args:
        name: The name it is registered and saved under.
        build: Builds the network with random weights. It takes no arguments.
        preprocess: How pictures become its input, from its weights' own transforms.
        head_path: Where the last layer sits, as a module path: "fc", "classifier.6". It is
            taken off and its number of inputs becomes `num_features`. None says that
            `build` returns a network that gives features `(N, D)` already.
        num_features: The D of the features, or a callable that reads it off the network;
            needed only where `head_path` is None.
        load_weights: Loads the default weights, a state dict in the provider's own names,
            from a cache, a package or the network; None where there are none.
        convert_weights: Brings a state dict with older or foreign names into the network's
            own; applied to default weights and local files alike.
        head_keys: Beginnings of the names in a state dict that belong to the head and
            are passed over; `head_path` is always among them.
        class_names: The names of the classes that the head of the weights tells apart, in
            the order of its rows, or a callable that gives them; none where they are not
            known. With them a model has a `pretrained_head`.
        stage_parents: The paths of modules whose children are stages (`find_stages`), where
            the network's own children are too coarse: "features", "blocks". Or a callable
            that reads them off the network.
        weights_license: The licence of the default weights, as far as it is known.

    Example:
        >>> from torch import nn
        >>> spec = BackboneSpec(
        ...     name="tiny",
        ...     build=lambda: nn.Sequential(
        ...         nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
        ...     ),
        ...     head_path="3",
        ...     preprocess=Preprocess(crop_size=32, resize_size=32),
        ... )
        >>> network, num_features = spec.build_features()
        >>> num_features
        8
    """

    name: str
    build: Callable[[], nn.Module]
    preprocess: Preprocess
    head_path: str | None = None
    num_features: int | Callable[[nn.Module], int] | None = None
    load_weights: Callable[[], Mapping[str, Tensor]] | None = None
    convert_weights: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    head_keys: tuple[str, ...] = field(default=())
    class_names: tuple[str, ...] | Callable[[], tuple[str, ...]] = field(default=(), repr=False)
    stage_parents: tuple[str, ...] | Callable[[nn.Module], tuple[str, ...]] = ()
    weights_license: str | None = None

    def build_features(self) -> tuple[nn.Module, int]:
        """Build the network without its head.

        Returns:
            The network, which maps images `(N, C, H, W)` to features `(N, D)`, and D.

        Raises:
            BackboneError: The head is not where `head_path` says, is no linear layer or
                1x1 convolution, or D is not known.
        """
        network = self.build()
        if self.head_path is not None:
            head = _get_module(network, self.head_path, self.name)
            num_features = _num_inputs(head, self.head_path, self.name)
            parent, _, attribute = self.head_path.rpartition(".")
            setattr(network.get_submodule(parent), attribute, nn.Identity())
            return network, num_features
        number = self.num_features(network) if callable(self.num_features) else self.num_features
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise BackboneError(
                f"Backbone `{self.name}` has neither a `head_path` nor a usable `num_features`: "
                f"found {number!r}, expected the D of its features (N, D)."
            )
        return network, number

    def find_stages(self, network: nn.Module) -> tuple[Stage, ...]:
        """Return the stages of a network that `build_features` built."""
        parents = self.stage_parents
        return find_stages(network, parents(network) if callable(parents) else parents)

    def find_class_names(self) -> tuple[str, ...]:
        """Return the names of the classes that the head of the weights tells apart.

        Raises:
            BackboneError: `class_names` are no texts.
        """
        names = self.class_names() if callable(self.class_names) else self.class_names
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise BackboneError(
                f"The `class_names` of backbone `{self.name}` should be texts, one for each class "
                f"of its weights' head, found {names!r:.100}."
            )
        return tuple(names)

    @property
    def last_layer_key(self) -> str | None:
        """What the names of the last layer start with in a state dict; None if not known."""
        if self.head_path is not None:
            return self.head_path
        return self.head_keys[0] if len(self.head_keys) == 1 else None

    def is_head_key(self, key: str) -> bool:
        """Tell whether a name of a state dict belongs to the head."""
        heads = (self.head_path, *self.head_keys) if self.head_path else self.head_keys
        return any(key == head or key.startswith(f"{head}.") for head in heads)


def _get_module(network: nn.Module, path: str, name: str) -> nn.Module:
    try:
        return network.get_submodule(path)
    except AttributeError as error:
        children = ", ".join(child for child, _ in network.named_children())
        raise BackboneError(
            f"Backbone `{name}` has no module `{path}`, where its head should be. "
            f"Its children are: {children}."
        ) from error


def _num_inputs(head: nn.Module, path: str, name: str) -> int:
    if isinstance(head, nn.Linear):
        return head.in_features
    # SqueezeNet's head is a 1x1 convolution before the average, which commutes with it.
    if isinstance(head, nn.Conv2d) and head.kernel_size == (1, 1):
        return head.in_channels
    raise BackboneError(
        f"The head of backbone `{name}` at `{path}` should be a linear layer or a 1x1 "
        f"convolution, found {type(head).__name__}."
    )
