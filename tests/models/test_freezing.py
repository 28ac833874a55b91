from __future__ import annotations

import copy
import functools
import json
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from transferkit.errors import FreezeError, UnknownNameError
from transferkit.models import BackboneSpec, Classifier, FreezePlan, build_model

MODES = st.sampled_from(["frozen", "train", "adapt", "fixed"])
PATTERNS = st.lists(st.text(min_size=1), min_size=1, max_size=4).map(tuple)
PLANS = (
    st.builds(FreezePlan, PATTERNS, MODES, st.none() | st.text())
    | st.builds(FreezePlan, bn=MODES, until=st.text())
    | st.builds(FreezePlan, bn=st.sampled_from(["frozen", "fixed"]))
)


def train_steps(model: Classifier, number: int = 3) -> None:
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        images = torch.rand(4, 3, 32, 32, generator=generator)
        loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 0, 1]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed_names(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }


# The plan as data


@settings(deadline=None)
@given(PLANS)
def test_plan_survives_json(plan: FreezePlan) -> None:
    assert FreezePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    ("freeze", "patterns"),
    [
        ("none", ()),
        ("backbone", ("backbone.*",)),
        ("backbone.conv1.*", ("backbone.conv1.*",)),
        (["a*", "b*"], ("a*", "b*")),
        (("a*",), ("a*",)),
    ],
)
def test_what_can_be_passed_becomes_a_plan(freeze: Any, patterns: tuple[str, ...]) -> None:
    assert FreezePlan.parse(freeze) == FreezePlan(patterns)


def test_until_becomes_a_plan() -> None:
    assert FreezePlan.parse("until:layer3") == FreezePlan(until="layer3")
    assert FreezePlan.parse("until:blocks.2", bn="adapt") == FreezePlan((), "adapt", "blocks.2")


def test_plans_that_say_the_same_are_equal() -> None:
    plan = FreezePlan(("b*", "a*", "b*"))
    assert plan.patterns == ("a*", "b*")
    assert plan == FreezePlan(["a*", "b*"])  # type: ignore[arg-type]
    assert hash(plan) == hash(FreezePlan(("a*", "b*")))
    assert FreezePlan.parse(["b*", "a*"]) == FreezePlan.parse(("a*", "b*"))


@pytest.mark.parametrize(
    ("plan", "freezes"),
    [
        (FreezePlan(), False),
        (FreezePlan(bn="fixed"), False),
        (FreezePlan(("a*",)), True),
        (FreezePlan(until="layer1"), True),
    ],
)
def test_plan_knows_whether_it_freezes(plan: FreezePlan, freezes: bool) -> None:
    assert plan.freezes is freezes


def test_plan_of_an_older_version_is_read() -> None:
    plan = FreezePlan.from_dict({"patterns": ["backbone.*"], "bn": "adapt"})
    assert plan == FreezePlan(("backbone.*",), "adapt")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "found none."),
        ({"patterns": []}, "found patterns."),
        ({"patterns": [], "bn": "frozen", "from": "a"}, "found patterns, bn, from."),
    ],
)
def test_data_with_other_fields_is_an_error(data: dict[str, Any], words: str) -> None:
    with pytest.raises(FreezeError) as error:
        FreezePlan.from_dict(data)
    assert str(error.value) == f"A freeze plan should have the fields patterns, bn, until, {words}"


@pytest.mark.parametrize("patterns", ["backbone.*", None, ("a", 3), {"a"}])
def test_patterns_of_another_kind_are_an_error(patterns: Any) -> None:
    words = (
        f"`patterns` should be a tuple of globs over parameter names, found {patterns!r}. "
        f"`FreezePlan.parse` takes a single one."
    )
    with pytest.raises(FreezeError) as error:
        FreezePlan(patterns)
    assert str(error.value) == words
    with pytest.raises(FreezeError) as error:
        FreezePlan.from_dict({"patterns": patterns, "bn": "frozen"})
    assert str(error.value) == words


