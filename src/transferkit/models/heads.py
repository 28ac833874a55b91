"""Heads: what turns features into logits, as data and as modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F  # noqa: N812 - F is what everybody calls it
from torch import Tensor, nn

from transferkit._checks import check_integer, check_number, check_type
from transferkit.errors import ConfigError

HeadKind: TypeAlias = Literal["linear", "mlp", "cosine"]

DEFAULT_HIDDEN = (512,)
MAX_HIDDEN = 32
DEFAULT_SCALE = 16.0


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """Describe a head: what it is, and how strongly it is regularised.

    Args:
        kind: "linear" for one linear layer; "mlp" for hidden layers before it, where the
            classes are not linearly separable; "cosine" for scaled cosines between features
            and one row for each class, which suits few pictures and uneven classes.
        dropout: The share of values that training drops, in [0, 1): of the features, and
            with "mlp" of each hidden layer's output instead.
        hidden: The widths of the hidden layers; only for "mlp", where nothing means (512,).
        scale: What the cosines are multiplied with at first, above 0; it trains. Only for
            "cosine".

    Raises:
        ConfigError: A value cannot work, or is one that this kind does not use.

    Example:
        >>> HeadSpec(kind="mlp", dropout=0.2).build(num_features=8, num_classes=3)
        MLPHead(
          (hidden): Sequential(
            (0): Linear(in_features=8, out_features=512, bias=True)
            (1): ReLU()
            (2): Dropout(p=0.2, inplace=False)
          )
          (last): Linear(in_features=512, out_features=3, bias=True)
        )
    """

    kind: HeadKind = "linear"
    dropout: float = 0.0
    hidden: tuple[int, ...] = ()
    scale: float = DEFAULT_SCALE

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in get_args(HeadKind):
            raise ConfigError(
                f'`kind` of a head should be "linear", "mlp" or "cosine", found {self.kind!r}.'
            )
        dropout = check_number(
            "dropout", self.dropout, lambda share: 0 <= share < 1, "in [0, 1), the share to drop"
        )
        scale = check_number("scale", self.scale, lambda factor: factor > 0, "above 0")
        hidden = _check_hidden(self.hidden)
        if hidden and self.kind != "mlp":
            raise ConfigError(
                f'`hidden` is for kind="mlp"; a head of the kind "{self.kind}" has no hidden '
                f"layers, found {self.hidden!r}. Leave it out."
            )
        if scale != DEFAULT_SCALE and self.kind != "cosine":
            raise ConfigError(
                f'`scale` is for kind="cosine"; a head of the kind "{self.kind}" has no scale, '
                f"found {self.scale!r}. Leave it out."
            )
        object.__setattr__(self, "dropout", dropout)
        object.__setattr__(self, "scale", scale)
        if self.kind == "mlp":
            hidden = hidden or DEFAULT_HIDDEN
        object.__setattr__(self, "hidden", hidden)

    @classmethod
    def parse(cls, head: str | HeadSpec) -> HeadSpec:
        """Build a description from a kind; one that is there already is returned as it is.

        Raises:
            ConfigError: It is neither.

        Example:
            >>> HeadSpec.parse("cosine").scale
            16.0
        """
        if isinstance(head, HeadSpec):
            return head
        if isinstance(head, str) and head in get_args(HeadKind):
            return cls(kind=head)  # type: ignore[arg-type]
        raise ConfigError(
            f'`head` should be "linear", "mlp", "cosine" or a HeadSpec, found {head!r}.'
        )

    def build(self, num_features: int, num_classes: int) -> nn.Module:
        """Build the head with random weights from PyTorch's global generator.

        Args:
            num_features: The D of the features, at least 1.
            num_classes: The number of classes C, at least 2.

        Returns:
            A module that maps features `(N, D)` to logits `(N, C)`. A linear head without
            dropout is a plain `nn.Linear`, one with dropout has the same parameter names.

        Raises:
            ConfigError: A number is out of range.
        """
        num_features = check_integer("num_features", num_features, minimum=1)
        num_classes = check_integer("num_classes", num_classes, minimum=2)
        if self.kind == "mlp":
            return MLPHead(num_features, num_classes, hidden=self.hidden, dropout=self.dropout)
        if self.kind == "cosine":
            return CosineHead(num_features, num_classes, scale=self.scale, dropout=self.dropout)
        if self.dropout:
            return DropoutLinear(num_features, num_classes, dropout=self.dropout)
        return nn.Linear(num_features, num_classes)

    def to_dict(self) -> dict[str, Any]:
        """Return the description as JSON types."""
        return {**asdict(self), "hidden": list(self.hidden)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HeadSpec:
        """Build the description from what `to_dict` returned.

        Raises:
            ConfigError: A field is missing, unknown or has a value that cannot work.

        Example:
            >>> HeadSpec.from_dict(HeadSpec(dropout=0.5).to_dict())
            HeadSpec(kind='linear', dropout=0.5, hidden=(), scale=16.0)
        """
        check_type("data", data, Mapping, "the mapping that `HeadSpec.to_dict` returns")
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            raise ConfigError(
                f"A head description should have the fields {sorted(names)}, "
                f"found {sorted(map(str, data))}."
            )
        return cls(**data)


def _check_hidden(hidden: object) -> tuple[int, ...]:
    if not isinstance(hidden, (tuple, list)):
        raise ConfigError(
            f"`hidden` should be a tuple of widths, such as (512,), found {hidden!r}."
        )
    if len(hidden) > MAX_HIDDEN:
        raise ConfigError(
            f"`hidden` should have at most {MAX_HIDDEN} widths, found {len(hidden)} of them."
        )
    return tuple(
        check_integer(f"hidden[{place}]", width, minimum=1) for place, width in enumerate(hidden)
    )


class DropoutLinear(nn.Linear):
    """Drop features in training, then apply a linear layer.

    Its parameters are named as those of `nn.Linear`, so that files fit both.

    Args:
        num_features: The D of the features.
        num_classes: The number of classes C.
        dropout: The share of features that training drops, in [0, 1).

    Example:
        >>> list(DropoutLinear(8, 3, dropout=0.5).state_dict())
        ['weight', 'bias']
    """

    def __init__(self, num_features: int, num_classes: int, *, dropout: float) -> None:
        super().__init__(num_features, num_classes)
        self.dropout = dropout

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that `nn.Linear` gave it
        """Compute logits `(N, C)` of features `(N, D)`."""
        return super().forward(F.dropout(input, self.dropout, self.training))

    def extra_repr(self) -> str:
        """Name the sizes and the dropout in the module's `repr`."""
        return f"{super().extra_repr()}, dropout={self.dropout}"


