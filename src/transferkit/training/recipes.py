"""Recipes: settings that belong together, with names."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from transferkit.errors import unknown_name


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a fit.

    Args:
        name: The recipe's name.
        optimizer: "sgd", "adam" or "adamw".
        lr: Learning rate.
        backbone_lr_factor: Learning rate of the backbone relative to `lr`, which is the
            head's: a new head has all to learn, a trained backbone much to lose.
        momentum: Momentum of "sgd".
        weight_decay: Weight decay.
        scheduler: A scheduler's name.
        scheduler_options: Its options.
        batch_size: Pictures in a batch.
        epochs: Passes over the training pictures.
        augmentation: An augmentation preset's name.
    """

    name: str
    optimizer: str
    lr: float
    backbone_lr_factor: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    scheduler: str
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    batch_size: int
    epochs: int
    augmentation: str = "tutorial"

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON data."""
        return asdict(self)


RECIPES: MappingProxyType[str, Recipe] = MappingProxyType(
    {
        # The PyTorch lesson's own settings, for both of its scenarios.
        "tutorial": Recipe(
            name="tutorial",
            optimizer="sgd",
            lr=0.001,
            scheduler="step",
            scheduler_options={"step_size": 7, "gamma": 0.1},
            batch_size=4,
            epochs=25,
        ),
        "probe": Recipe(
            name="probe",
            optimizer="sgd",
            lr=0.01,
            scheduler="cosine",
            batch_size=16,
            epochs=5,
        ),
        "finetune": Recipe(
            name="finetune",
            optimizer="sgd",
            lr=0.01,
            backbone_lr_factor=0.03,
            scheduler="warmup_cosine",
            batch_size=16,
            epochs=5,
        ),
    }
)
"""The named recipes. `probe` and `finetune` are the defaults for a frozen backbone and for any
other model; `benchmarks/recipes.py` is what they were picked by."""


def get_recipe(name: str) -> Recipe:
    """Return the recipe called `name`.

    Raises:
        UnknownNameError: There is no such recipe.

    Example:
        >>> get_recipe("tutorial").batch_size
        4
    """
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES, lister="transferkit.training.RECIPES")
    return RECIPES[name]