@pytest.mark.parametrize("until", [3, ("layer1",)])
def test_until_of_another_kind_is_an_error(until: Any) -> None:
    with pytest.raises(FreezeError) as error:
        FreezePlan(until=until)
    assert str(error.value) == f"`until` should be a stage's name or None, found {until!r}."


def test_a_plan_is_returned_as_it_is() -> None:
    plan = FreezePlan(("backbone.*",), "adapt")
    assert FreezePlan.parse(plan) is plan
    assert FreezePlan.parse(plan, bn="adapt") is plan
    assert FreezePlan.parse("backbone", bn="adapt") == plan


def test_plan_that_the_argument_contradicts_is_an_error() -> None:
    with pytest.raises(FreezeError) as error:
        FreezePlan.parse(FreezePlan(("backbone.*",), "train"), bn="adapt")
    assert str(error.value) == (
        'The freeze plan says bn="train", the argument is bn="adapt". Leave the argument out, '
        "or make a plan that says so."
    )


@pytest.mark.parametrize("freeze", [None, True, 3, [], ["a", 3], {"a"}, list])
def test_anything_else_is_an_error(freeze: Any) -> None:
    with pytest.raises(FreezeError) as error:
        FreezePlan.parse(freeze)
    assert str(error.value) == (
        f'`freeze` should be "none", "backbone", "until:<stage>", a glob over parameter names, a '
        f"list of globs, a callable from (name, parameter) or a FreezePlan, found {freeze!r}."
    )


def test_unknown_mode_of_batchnorm_is_an_error() -> None:
    with pytest.raises(FreezeError) as error:
        FreezePlan.parse("backbone", bn="eval")  # type: ignore[arg-type]
    assert str(error.value) == (
        '`bn` should be "frozen", "train", "adapt" or "fixed", found \'eval\'.'
    )


@pytest.mark.parametrize("bn", ["adapt", "train"])
def test_moving_batchnorm_where_nothing_is_frozen_is_an_error(bn: Any) -> None:
    with pytest.raises(FreezeError) as error:
        FreezePlan.parse("none", bn=bn)
    assert str(error.value) == (
        f'bn="{bn}" has no effect where nothing is frozen: BatchNorm trains anyway. '
        'Leave it out, or freeze something, such as freeze="backbone".'
    )


# Which names


def test_globs_choose_by_name_across_dots(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    plan = FreezePlan(("backbone.layer1.*", "*.bn1.bias"))
    assert plan.frozen_names(model) == {
        "backbone.layer1.0.weight",
        "backbone.layer1.0.bias",
        "backbone.layer1.1.weight",
        "backbone.layer1.1.bias",
        "backbone.bn1.bias",
    }


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("backbone.layer1", "Did you mean `backbone.layer1.*`?"),
        (
            "layer1.*",
            "The parameters' names start with: backbone.bn1, backbone.conv1, backbone.layer1, "
            "head.bias, head.weight.",
        ),
        (
            "",
            "The parameters' names start with: backbone.bn1, backbone.conv1, backbone.layer1, "
            "head.bias, head.weight.",
        ),
    ],
)
def test_pattern_that_matches_nothing_is_an_error_and_changes_nothing(
    tiny_spec: BackboneSpec, pattern: str, hint: str
) -> None:
    with pytest.raises(FreezeError) as error:
        build_model(tiny_spec, 2, weights=None, freeze=pattern)
    assert str(error.value) == f"The freeze pattern `{pattern}` matches no parameter. {hint}"
    model = build_model(tiny_spec, 2, weights=None, freeze="backbone")
    with pytest.raises(FreezeError):
        model.freeze(["head.*", pattern])
    assert model.freeze_plan == FreezePlan.parse("backbone")
    assert model.is_backbone_frozen
    assert model.head.weight.requires_grad


def test_until_freezes_the_stage_and_those_before_it(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze="until:conv1")
    frozen = {name for name, each in model.named_parameters() if not each.requires_grad}
    assert frozen == {
        f"backbone.{name}" for name in ("conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias")
    }
    model.freeze("until:layer1")
    assert model.is_backbone_frozen
    assert model.head.weight.requires_grad