class MLPHead(nn.Module):
    """Apply hidden layers with ReLU and dropout, then a linear layer named `last`.

    Args:
        num_features: The D of the features.
        num_classes: The number of classes C.
        hidden: The widths of the hidden layers, at least one.
        dropout: The share of each hidden layer's output that training drops, in [0, 1).

    Example:
        >>> head = MLPHead(8, 3, hidden=(16, 4))
        >>> head(torch.zeros(5, 8)).shape, head.last.in_features
        (torch.Size([5, 3]), 4)
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        hidden: tuple[int, ...] = DEFAULT_HIDDEN,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_features = num_features
        self.out_features = num_classes
        layers: list[nn.Module] = []
        for num_inputs, width in zip((num_features, *hidden), hidden, strict=False):
            # Dropout has its place also where it is 0: names must not depend on it.
            layers += [nn.Linear(num_inputs, width), nn.ReLU(), nn.Dropout(dropout)]
        self.hidden: nn.Sequential = nn.Sequential(*layers)
        self.last: nn.Linear = nn.Linear(hidden[-1], num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits `(N, C)` of features `(N, D)`."""
        logits: Tensor = self.last(self.hidden(features))
        return logits


class CosineHead(nn.Module):
    """Compare features with one row for each class by their angle alone.

    The logits are `scale * cos(features, weight)`. The length of features and rows does not
    matter, so that classes with few pictures are not drowned by those with many. Features
    that are all zero, which have no direction, get logits of 0 and a gradient of 0.

    Args:
        num_features: The D of the features.
        num_classes: The number of classes C.
        scale: What the cosines are multiplied with at first, above 0; it trains.
        dropout: The share of features that training drops, in [0, 1).

    Example:
        >>> head = CosineHead(8, 3, scale=10.0)
        >>> features = torch.rand(5, 8)
        >>> torch.allclose(head(features), head(7 * features), atol=1e-5)
        True

    References:
        Gidaris and Komodakis, Dynamic Few-Shot Visual Learning without Forgetting, 2018,
        https://arxiv.org/abs/1804.09458
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        scale: float = DEFAULT_SCALE,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_features = num_features
        self.out_features = num_classes
        self.dropout = dropout
        self.weight: nn.Parameter = nn.Parameter(torch.randn(num_classes, num_features))
        self.scale: nn.Parameter = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits `(N, C)` of features `(N, D)`, in [-scale, scale]."""
        features = F.dropout(features, self.dropout, self.training)
        return self.scale * F.linear(_normalize(features), _normalize(self.weight))

    def extra_repr(self) -> str:
        """Name the sizes and the dropout in the module's `repr`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"dropout={self.dropout}"
        )


def _normalize(rows: Tensor) -> Tensor:
    """Bring rows to length 1, in float32 at least; rows of zeros stay zero, without gradient."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    normalized: Tensor = rows / lengths.masked_fill(lengths < 1e-12, torch.inf)
    return normalized


def set_linear(head: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Write a linear classifier into a head, in place, on whatever device it lies.

    A cosine head takes the direction of each row: the rows are written with length 1, `bias`
    is not used, since it has none, and its scale stays as it is.

    Args:
        head: An `nn.Linear`, with dropout or without, or a `CosineHead`.
        weight: Floating point `(C, D)`, converted to the head's own type.
        bias: Floating point `(C,)`, converted likewise.

    Raises:
        ConfigError: The shapes do not fit the head, or it is a head of another kind, such as
            an MLP, whose last layer does not see the features.

    Example:
        >>> head = nn.Linear(3, 2)
        >>> set_linear(head, torch.ones(2, 3), torch.tensor([0.0, 5.0]))
        >>> head(torch.ones(1, 3)).tolist()
        [[3.0, 8.0]]
    """
    is_linear = isinstance(head, nn.Linear) and isinstance(head.bias, nn.Parameter)
    if not (is_linear or isinstance(head, CosineHead)):
        raise ConfigError(
            f"There is no direct way to write a linear classifier into a head of the class "
            f"{type(head).__name__}: expected an `nn.Linear` with a bias or a `CosineHead`. "
            f'Take head="linear" or head="cosine", or let this head start from random weights.'
        )
    expected = (head.out_features, head.in_features)
    found = [
        tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__
        for each in (weight, bias)
    ]
    if found != [expected, expected[:1]]:
        raise ConfigError(
            f"A head for {expected[1]} features and {expected[0]} classes needs a `weight` of the "
            f"shape {expected} and a `bias` of the shape {expected[:1]}, "
            f"found {found[0]} and {found[1]}."
        )
    with torch.no_grad():
        if isinstance(head, CosineHead):
            head.weight.copy_(_normalize(weight))
        elif isinstance(head, nn.Linear):
            head.weight.copy_(weight)
            head.bias.copy_(bias)
