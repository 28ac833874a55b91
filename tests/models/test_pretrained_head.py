from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torchvision.models import ResNet18_Weights

from transferkit.errors import ConfigError
from transferkit.models.pretrained_head import (
    PretrainedHead,
    match_class_names,
    pretrained_rows,
)

IMAGENET: list[str] = ResNet18_Weights.DEFAULT.meta["categories"]

# As most lists of ImageNet's names have them; torchvision's tells these apart.
DUPLICATES = [
    {"crane bird": "crane", "maillot tank suit": "maillot"}.get(name, name) for name in IMAGENET
]


def imagenet_head() -> PretrainedHead:
    generator = torch.Generator().manual_seed(0)
    return PretrainedHead(
        weight=torch.randn(1000, 4, generator=generator),
        bias=torch.randn(1000, generator=generator),
        class_names=tuple(IMAGENET),
    )


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("ant", "ant"),
        ("ants", "ant"),
        ("Bees", "bee"),
        ("red_foxes", "red fox"),
        ("GREAT-WHITE-SHARKS", "great white shark"),
        ("timber wolves", "timber wolf"),
        ("school_buses", "school bus"),
        ("sunglass", "sunglass"),
        ("sunglasses", "sunglasses"),
        ("dragonflies", "dragonfly"),
        ("daisies", "daisy"),
        ("wine  bottles", "wine bottle"),
        ("matchsticks", "matchstick"),
        ("t_shirt", "T-shirt"),
        ("torches", "torch"),
        ("mosques", "mosque"),
        ("hourglasses", "hourglass"),
        ("mice", "mice"),
        ("butterflies", "butterfly"),
        ("cookies", "cookie"),
        ("ant", "ants"),
    ],
)
def test_names_match(name: str, known: str) -> None:
    others = ["hen", "tiger shark", "kitchen", "maypole"]
    assert match_class_names([name], [*others, known]) == {name: (4,)}
    if known in IMAGENET:
        assert match_class_names([name], IMAGENET) == {name: (IMAGENET.index(known),)}


def test_rows_of_imagenet_are_the_known_ones() -> None:
    found = match_class_names(["bees", "ants"], IMAGENET)
    assert found == {"bees": (309,), "ants": (310,)}
    assert list(found) == ["bees", "ants"]


def test_mapping_takes_names_and_indices() -> None:
    found = match_class_names(
        ["cat", "dog", "ants", "lorry"],
        IMAGENET,
        {"cat": ["tabby", 282, "Tiger-Cats"], "dog": 207, "lorry": "trailer trucks"},
    )
    assert found == {"cat": (281, 282), "dog": (207,), "ants": (310,), "lorry": (867,)}


def test_mapping_goes_before_the_name() -> None:
    assert match_class_names(["crane"], DUPLICATES, {"crane": 517}) == {"crane": (517,)}
    assert match_class_names(["bee"], IMAGENET, {"bee": "ant"}) == {"bee": (310,)}