def test_until_and_globs_go_together(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    plan = FreezePlan(("head.bias",), until="conv1")
    expected = FreezePlan.parse("until:conv1").frozen_names(model, model.stages) | {"head.bias"}
    assert plan.frozen_names(model, model.stages) == expected


def test_unknown_stage_is_an_error_and_changes_nothing(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze="backbone")
    with pytest.raises(UnknownNameError) as error:
        model.freeze("until:layer2")
    assert str(error.value) == (
        "Unknown stage `layer2`. Did you mean `layer1`? "
        "`[stage.name for stage in model.stages]` names all 2."
    )
    assert model.freeze_plan == FreezePlan.parse("backbone")
    assert model.is_backbone_frozen


def test_until_where_there_are_no_stages_is_an_error() -> None:
    with pytest.raises(FreezeError) as error:
        build_model(nn.Flatten(), 2, num_features=12, freeze="until:layer1")
    assert str(error.value) == "There is no stage `layer1`: the backbone has no stages."


def test_name_of_a_stage_for_a_glob_is_an_error_with_both_ways_out(tiny_spec: BackboneSpec) -> None:
    with pytest.raises(FreezeError) as error:
        build_model(tiny_spec, 2, weights=None, freeze="layer1")
    assert str(error.value) == (
        "The freeze pattern `layer1` matches no parameter. "
        "Did you mean `until:layer1`, or `backbone.layer1.*`?"
    )


# Callables


def test_callable_chooses_by_name_and_parameter(tiny_spec: BackboneSpec) -> None:
    model = build_model(
        tiny_spec, 2, weights=None, freeze=lambda name, each: "conv1" in name and each.ndim > 1
    )
    assert model.freeze_plan == FreezePlan(("backbone.conv1.weight",))
    frozen = [name for name, each in model.named_parameters() if not each.requires_grad]
    assert frozen == ["backbone.conv1.weight"]


@pytest.mark.parametrize(
    ("choose", "plan"),
    [
        (lambda name, _: True, FreezePlan(("backbone.*", "head.*"))),
        (lambda name, _: name.startswith("backbone."), FreezePlan(("backbone.*",))),
        (
            lambda name, _: "layer1" not in name and "head" not in name,
            FreezePlan(until="conv1"),
        ),
        (lambda name, _: "layer1" in name, FreezePlan(("backbone.layer1.*",))),
        (
            lambda name, _: "layer1.0" in name or name == "head.bias",
            FreezePlan(("backbone.layer1.0.*", "head.bias")),
        ),
        (
            lambda name, _: name != "head.weight" and "layer1.1" not in name,
            FreezePlan(("backbone.layer1.0.*", "head.bias"), until="conv1"),
        ),
    ],
)
def test_plan_of_a_callable_is_short(
    tiny_spec: BackboneSpec, choose: Callable[[str, nn.Parameter], bool], plan: FreezePlan
) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze=choose)
    assert model.freeze_plan == plan
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is not choose(name, parameter)


def test_callable_without_a_model_is_an_error() -> None:
    with pytest.raises(FreezeError) as error:
        FreezePlan.parse(lambda name, parameter: True)
    assert str(error.value) == (
        "A callable `freeze` chooses from the parameters of a model: pass `model=`."
    )


def test_callable_that_answers_something_else_is_an_error(tiny_spec: BackboneSpec) -> None:
    with pytest.raises(FreezeError) as error:
        build_model(tiny_spec, 2, weights=None, freeze=lambda name, parameter: None)  # type: ignore[arg-type, return-value]
    assert str(error.value) == (
        "The callable should return True or False for each parameter, found None "
        "for `backbone.conv1.weight`."
    )


def test_callable_with_other_arguments_is_an_error(tiny_spec: BackboneSpec) -> None:
    def choose(name: str) -> bool:
        return True

    with pytest.raises(FreezeError) as error:
        build_model(tiny_spec, 2, weights=None, freeze=choose)  # type: ignore[arg-type]
    assert str(error.value) == (
        "The callable failed for the parameter `backbone.conv1.weight`: "
        f"{choose.__qualname__}() takes 1 positional argument but 2 were given. It should take a "
        "parameter's name and the parameter, and return True or False."
    )
    assert isinstance(error.value.__cause__, TypeError)


