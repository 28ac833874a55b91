"""From the trainer's arguments to one recipe, with every value checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from transferkit._checks import check_integer, check_number, check_type
from transferkit.errors import ConfigError
from transferkit.training.phases import to_plain
from transferkit.training.recipes import Recipe, get_recipe

_RATE_LIMITS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("above 0", lambda value: value > 0),
    "backbone_lr_factor": ("above 0", lambda value: value > 0),
    "stage_lr_factor": ("above 0", lambda value: value > 0),
    "momentum": ("in [0, 1)", lambda value: 0 <= value < 1),
    "weight_decay": ("of at least 0", lambda value: value >= 0),
}
RATES = tuple(_RATE_LIMITS)
"""The names of the rates that a trainer takes."""


def resolve_recipe(
    recipe: str | Recipe,
    *,
    optimizer: object,
    scheduler: object,
    scheduler_options: dict[str, Any] | None,
    augmentation: object,
    batch_size: int | None,
    rates: Mapping[str, float | None],
) -> Recipe:
    """Return the recipe with what was given put in the place of its own settings.

    Args:
        recipe: The recipe or its name.
        optimizer: A name takes the place of the recipe's; None keeps it.
        scheduler: Likewise; the options of the recipe's own scheduler go with it.
        scheduler_options: Options for the scheduler.
        augmentation: Likewise.
        batch_size: Likewise.
        rates: "lr", "backbone_lr_factor", "stage_lr_factor", "momentum" and "weight_decay";
            None keeps the recipe's.

    Returns:
        The settings that hold. What was given as an object stays out of them.

    Raises:
        UnknownNameError: There is no such recipe.
        ConfigError: A value cannot work, or would be ignored.
    """
    base = get_recipe(recipe) if isinstance(recipe, str) else recipe
    check_type("recipe", base, Recipe, "a recipe or the name of one")
    names = {"optimizer": optimizer, "scheduler": scheduler, "augmentation": augmentation}
    _check_heeded(base, {**names, **rates})
    given: dict[str, Any] = {name: value for name, value in names.items() if isinstance(value, str)}
    given |= _check_rates(rates, optimizer if optimizer is not None else base.optimizer)
    if batch_size is not None:
        given["batch_size"] = check_integer("batch_size", batch_size, minimum=1)
    if scheduler_options is not None and scheduler is not None and "scheduler" not in given:
        raise ConfigError(
            "`scheduler_options` belong to a scheduler given by name. Leave them out."
        )
    if scheduler is not None or scheduler_options is not None:
        options = {} if scheduler_options is None else scheduler_options
        check_type("scheduler_options", options, dict, "a dict of options")
        given["scheduler_options"] = {name: to_plain(each) for name, each in options.items()}
    return replace(base, **given)


def _check_heeded(recipe: Recipe, given: Mapping[str, object]) -> None:
    """Refuse what every phase of the recipe has a setting of its own for."""
    for name, value in given.items():
        own = [getattr(phase, name, None) is not None for phase in recipe.phases]
        if value is not None and own and all(own):
            raise ConfigError(
                f"`{name}` would be ignored: each phase of the recipe `{recipe.name}` has one of "
                f"its own. Leave it out, or change the phases."
            )


def _check_rates(rates: Mapping[str, float | None], optimizer: object) -> dict[str, float]:
    given = {name: value for name, value in rates.items() if value is not None}
    if given and not isinstance(optimizer, str):
        raise ConfigError(
            f"{', '.join(f'`{name}`' for name in given)} cannot be set for an optimizer that is "
            f"given as an object or a factory: it has its own. Set it there."
        )
    if "momentum" in given and optimizer != "sgd":
        raise ConfigError(f'`momentum` belongs to "sgd", found the optimizer {optimizer!r}.')
    for name, value in given.items():
        words, fits = _RATE_LIMITS[name]
        given[name] = check_number(name, value, fits, words)
    return given


def name_of(thing: object) -> str | None:
    """Return a name for the history: the text itself, or the name of a function or class.

    None stays None.

    Example:
        >>> name_of("sgd"), name_of(len)
        ('sgd', 'len')
    """
    if thing is None or isinstance(thing, str):
        return thing
    name: str = getattr(thing, "__qualname__", None) or type(thing).__qualname__
    return name