@pytest.mark.parametrize(
    ("class_names", "mapping", "message"),
    [
        (["cranes"], None, "The name 'cranes' fits 2 rows of the pretrained classifier: "
         "134 ('crane'), 517 ('crane'). Choose by index: mapping={'cranes': 134}."),
        (["swimsuit"], {"swimsuit": ["bikini", "maillot"]}, "The name 'maillot' fits 2 rows of "
         "the pretrained classifier: 638 ('maillot'), 639 ('maillot'). Choose by index: "
         "mapping={'swimsuit': 638}."),
        (["hot dog"], None, "The name 'hot dog' fits none of the 1000 names of the pretrained "
         "classifier. The closest are 'hotdog', 'hot pot', 'hog'. Say what the class is called "
         "there, by a name or an index: mapping={'hot dog': 'hotdog'}."),
        (["zzzz"], None, "The name 'zzzz' fits none of the 1000 names of the pretrained "
         "classifier. Say what the class is called there, by a name or an index: "
         "mapping={'zzzz': 'NAME'}."),
        (["cat"], {"cat": "tabbi"}, "The name 'tabbi' fits none of the 1000 names of the "
         "pretrained classifier. The closest are 'tabby'. Say what the class is called there, "
         "by a name or an index: mapping={'cat': 'tabby'}."),
        (["ants"], {"ant": 310}, "`mapping` names 'ant', which is none of the 1 classes. "
         "Did you mean 'ants'?"),
        (["ants"], {"zzzz": 310}, "`mapping` names 'zzzz', which is none of the 1 classes."),
        (["ants"], {"ants": 1000}, "`mapping['ants']` should hold known names or indices in "
         "[0, 999], found 1000."),
        (["ants"], {"ants": [3, -1]}, "`mapping['ants']` should hold known names or indices in "
         "[0, 999], found -1."),
        (["ants"], {"ants": True}, "`mapping['ants']` should hold known names or indices in "
         "[0, 999], found True."),
        (["ants"], {"ants": None}, "`mapping['ants']` should hold known names or indices in "
         "[0, 999], found None."),
        (["ants"], {"ants": []}, "`mapping['ants']` should be a known name, an index or several "
         "of these, found []."),
        (["ants"], [310], "`mapping` should be a mapping from class names, or None, found list."),
        ("ants", None, "`class_names` should be a list of texts, found 'ants'."),
        ([1], None, "`class_names` should be a list of texts, found [1]."),
    ],
)  # fmt: skip
def test_class_without_its_row_is_an_error(class_names: Any, mapping: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        match_class_names(class_names, DUPLICATES, mapping)


def test_plurals_that_may_be_two_things_are_an_error() -> None:
    message = (
        "The name 'axes' fits 2 rows of the pretrained classifier: 0 ('axe'), 1 ('ax'). "
        "Choose by index: mapping={'axes': 0}."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        match_class_names(["axes"], ["axe", "ax"])


def test_rows_are_taken_and_averaged() -> None:
    head = imagenet_head()
    start = pretrained_rows(head, {"cat": (281, 282), "ants": (310,)}, ["ants", "cat"])
    torch.testing.assert_close(start.weight[0], head.weight[310])
    torch.testing.assert_close(start.bias[0], head.bias[310])
    torch.testing.assert_close(start.weight[1], head.weight[281:283].mean(0))
    torch.testing.assert_close(start.bias[1], head.bias[281:283].mean())
    assert start.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("rows", "found"), [({}, "None"), ({"ants": ()}, "()"), ({"ants": (3, 1000)}, "(3, 1000)")]
)
def test_class_without_usable_rows_is_an_error(rows: Any, found: str) -> None:
    message = (
        f"`rows` should have indices in [0, 999] for the class 'ants', found {found}. "
        f"`match_class_names` finds them."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        pretrained_rows(imagenet_head(), rows, ["ants"])


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3), "A pretrained head with 2 class names needs a `weight` "
         "of the shape (2, D) and a `bias` of the shape (2,), found (3, 4) and (3,)."),
        (torch.zeros(2), torch.zeros(2), "A pretrained head with 2 class names needs a `weight` "
         "of the shape (2, D) and a `bias` of the shape (2,), found (2,) and (2,)."),
        (torch.zeros(2, 4), torch.zeros(2, 1), "A pretrained head with 2 class names needs a "
         "`weight` of the shape (2, D) and a `bias` of the shape (2,), found (2, 4) and (2, 1)."),
        ([], torch.zeros(2), "`weight` should be a tensor (K, D), found list."),
        (torch.zeros(2, 4), None, "`bias` should be a tensor (K,), found NoneType."),
    ],
)  # fmt: skip
def test_pretrained_head_whose_parts_disagree_is_an_error(
    weight: Any, bias: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        PretrainedHead(weight=weight, bias=bias, class_names=("ant", "bee"))


def test_names_of_a_pretrained_head_become_a_tuple() -> None:
    head = PretrainedHead(
        weight=torch.zeros(2, 4),
        bias=torch.zeros(2),
        class_names=["ant", "bee"],  # type: ignore[arg-type]
    )
    assert head.class_names == ("ant", "bee")