def test_callable_that_chooses_nothing_is_an_error(tiny_spec: BackboneSpec) -> None:
    with pytest.raises(FreezeError) as error:
        build_model(tiny_spec, 2, weights=None, freeze=lambda name, parameter: False)
    assert str(error.value) == (
        "The callable chooses no parameter: it returns False for all of them."
    )


# Unfreezing


BLOCKS = OrderedDict[str, nn.Module](
    flat=nn.Flatten(),
    one=nn.Linear(12, 4),
    norm=nn.BatchNorm1d(4),
    two=nn.Linear(4, 4),
    three=nn.Linear(4, 4),
)


def blocks(**options: Any) -> Classifier:
    """Return a model with the stages one, two and three, the first with BatchNorm."""
    return build_model(nn.Sequential(copy.deepcopy(BLOCKS)), 2, num_features=4, **options)


@pytest.mark.parametrize(
    ("freeze", "what", "plan"),
    [
        ("backbone", "all", FreezePlan()),
        ("backbone", "backbone", FreezePlan()),
        ("backbone", "next", FreezePlan(until="two")),
        ("backbone", "from:three", FreezePlan(until="two")),
        ("backbone", "from:two", FreezePlan(until="one")),
        ("backbone", "from:one", FreezePlan()),
        ("backbone", "three", FreezePlan(until="two")),
        ("backbone", "two", FreezePlan(("backbone.three.*",), until="one")),
        ("backbone", "one", FreezePlan(("backbone.three.*", "backbone.two.*"))),
        ("backbone", "until:two", FreezePlan(("backbone.three.*",))),
        (
            "backbone",
            "*.bias",
            FreezePlan(
                tuple(f"backbone.{each}.weight" for each in ("one", "norm", "two", "three"))
            ),
        ),
        (
            "backbone",
            ["backbone.three.*", "backbone.two.weight"],
            FreezePlan(("backbone.two.bias",), until="one"),
        ),
        ("backbone", FreezePlan(until="one"), FreezePlan(("backbone.three.*", "backbone.two.*"))),
        ("backbone", lambda name, _: "three" in name, FreezePlan(until="two")),
        ("until:three", "next", FreezePlan(until="two")),
        ("until:two", "next", FreezePlan(until="one")),
        ("until:one", "next", FreezePlan()),
        ("*", "backbone", FreezePlan(("head.*",))),
        ("*", "all", FreezePlan()),
        ("*", "next", FreezePlan(("head.*",), until="two")),
        ("*", "from:three", FreezePlan(until="two")),
        ("*", "head.*", FreezePlan(("backbone.*",))),
        ("head.*", "next", FreezePlan()),
        (["backbone.two.bias", "head.bias"], "next", FreezePlan(("head.bias",))),
        (["backbone.two.bias", "head.bias"], "two", FreezePlan(("head.bias",))),
    ],
)
def test_unfreezing_gives_the_shortest_plan_for_the_rest(
    freeze: Any, what: Any, plan: FreezePlan
) -> None:
    model = blocks(freeze=freeze)
    assert model.unfreeze(what) is model
    assert model.freeze_plan == plan
    frozen = plan.frozen_names(model, model.stages)
    assert {name for name, each in model.named_parameters() if not each.requires_grad} == frozen


@pytest.mark.parametrize("bn", ["frozen", "train", "adapt", "fixed"])
def test_unfreezing_keeps_what_batchnorm_does_as_long_as_something_is_frozen(bn: Any) -> None:
    model = blocks(freeze="backbone", bn=bn)
    assert model.unfreeze("next").freeze_plan == FreezePlan(until="two", bn=bn)
    rest = FreezePlan(bn="fixed" if bn == "fixed" else "frozen")
    assert model.unfreeze("all").freeze_plan == rest


def test_batchnorm_that_trains_anyway_does_not_stay_frozen_alone() -> None:
    model = blocks(freeze="until:one", bn="train")
    model.unfreeze("backbone.one.*")
    assert model.freeze_plan == FreezePlan()


