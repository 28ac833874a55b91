from __future__ import annotations

import contextlib
import copy
import io
import os
import subprocess
import sys
import types
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from transferkit.models.splitting import Split, split_backbone
from transferkit.models.stages import find_stages
from transferkit.training.fingerprints import code_of, describe, structure_digest, tensors_digest


def define(source: str, **names: Any) -> Any:
    """Run the source of a class called `Own` and return the class."""
    values: dict[str, Any] = {"nn": nn, "torch": torch, "F": F, "__name__": "mine", **names}
    exec(compile(source, "<mine>", "exec"), values)
    return values["Own"]


def module(
    body: str = "return F.relu(self.conv(x))", *, init: str = "", extra: str = "", **names: Any
) -> nn.Module:
    """Return a module with this code, the same weights each time."""
    source = f"""
class Own(nn.Module):
    {extra or "pass"}

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        {init or "pass"}

    def forward(self, x):
        {body}
"""
    return define(source, **names)()  # type: ignore[no-any-return]


# The structure of a network


def test_two_of_a_kind_have_one_structure() -> None:
    assert structure_digest(module()) == structure_digest(module())


@pytest.mark.parametrize(
    "other",
    [
        lambda: module("return F.gelu(self.conv(x))"),
        lambda: module("return F.relu(2 * self.conv(x))"),
        lambda: module("return F.relu(-self.conv(x))"),
        lambda: module(init="self.scale = 2.0"),
        lambda: module(init="self.sizes = (1, 2)"),
        lambda: module(init="self.act = F.relu"),
        lambda: module(init="self.act = partial(F.softmax, dim=1)", partial=partial),
        lambda: module(init="self.drop = nn.Dropout(0.5)"),
        lambda: module(init="self.conv.stride = (2, 2)"),
        lambda: module(extra="scale = 2.0"),
        lambda: module(extra="scale = staticmethod(lambda x: x)"),
        lambda: module(extra="scale = property(lambda self: 1.0)"),
        lambda: nn.Sequential(module()),
    ],
)
def test_another_structure(other: Callable[[], nn.Module]) -> None:
    assert structure_digest(other()) != structure_digest(module())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("lambda x: x + 1", "lambda x: x + 2"),
        ("lambda x: x.relu()", "lambda x: x.tanh()"),
        ("lambda x, y=1: x", "lambda x, y=2: x"),
        ("lambda x, *, y=1: x", "lambda x, *, y=2: x"),
        ("partial(F.softmax, dim=1)", "partial(F.softmax, dim=2)"),
        ("torch.relu", "torch.tanh"),
        ("nn.ReLU", "nn.GELU"),
        ("[1, (2, 3)]", "[1, (2, 4)]"),
        ("torch.float32", "torch.float16"),
        ("(lambda y: lambda x: x + y)(1)", "(lambda y: lambda x: x + y)(2)"),
        (
            "(lambda f: lambda x: f(x))(lambda x: x + 1)",
            "(lambda f: lambda x: f(x))(lambda x: x + 2)",
        ),
        ("lambda x: [i for i in (1, 2)]", "lambda x: [i for i in (1, 3)]"),
        ("lambda x: x in {1, 2}", "lambda x: x in {1, 3}"),
    ],
)
def test_options_count(one: str, other: str) -> None:
    first, again, second = (
        module(init=f"self.option = {value}", partial=partial) for value in (one, one, other)
    )
    assert structure_digest(first) == structure_digest(again)
    assert structure_digest(first) != structure_digest(second)


@pytest.mark.parametrize("place", ["", "0", "0.conv"])
def test_an_option_counts_wherever_it_is(place: str) -> None:
    one, other = (nn.Sequential(module(), nn.ReLU()) for _ in range(2))
    other.get_submodule(place).bonus = 1  # type: ignore[assignment]
    assert structure_digest(one) != structure_digest(other)


def test_the_code_of_a_base_counts() -> None:
    source = """
class Base(nn.Module):
    def forward(self, x):
        return x {}

class Own(Base):
    pass
"""
    one, other = (define(source.format(end))() for end in ("+ 1", "+ 2"))
    assert structure_digest(one) != structure_digest(other)


def test_the_code_of_a_decorated_function_counts() -> None:
    def twice(function: Any) -> Any:
        return lambda *arguments: function(*arguments) * 2

    source = """
class Own(nn.Module):
    @twice
    def forward(self, x):
        return x {}
"""
    one, again, other = (define(source.format(end), twice=twice)() for end in ("+ 1", "+ 1", "+ 2"))
    assert structure_digest(one) == structure_digest(again)
    assert structure_digest(one) != structure_digest(other)


def test_where_a_class_is_written_does_not_count() -> None:
    source = "class Own(nn.Module):\n    def forward(self, x):\n        return x + 1\n"
    one, other = define(source)(), define("\n\n# moved\n" + source)()
    assert structure_digest(one) == structure_digest(other)


