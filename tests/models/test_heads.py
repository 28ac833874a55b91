from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - F is what everybody calls it
from torch import Tensor, nn

from transferkit.errors import ConfigError
from transferkit.models.heads import (
    DropoutLinear,
    HeadSpec,
    MLPHead,
    set_linear,
)

BOTH = ("weight", "bias")

SPECS = [
    HeadSpec(),
    HeadSpec(dropout=0.5),
    HeadSpec(kind="mlp"),
    HeadSpec(kind="mlp", hidden=(16, 4), dropout=0.25),
    HeadSpec(kind="cosine"),
    HeadSpec(kind="cosine", scale=4, dropout=0.5),
]


def build_seeded(spec: HeadSpec, num_features: int = 8, num_classes: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spec.build(num_features, num_classes)


@pytest.fixture
def features() -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spec", SPECS)
def test_description_survives_json(spec: HeadSpec) -> None:
    assert HeadSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_description_as_a_dict() -> None:
    assert HeadSpec(kind="mlp", dropout=0.5).to_dict() == {
        "kind": "mlp",
        "dropout": 0.5,
        "hidden": [512],
        "scale": 16.0,
    }


@pytest.mark.parametrize("data", [{}, {"kind": "linear"}, {**HeadSpec().to_dict(), "width": 3}])
def test_dict_with_other_fields_is_an_error(data: dict[str, Any]) -> None:
    message = (
        f"A head description should have the fields ['dropout', 'hidden', 'kind', 'scale'], "
        f"found {sorted(data)}."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        HeadSpec.from_dict(data)


def test_dict_that_is_none_is_an_error() -> None:
    message = "`data` should be the mapping that `HeadSpec.to_dict` returns, found str."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        HeadSpec.from_dict("linear")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["linear", "mlp", "cosine"])
def test_kind_is_enough(kind: Any) -> None:
    assert HeadSpec.parse(kind) == HeadSpec(kind=kind)
    spec = HeadSpec(kind=kind, dropout=0.5)
    assert HeadSpec.parse(spec) is spec


@pytest.mark.parametrize("head", ["Linear", "", None, 3, ["mlp"], nn.Linear])
def test_head_that_is_no_kind_is_an_error(head: Any) -> None:
    message = f'`head` should be "linear", "mlp", "cosine" or a HeadSpec, found {head!r}.'
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        HeadSpec.parse(head)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fc"}, '`kind` of a head should be "linear", "mlp" or "cosine", found \'fc\'.'),
        ({"kind": ["mlp"]}, '`kind` of a head should be "linear", "mlp" or "cosine", '
         "found ['mlp']."),
        ({"dropout": 1.0}, "`dropout` should be a finite number in [0, 1), the share to drop, "
         "found 1.0."),
        ({"dropout": -0.1}, "`dropout` should be a finite number in [0, 1), the share to drop, "
         "found -0.1."),
        ({"dropout": True}, "`dropout` should be a finite number in [0, 1), the share to drop, "
         "found True."),
        ({"kind": "cosine", "scale": 0}, "`scale` should be a finite number above 0, found 0."),
        ({"kind": "cosine", "scale": float("inf")}, "`scale` should be a finite number above 0, "
         "found inf."),
        ({"hidden": (8,)}, '`hidden` is for kind="mlp"; a head of the kind "linear" has no hidden '
         "layers, found (8,). Leave it out."),
        ({"kind": "cosine", "hidden": (8,)}, '`hidden` is for kind="mlp"; a head of the kind '
         '"cosine" has no hidden layers, found (8,). Leave it out.'),
        ({"scale": 4.0}, '`scale` is for kind="cosine"; a head of the kind "linear" has no scale, '
         "found 4.0. Leave it out."),
        ({"kind": "mlp", "scale": 4.0}, '`scale` is for kind="cosine"; a head of the kind "mlp" '
         "has no scale, found 4.0. Leave it out."),
        ({"kind": "mlp", "hidden": 512}, "`hidden` should be a tuple of widths, such as (512,), "
         "found 512."),
        ({"kind": "mlp", "hidden": (8, 0)}, "`hidden[1]` should be an integer of at least 1, "
         "found 0."),
        ({"kind": "mlp", "hidden": (2.5,)}, "`hidden[0]` should be an integer of at least 1, "
         "found 2.5."),
    ],
)  # fmt: skip
def test_value_that_does_not_fit_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        HeadSpec(**options)