@pytest.mark.parametrize(
    ("freeze", "what", "words"),
    [
        ("until:one", "from:two", "in `from:two`. Frozen are: backbone.norm, backbone.one."),
        ("until:one", "three", "in `three`. Frozen are: backbone.norm, backbone.one."),
        ("until:one", "none", "in `none`. Frozen are: backbone.norm, backbone.one."),
        ("head.bias", "backbone", "in `backbone`. Frozen are: head.bias."),
        (
            "head.bias",
            ["backbone.one.*", "head.weight"],
            "in `backbone.one.*`, `head.weight`. Frozen are: head.bias.",
        ),
        (
            "head.bias",
            lambda name, _: "weight" in name,
            "in what the callable chooses. Frozen are: head.bias.",
        ),
        (
            "head.bias",
            FreezePlan(until="one"),
            "in what the plan freezes. Frozen are: head.bias.",
        ),
        ("none", "all", "in `all`."),
        ("none", "next", "in `next`."),
    ],
)
def test_nothing_to_unfreeze_is_an_error_and_changes_nothing(
    freeze: Any, what: Any, words: str
) -> None:
    model = blocks(freeze=freeze)
    plan = model.freeze_plan
    with pytest.raises(FreezeError) as error:
        model.unfreeze(what)
    assert str(error.value) == f"There is nothing to unfreeze {words}"
    assert model.freeze_plan == plan


@pytest.mark.parametrize("what", [None, 3, [], ["a", 3]])
def test_unfreezing_anything_else_is_an_error(what: Any) -> None:
    with pytest.raises(FreezeError) as error:
        blocks(freeze="backbone").unfreeze(what)
    assert str(error.value) == (
        f'`unfreeze` should be "all", "backbone", "next", a stage\'s name, "from:<stage>", a glob '
        f"over parameter names, a list of globs, a callable from (name, parameter) or a "
        f"FreezePlan, found {what!r}."
    )


def test_unfreezing_from_an_unknown_stage_is_an_error() -> None:
    with pytest.raises(UnknownNameError) as error:
        blocks(freeze="backbone").unfreeze("from:thre")
    assert str(error.value) == (
        "Unknown stage `thre`. Did you mean `three`? "
        "`[stage.name for stage in model.stages]` names all 3."
    )


def test_unfreezing_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(FreezeError) as error:
        blocks(freeze="backbone").unfreeze("four")
    assert str(error.value) == (
        "The freeze pattern `four` matches no parameter. The parameters' names start with: "
        "backbone.norm, backbone.one, backbone.three, backbone.two, head.bias, head.weight."
    )


@settings(deadline=None, max_examples=30)
@given(st.sets(st.sampled_from([name for name, _ in blocks().named_parameters()]), min_size=1))
def test_any_set_of_parameters_has_a_plan(chosen: set[str]) -> None:
    model = blocks(freeze=lambda name, _: name in chosen)
    assert {name for name, each in model.named_parameters() if not each.requires_grad} == chosen
    assert FreezePlan.from_dict(model.freeze_plan.to_dict()) == model.freeze_plan


# What frozen means


@pytest.mark.parametrize("disturb", [False, True])
def test_frozen_backbone_is_byte_identical_after_training(
    tiny_spec: BackboneSpec, disturb: bool
) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze="backbone")
    before = snapshot(model)
    if disturb:
        model.train()
        model.backbone.train()
        model.backbone.requires_grad_(False)
    train_steps(model)
    assert changed_names(model, before) == {"head.weight", "head.bias"}


def test_partly_frozen_backbone_changes_only_where_it_is_not_frozen(
    tiny_spec: BackboneSpec,
) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze=["backbone.conv1.*", "backbone.bn1.*"])
    before = snapshot(model)
    train_steps(model)
    expected = {name for name in before if not name.startswith(("backbone.conv1", "backbone.bn1"))}
    assert changed_names(model, before) == expected