class _Odd(nn.Module):
    """Shows an address in its representation, and has options that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.thing = object()
        self.table = {"a": object()}

    def extra_repr(self) -> str:
        return f"{self.thing}"


def test_addresses_do_not_count() -> None:
    one, other = _Odd(), _Odd()
    assert repr(one) != repr(other)
    assert structure_digest(one) == structure_digest(other)


def test_weights_modes_and_gradients_are_no_structure() -> None:
    one = nn.Sequential(module(), nn.BatchNorm2d(4), nn.Dropout())
    other = copy.deepcopy(one).train().requires_grad_(False)
    with torch.no_grad():
        dict(other.named_buffers())["1.running_mean"].fill_(3.0)
        one.eval()(torch.zeros(1, 3, 8, 8))
    assert structure_digest(one) == structure_digest(other)


def test_the_parts_of_a_split_have_structures_of_their_own() -> None:
    network = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    splits = [cut(network, number) for number in (1, 2, 3, 2)]
    digests = [structure_digest(split.prefix) for split in splits]
    assert len(set(digests)) == 3
    assert digests[1] == digests[3]


def cut(network: nn.Module, number: int) -> Split:
    split = split_backbone(network, find_stages(network), [number], torch.ones(2, 3))
    assert split is not None
    return split


def test_what_runs_between_the_modules_of_a_split_counts() -> None:
    source = """
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.two({}(self.one(x)))
"""
    splits = [cut(define(source.format(name))(), 1) for name in ("torch.relu", "torch.tanh")]
    digests = {structure_digest(split.prefix) + structure_digest(split.suffix) for split in splits}
    assert len(digests) == 2


_OTHER_PROCESS = """
import torch
from transferkit.models import build_model
from transferkit.training.fingerprints import code_of, structure_digest, tensors_digest
class Own(torch.nn.Module):
    words = ("a", "b")
    def forward(self, x):
        return x if "a" in {"a", "b", "c", "d"} else [y for y in x]
model = build_model("resnet18", 2, weights=None)
prefix = model.split(2).prefix
print(structure_digest(prefix), structure_digest(Own()), tensors_digest(prefix))
"""


def test_processes_agree() -> None:
    here = io.StringIO()
    with contextlib.redirect_stdout(here):
        exec(_OTHER_PROCESS, {"__name__": "__main__"})
    there = subprocess.run(
        [sys.executable, "-c", _OTHER_PROCESS],
        env={**os.environ, "PYTHONHASHSEED": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout == here.getvalue()
    assert len(there.stdout.split()) == 3


# The weights


def test_the_weights_count_to_the_last_bit() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = tensors_digest(network)
    value = dict(network.named_parameters())["0.weight"].detach()[0, 0]
    value.copy_(torch.nextafter(value, torch.tensor(9.0)))
    assert tensors_digest(network) != before


@pytest.mark.parametrize("persistent", [False, True])
def test_buffers_count_also_those_in_no_state_dict(persistent: bool) -> None:
    network = nn.Linear(3, 3)
    network.register_buffer("table", torch.zeros(2), persistent=persistent)
    before = tensors_digest(network)
    dict(network.named_buffers())["table"].fill_(1.0)
    assert tensors_digest(network) != before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float16)),
        (torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(()), torch.zeros(1)),
    ],
)
def test_shapes_and_types_count(one: Tensor, other: Tensor) -> None:
    digests = []
    for values in (one, other):
        network = nn.Identity()
        network.register_buffer("values", values)
        digests.append(tensors_digest(network))
    assert digests[0] != digests[1]


def test_names_count() -> None:
    weight = nn.Linear(3, 3)
    assert tensors_digest(nn.Sequential(weight)) != tensors_digest(weight)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.bool, torch.int8, torch.complex64, torch.float64]
)
def test_every_type_of_values(dtype: torch.dtype) -> None:
    network = nn.Identity()
    network.register_buffer("values", torch.tensor([0, 1, 1, 0]).to(dtype))
    before = tensors_digest(network)
    dict(network.named_buffers())["values"][2] = 0
    assert tensors_digest(network) != before


def test_the_layout_in_memory_does_not_count() -> None:
    network = nn.Conv2d(3, 4, 3)
    other = copy.deepcopy(network).to(memory_format=torch.channels_last)
    assert not other.weight.is_contiguous()
    assert tensors_digest(network) == tensors_digest(other)


# Values and code


class _Colour(Enum):
    RED = 1
    BLUE = 2


@pytest.mark.parametrize(
    "value", [{"a": 1}, object(), torch.zeros(1), [1, object()], Path("a"), {1, 2}]
)
def test_what_says_nothing_has_no_text(value: object) -> None:
    assert describe(value) is None


@pytest.mark.parametrize("value", [None, True, 1, 1.5, "a", b"a", _Colour.RED, torch.float32, ()])
def test_plain_values_are_told_by_themselves(value: object) -> None:
    assert describe(value) == describe(copy.deepcopy(value))
    assert describe(value) != describe((value,))


def test_members_of_an_enumeration_differ() -> None:
    assert describe(_Colour.RED) != describe(_Colour.BLUE)


def test_a_function_that_encloses_itself_ends() -> None:
    def count(number: int) -> int:
        return count(number - 1) if number else 0

    assert describe(count) == describe(count)


def test_a_name_without_a_value_yet() -> None:
    def outer() -> str | None:
        def inner() -> int:
            return later

        text = describe(inner)
        later = 1
        return text

    assert outer() == outer() is not None


def test_methods_are_told_by_their_function() -> None:
    one, other = module(), module()
    assert describe(one.forward) == describe(other.forward) is not None
    assert describe(one.forward) == describe(types.MethodType(type(one).forward, other))


def test_pytorchs_own_code_is_left_to_its_version() -> None:
    assert code_of(nn.Conv2d) == "torch.nn.modules.conv.Conv2d"
    assert code_of(_Odd).startswith(f"{__name__}._Odd\n__init__=")
