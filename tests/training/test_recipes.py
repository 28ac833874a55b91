from __future__ import annotations

import json
import re

import pytest
from torch import nn

from transferkit.errors import UnknownNameError
from transferkit.images import Preprocess, list_augmentations
from transferkit.models import BackboneSpec, Classifier, build_model
from transferkit.training.optimizers import list_optimizers
from transferkit.training.phases import Phase, resolve_phases, spread_epochs
from transferkit.training.recipes import RECIPES, Recipe, get_recipe
from transferkit.training.schedulers import list_schedulers


def staged(num_stages: int) -> Classifier:
    spec = BackboneSpec(
        name="staged",
        build=lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(num_stages))),
        num_features=4,
        preprocess=Preprocess(),
    )
    return build_model(spec, 2, weights=None)


def num_open(recipe: str, num_stages: int) -> list[int]:
    """Return how many layers of a backbone train in each phase, checked to be the last ones."""
    model = staged(num_stages)
    numbers = []
    for phase in resolve_phases(model, RECIPES[recipe].phases):
        places = {int(name.split(".")[1]) for name in phase.trainable if name[:4] == "back"}
        assert places == set(range(num_stages - len(places), num_stages))
        numbers.append(len(places))
    return numbers


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe_names_what_there_is(recipe: Recipe) -> None:
    assert RECIPES[recipe.name] is recipe
    assert recipe.optimizer in list_optimizers()
    assert {recipe.scheduler, *(each.scheduler for each in recipe.phases)} <= {
        None,
        *list_schedulers(),
    }
    assert recipe.augmentation in list_augmentations()
    if recipe.phases:
        assert sum(each.epochs for each in recipe.phases) == recipe.epochs


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe_is_json(recipe: Recipe) -> None:
    data = json.loads(json.dumps(recipe.to_dict()))
    phases = tuple(Phase.from_dict(each) for each in data.pop("phases"))
    assert Recipe(**data, phases=phases) == recipe


@pytest.mark.parametrize("num_stages", [1, 2, 5, 9, 12, 25])
def test_probing_then_finetuning_opens_everything(num_stages: int) -> None:
    assert num_open("probe_then_finetune", num_stages) == [0, num_stages]


@pytest.mark.parametrize(
    ("num_stages", "expected"),
    [
        (1, [0, 1, 1, 1]),
        (2, [0, 1, 2, 2]),
        (3, [0, 1, 2, 3]),
        (5, [0, 2, 4, 5]),
        (9, [0, 3, 6, 9]),
        (12, [0, 4, 8, 12]),
        (25, [0, 9, 17, 25]),
    ],
)
def test_gradual_opens_a_third_of_the_stages_at_a_time(
    num_stages: int, expected: list[int]
) -> None:
    assert num_open("gradual", num_stages) == expected


@pytest.mark.parametrize("name", ["probe_then_finetune", "gradual"])
def test_the_last_phase_trains_everything_without_stages_too(name: str) -> None:
    model = Classifier(
        nn.Linear(4, 4),
        num_features=4,
        num_classes=2,
        backbone_name="plain",
        preprocess=Preprocess(),
    )
    *_, last = resolve_phases(model, RECIPES[name].phases)
    assert last.trainable == {name for name, _ in model.named_parameters()}


def test_other_epochs_keep_the_proportions() -> None:
    phases = spread_epochs(RECIPES["gradual"].phases, 24)
    assert [each.epochs for each in phases] == [8, 4, 4, 8]


def test_unknown_recipe() -> None:
    message = (
        "Unknown recipe `gradul`. Did you mean `gradual`? "
        "`transferkit.training.RECIPES` names all 5."
    )
    with pytest.raises(UnknownNameError, match=f"^{re.escape(message)}$"):
        get_recipe("gradul")
