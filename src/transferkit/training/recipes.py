"""Recipes: settings that belong together, with names."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from transferkit.errors import unknown_name
from transferkit.training.phases import Phase


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
        stage_lr_factor: Learning rate of each stage of the backbone relative to the stage
            after it.
        phases: The phases of the fit, with the settings above where they have none of their
            own; none means one phase of `epochs` with what is frozen in the model.
        freeze: What the recipe is for, where it has no phases: "backbone" freezes the backbone
            if any of it trains, "none" needs a backbone of which something trains, None takes
            the model as it is.
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
    stage_lr_factor: float = 1.0
    phases: tuple[Phase, ...] = ()
    freeze: Literal["backbone", "none"] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON data."""
        return {**asdict(self), "phases": [phase.to_dict() for phase in self.phases]}


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
            backbone_lr_factor=0.03,  # For phases that unfreeze it later.
            scheduler="cosine",
            batch_size=16,
            epochs=5,
            freeze="backbone",
        ),
        "finetune": Recipe(
            name="finetune",
            optimizer="sgd",
            lr=0.01,
            backbone_lr_factor=0.03,
            scheduler="warmup_cosine",
            batch_size=16,
            epochs=5,
            freeze="none",
        ),
        # Kumar et al., Fine-Tuning can Distort Pretrained Features and Underperform
        # Out-of-Distribution, 2022, https://arxiv.org/abs/2202.10054
        "probe_then_finetune": Recipe(
            name="probe_then_finetune",
            optimizer="sgd",
            lr=0.01,
            backbone_lr_factor=0.03,
            scheduler="cosine",
            batch_size=16,
            epochs=6,
            phases=(
                Phase(name="probe", epochs=3, freeze="backbone"),
                Phase(name="finetune", epochs=3, unfreeze="all", warmup=0.1),
            ),
        ),
        # Howard and Ruder, Universal Language Model Fine-tuning for Text Classification, 2018,
        # https://arxiv.org/abs/1801.06146
        "gradual": Recipe(
            name="gradual",
            optimizer="sgd",
            lr=0.01,
            backbone_lr_factor=0.1,
            stage_lr_factor=0.7,
            scheduler="cosine",
            batch_size=16,
            epochs=6,
            # Thirds rather than single stages, of which backbones have one to thirty.
            phases=(
                Phase(name="head", epochs=2, freeze="backbone"),
                Phase(name="last third", epochs=1, unfreeze=1 / 3, warmup=0.2),
                Phase(name="last two thirds", epochs=1, unfreeze=2 / 3, warmup=0.2),
                Phase(name="all", epochs=2, unfreeze=1.0, warmup=0.2),
            ),
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