def test_frozen_dropout_stands_still(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze="backbone")
    images = torch.rand(4, 3, 32, 32)
    assert torch.equal(model(images), model(images))
    model.freeze("none")
    assert not torch.equal(model(images), model(images))


def test_until_keeps_dropout_of_its_stages_still_and_no_other() -> None:
    network = nn.Sequential(
        OrderedDict(
            flat=nn.Flatten(),
            one=nn.Linear(12, 4),
            drop=nn.Dropout(),
            two=nn.Linear(4, 4),
            last_drop=nn.Dropout(),
        )
    )
    model = build_model(network, 2, num_features=4, freeze="until:one")
    for act in (model.train, model.backbone.train):
        act()
        model(torch.rand(2, 3, 2, 2))
        modes = {name: module.training for name, module in network.named_children()}
        assert modes == {"flat": False, "one": False, "drop": True, "two": True, "last_drop": True}
        assert model.backbone.training
    model.freeze("until:two")
    for act in (model.train, model.backbone.train):
        act()
        model(torch.rand(2, 3, 2, 2))
        assert not any(
            module.training for module in model.backbone.modules() if module is not network
        )


def test_stochastic_depth_of_frozen_stages_stands_still() -> None:
    model = build_model("efficientnet_b0", 2, weights=None, freeze="until:features.4")
    depths = {
        name: module
        for name, module in model.backbone.named_modules()
        if isinstance(module, StochasticDepth)
    }
    for act in (model.train, model.backbone.train):
        act()
        model.features(torch.rand(2, 3, 32, 32))
        for name, module in depths.items():
            assert module.training is (int(name.split(".")[1]) > 4), name


# What BatchNorm does

STATISTICS = {
    f"{layer}.{buffer}"
    for layer in ("bn1", "layer1.1")
    for buffer in ("running_mean", "running_var", "num_batches_tracked")
}
AFFINE = {f"{layer}.{kind}" for layer in ("bn1", "layer1.1") for kind in ("weight", "bias")}
FIRST = {"conv1.weight", "conv1.bias"}
SECOND = {"layer1.0.weight", "layer1.0.bias"}


@pytest.mark.parametrize(
    ("freeze", "bn", "changing"),
    [
        ("backbone", "frozen", set()),
        ("backbone", "train", AFFINE | STATISTICS),
        ("backbone", "adapt", STATISTICS),
        ("backbone", "fixed", set()),
        ("none", "frozen", FIRST | SECOND | AFFINE | STATISTICS),
        ("none", "fixed", FIRST | SECOND | AFFINE),
        (
            "until:conv1",
            "frozen",
            SECOND | {each for each in AFFINE | STATISTICS if each[0] == "l"},
        ),
        ("until:conv1", "train", SECOND | AFFINE | STATISTICS),
        ("until:conv1", "adapt", SECOND | {each for each in AFFINE if each[0] == "l"} | STATISTICS),
        ("until:conv1", "fixed", SECOND | {each for each in AFFINE if each[0] == "l"}),
    ],
)
def test_batchnorm_changes_as_its_mode_says(
    tiny_spec: BackboneSpec, freeze: str, bn: Any, changing: set[str]
) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze=freeze, bn=bn)
    before = snapshot(model.backbone)
    model.backbone.train()
    train_steps(model)
    assert changed_names(model.backbone, before) == changing


def test_batchnorm_alone_cannot_be_frozen_and_trained() -> None:
    model = blocks()
    with pytest.raises(FreezeError) as error:
        model.freeze("backbone.norm.*", bn="train")
    assert str(error.value) == (
        'bn="train" trains the BatchNorm layers of frozen modules, and the plan freezes '
        "nothing else. Leave it out, or freeze more."
    )
    assert model.freeze_plan == FreezePlan()
    assert model.freeze("backbone.norm.*").freeze_plan == FreezePlan(("backbone.norm.*",))


