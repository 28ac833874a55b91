from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from transferkit.errors import ConfigError, UnknownNameError
from transferkit.training import RECIPES, Phase, Recipe
from transferkit.training.settings import name_of, resolve_recipe


def resolve(recipe: str | Recipe = "tutorial", **given: Any) -> Recipe:
    rates = {
        name: given.pop(name, None)
        for name in (
            "lr",
            "backbone_lr_factor",
            "stage_lr_factor",
            "momentum",
            "weight_decay",
        )
    }
    arguments: dict[str, Any] = dict.fromkeys(
        ("optimizer", "scheduler", "scheduler_options", "augmentation", "batch_size")
    )
    return resolve_recipe(recipe, rates=rates, **(arguments | given))


def test_the_tutorial_recipe_is_the_lessons() -> None:
    assert RECIPES["tutorial"].to_dict() == {
        "name": "tutorial",
        "optimizer": "sgd",
        "lr": 0.001,
        "backbone_lr_factor": 1.0,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "scheduler": "step",
        "scheduler_options": {"step_size": 7, "gamma": 0.1},
        "batch_size": 4,
        "epochs": 25,
        "augmentation": "tutorial",
        "stage_lr_factor": 1.0,
        "phases": [],
        "freeze": None,
    }


def test_nothing_given_keeps_the_recipe() -> None:
    assert resolve() == RECIPES["tutorial"]


def test_given_values_take_the_place_of_the_recipes() -> None:
    found = resolve(lr=0.1, momentum=0.0, weight_decay=1e-4, batch_size=7, augmentation="none")
    assert (found.lr, found.momentum, found.weight_decay) == (0.1, 0.0, 1e-4)
    assert (found.batch_size, found.augmentation) == (7, "none")
    assert found.scheduler_options == {"step_size": 7, "gamma": 0.1}


def test_another_scheduler_drops_the_recipes_options() -> None:
    found = resolve(scheduler="cosine")
    assert (found.scheduler, found.scheduler_options) == ("cosine", {})


def test_options_alone_go_to_the_recipes_scheduler() -> None:
    found = resolve(scheduler_options={"step_size": 2})
    assert (found.scheduler, found.scheduler_options) == ("step", {"step_size": 2})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lr", 0.0, "above 0"),
        ("lr", float("nan"), "above 0"),
        ("lr", float("inf"), "above 0"),
        ("lr", "1", "above 0"),
        ("lr", True, "above 0"),
        ("momentum", 1.0, "in [0, 1)"),
        ("momentum", -0.1, "in [0, 1)"),
        ("weight_decay", -1, "of at least 0"),
        ("backbone_lr_factor", 0, "above 0"),
        ("stage_lr_factor", 0, "above 0"),
        ("stage_lr_factor", float("nan"), "above 0"),
    ],
)
def test_rates_are_checked(name: str, value: object, words: str) -> None:
    message = f"`{name}` should be a finite number {words}, found {value!r}."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        resolve("tutorial", **{name: value})


def test_given_values_leave_the_phases_of_the_recipe() -> None:
    found = resolve("gradual", lr=0.5, stage_lr_factor=0.25, scheduler="step")
    assert found.phases == RECIPES["gradual"].phases
    assert (found.lr, found.stage_lr_factor, found.scheduler) == (0.5, 0.25, "step")


def own_phases(*rates: float | None, scheduler: str | None = None) -> Recipe:
    phases = [
        Phase(name=str(n), epochs=1, lr=rate, scheduler=scheduler) for n, rate in enumerate(rates)
    ]
    return replace(RECIPES["probe"], name="mine", phases=tuple(phases))


@pytest.mark.parametrize(("name", "value"), [("lr", 0.5), ("scheduler", "step")])
def test_what_all_phases_have_of_their_own_is_refused(name: str, value: object) -> None:
    message = (
        f"`{name}` would be ignored: each phase of the recipe `mine` has one of its own. "
        f"Leave it out, or change the phases."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        resolve(own_phases(0.1, 0.2, scheduler="cosine"), **{name: value})


def test_what_some_phases_have_of_their_own_is_set_for_the_others() -> None:
    assert resolve(own_phases(0.1, None), lr=0.5).lr == 0.5
    assert resolve(own_phases(0.1, 0.2)).lr == RECIPES["probe"].lr


def test_numpy_options_become_plain() -> None:
    found = resolve(scheduler_options={"gamma": np.float64(0.5), "step_size": 2})
    assert found.scheduler_options == {"gamma": 0.5, "step_size": 2}
    assert type(found.scheduler_options["gamma"]) is float


def test_no_recipe() -> None:
    message = "`recipe` should be a recipe or the name of one, found int."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        resolve(3)  # type: ignore[arg-type]


def test_options_that_are_no_dict() -> None:
    message = "`scheduler_options` should be a dict of options, found list."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        resolve(scheduler_options=[3])


def test_rates_for_an_optimizer_object_are_refused() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    message = (
        "`lr`, `stage_lr_factor`, `weight_decay` cannot be set for an optimizer that is given as "
        "an object or a factory: it has its own. Set it there."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        resolve(optimizer=optimizer, lr=0.1, stage_lr_factor=0.5, weight_decay=0.0)


def test_momentum_belongs_to_sgd() -> None:
    message = "`momentum` belongs to \"sgd\", found the optimizer 'adamw'."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        resolve(optimizer="adamw", momentum=0.9)


def test_options_for_a_scheduler_object_are_refused() -> None:
    message = "`scheduler_options` belong to a scheduler given by name. Leave them out."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        resolve(scheduler=lambda optimizer, **sizes: None, scheduler_options={})


def test_unknown_recipe() -> None:
    message = (
        "Unknown recipe `tutorail`. Did you mean `tutorial`? "
        "`transferkit.training.RECIPES` names all 5."
    )
    with pytest.raises(UnknownNameError, match=f"^{re.escape(message)}$"):
        resolve("tutorail")


def test_names_for_the_history() -> None:
    assert name_of("cosine") == "cosine"
    assert name_of(torch.nn.CrossEntropyLoss()) == "CrossEntropyLoss"
    assert name_of(test_unknown_recipe) == "test_unknown_recipe"