def test_too_many_hidden_layers_are_an_error() -> None:
    message = "`hidden` should have at most 32 widths, found 33 of them."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        HeadSpec(kind="mlp", hidden=(4,) * 33)


@pytest.mark.parametrize("spec", SPECS)
def test_head_gives_logits_of_the_right_shape(spec: HeadSpec, features: Tensor) -> None:
    head = build_seeded(spec)
    assert head(features).shape == (5, 3)
    assert head(features[:0]).shape == (0, 3)
    assert [head.in_features, head.out_features] == [8, 3]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 2), "`num_features` should be an integer of at least 1, found 0."),
        ((4, 1), "`num_classes` should be an integer of at least 2, found 1."),
    ],
)
def test_sizes_that_cannot_work_are_an_error(sizes: tuple[int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        HeadSpec().build(*sizes)


def test_state_dict_names_do_not_depend_on_dropout() -> None:
    for spec, names in (
        ({"kind": "linear"}, ["weight", "bias"]),
        ({"kind": "cosine"}, ["weight", "scale"]),
        (
            {"kind": "mlp", "hidden": (4, 4)},
            [f"{layer}.{kind}" for layer in ("hidden.0", "hidden.3", "last") for kind in BOTH],
        ),
    ):
        for dropout in (0.0, 0.5):
            head = HeadSpec(**spec, dropout=dropout).build(8, 3)
            assert list(head.state_dict()) == names


def test_linear_head_is_the_plain_layer_with_the_same_random_weights() -> None:
    plain, dropping = (build_seeded(HeadSpec(dropout=dropout)) for dropout in (0.0, 0.5))
    assert type(plain) is nn.Linear
    assert type(dropping) is DropoutLinear
    assert torch.equal(plain.weight, dropping.get_parameter("weight"))
    assert torch.equal(plain.bias, dropping.get_parameter("bias"))
    assert repr(dropping) == (
        "DropoutLinear(in_features=8, out_features=3, bias=True, dropout=0.5)"
    )


def test_last_layer_of_an_mlp_is_linear() -> None:
    head = HeadSpec(kind="mlp", hidden=(16, 4)).build(8, 3)
    assert isinstance(head, MLPHead)
    assert [type(each).__name__ for each in head.hidden] == ["Linear", "ReLU", "Dropout"] * 2
    assert (head.last.in_features, head.last.out_features) == (4, 3)


@pytest.mark.parametrize("spec", SPECS)
def test_dropout_only_in_training(spec: HeadSpec, features: Tensor) -> None:
    head = build_seeded(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = head.train()(features), head(features)
        assert torch.equal(first, second) == (spec.dropout == 0)
        assert torch.equal(head.eval()(features), head(features))


def test_dropout_takes_features_and_keeps_their_mean() -> None:
    head = build_seeded(HeadSpec(dropout=0.25), 8, 2)
    set_linear(head, torch.eye(2, 8), torch.zeros(2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits = head(torch.ones(4000, 8))
    assert sorted(set(logits.flatten().tolist())) == pytest.approx([0, 4 / 3])
    assert logits.mean().item() == pytest.approx(1, abs=0.03)


def test_cosine_head_is_the_scaled_cosine(features: Tensor) -> None:
    head = build_seeded(HeadSpec(kind="cosine", scale=4.0))
    weight = head.get_parameter("weight")
    expected = 4 * F.cosine_similarity(features[:, None], weight[None], dim=-1)
    torch.testing.assert_close(head(features), expected)
    torch.testing.assert_close(head(1e-8 * features), head(1e15 * features))
    assert repr(head) == "CosineHead(in_features=8, out_features=3, dropout=0.0)"


def test_scale_of_a_cosine_head_trains(features: Tensor) -> None:
    head = build_seeded(HeadSpec(kind="cosine"))
    loss = F.cross_entropy(head(features), torch.tensor([0, 1, 2, 0, 1]))
    (gradient,) = torch.autograd.grad(loss, [head.get_parameter("scale")])
    assert gradient.shape == ()
    assert gradient != 0


def test_zero_features_have_no_direction_and_no_gradient(features: Tensor) -> None:
    head = build_seeded(HeadSpec(kind="cosine"))
    features[1] = 0
    features.requires_grad_()
    logits = head(features)
    gradient, *others = torch.autograd.grad(logits.square().sum(), [features, *head.parameters()])
    assert logits[1].tolist() == [0, 0, 0]
    assert gradient[1].tolist() == [0] * 8
    assert gradient.isfinite().all()
    assert (gradient[0] != 0).all()
    assert all(each.isfinite().all() for each in others)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cosine_head_takes_half_precision(dtype: torch.dtype, features: Tensor) -> None:
    head = build_seeded(HeadSpec(kind="cosine"))
    expected = head(features)
    # Squares of such features are beyond float16.
    logits = copy.deepcopy(head).to(dtype)((1000 * features).to(dtype))
    torch.testing.assert_close(logits.float(), expected, atol=0.3, rtol=0.05)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_classifier_is_written_into_a_linear_head(
    dropout: float, dtype: torch.dtype, features: Tensor
) -> None:
    head = build_seeded(HeadSpec(dropout=dropout)).eval()
    parameters = list(head.parameters())
    weight, bias = torch.randn(3, 8, dtype=dtype), torch.randn(3, dtype=dtype)
    set_linear(head, weight, bias)
    assert list(map(id, head.parameters())) == list(map(id, parameters))
    assert all(each.requires_grad and each.grad_fn is None for each in parameters)
    torch.testing.assert_close(head(features), F.linear(features, weight.float(), bias.float()))
    weight.zero_()
    assert parameters[0].abs().sum() > 0


def test_cosine_head_takes_directions_alone(features: Tensor) -> None:
    head = build_seeded(HeadSpec(kind="cosine", scale=4.0))
    weight = torch.randn(3, 8)
    weight[2] = 0
    set_linear(head, weight, torch.full((3,), 100.0))
    lengths = head.get_parameter("weight").norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 1.0, 0.0]))
    assert head.get_parameter("scale").item() == 4
    expected = 4 * F.cosine_similarity(features[:, None], weight[None], dim=-1)
    torch.testing.assert_close(head(features), expected)


@pytest.mark.parametrize(
    "head", [MLPHead(8, 3), nn.Identity(), nn.Linear(8, 3, bias=False), nn.Sequential()]
)
def test_head_that_is_not_linear_has_no_direct_way(head: nn.Module) -> None:
    message = (
        f"There is no direct way to write a linear classifier into a head of the class "
        f"{type(head).__name__}: expected an `nn.Linear` with a bias or a `CosineHead`. "
        f'Take head="linear" or head="cosine", or let this head start from random weights.'
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        set_linear(head, torch.zeros(3, 8), torch.zeros(3))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("weight", "bias", "found"),
    [
        (torch.zeros(8, 3), torch.zeros(3), "(8, 3) and (3,)"),
        (torch.zeros(3, 8), torch.zeros(1), "(3, 8) and (1,)"),
        (torch.zeros(3, 8), None, "(3, 8) and NoneType"),
    ],
)
def test_shape_that_does_not_fit_leaves_the_head_alone(
    kind: Any, weight: Tensor, bias: Any, found: str
) -> None:
    head = HeadSpec(kind=kind).build(8, 3)
    before = copy.deepcopy(head.state_dict())
    message = (
        f"A head for 8 features and 3 classes needs a `weight` of the shape (3, 8) and a `bias` "
        f"of the shape (3,), found {found}."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        set_linear(head, weight, bias)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