@pytest.mark.parametrize("bn", ["train", "adapt", "fixed"])
def test_mode_of_batchnorm_does_not_reach_what_a_layer_holds(bn: Any) -> None:
    class NormAndDrop(nn.BatchNorm1d):
        def __init__(self) -> None:
            super().__init__(4)
            self.drop = nn.Dropout()

    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), NormAndDrop(), nn.Linear(4, 4))
    freeze = "none" if bn == "fixed" else "until:1"
    model = build_model(network, 2, num_features=4, freeze=freeze, bn=bn)
    for act in (model.train, model.backbone.train):
        act()
        model(torch.rand(2, 3, 2, 2))
        assert network[2].training is (bn != "fixed")
        assert network[2].get_submodule("drop").training is (bn == "fixed")


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 1, 0]))
        for _ in range(count)
    ]


def statistics(network: nn.Module) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in network.named_buffers()}


def test_adapting_agrees_with_a_plain_loop_step_by_step() -> None:
    model = build_model("resnet18", 2, weights=None, freeze="backbone", bn="adapt")

    # The loop of the PyTorch lesson on transfer learning, with the same weights.
    network = torchvision.models.resnet18(weights=None)
    network.fc = head = nn.Linear(512, 2)
    network.load_state_dict(
        {
            name.removeprefix("backbone.").replace("head.", "fc."): each
            for name, each in model.state_dict().items()
        }
    )
    for name, parameter in network.named_parameters():
        parameter.requires_grad = name.startswith("fc.")
    plain = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    network.train()

    ours = torch.optim.SGD(model.trainable_parameters(), lr=0.1, momentum=0.9)
    start = statistics(network)
    for images, targets in batches(4):
        losses = []
        for net, optimizer in ((network, plain), (model, ours)):
            loss = nn.functional.cross_entropy(net(images), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.detach())
        assert torch.equal(*losses)
        wanted, found = statistics(network), statistics(model.backbone)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert not any(torch.equal(start[name], wanted[name]) for name in wanted)
    assert torch.equal(head.weight, model.get_parameter("head.weight"))


def test_adapting_agrees_with_a_plain_loop_but_for_dropout(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze="backbone", bn="adapt")
    backbone = copy.deepcopy(model.backbone).train().requires_grad_(False)
    backbone.get_submodule("drop").eval()
    oracle = nn.Sequential(backbone, copy.deepcopy(model.head))
    optimizer = torch.optim.SGD(oracle[1].parameters(), lr=0.1, momentum=0.9)
    ours = torch.optim.SGD(model.trainable_parameters(), lr=0.1, momentum=0.9)
    for images, targets in batches(3):
        for net, each in ((oracle, optimizer), (model, ours)):
            loss = nn.functional.cross_entropy(net(images), targets)
            each.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            each.step()
    for found, wanted in zip(
        model.state_dict().values(), oracle.state_dict().values(), strict=True
    ):
        assert torch.equal(found, wanted)


# Unfreezing again


def test_unfreezing_lets_everything_train_again(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze="backbone")
    assert model.freeze("none") is model
    assert all(module.training for module in model.modules())
    before = snapshot(model)
    train_steps(model)
    assert changed_names(model, before) == set(before)


def test_freezing_drops_gradients(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    model.freeze("backbone")
    assert all(each.grad is None for each in model.backbone.parameters())
    assert model.head.weight.grad is not None


# The page

PAGE = Path(__file__).parents[2] / "docs" / "freezing.md"


def test_examples_on_the_page_print_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    class Toolkit:
        FreezePlan = FreezePlan
        build_model = staticmethod(functools.partial(build_model, weights=None))

    names = {"tk": Toolkit, "torch": torch, "images": torch.rand(4, 3, 224, 224)}
    blocks = re.findall(
        r"```python\n(.*?)```(\n\n```text\n(.*?)```)?", PAGE.read_text("utf-8"), re.S
    )
    for code, _, output in blocks:
        exec(code, names)
        assert capsys.readouterr().out.rstrip() == output.rstrip()
    assert len(blocks) == 11


def test_messages_on_the_page_are_those_of_the_code() -> None:
    with pytest.raises(FreezeError) as error:
        build_model("resnet18", 2, weights=None, freeze="backbone.layer1")
    assert f"```text\n{error.value}\n```" in PAGE.read_text("utf-8")
