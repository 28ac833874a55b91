"""What is checked before a fit: that its phases, optimizer, solver and cache fit the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from transferkit.errors import ConfigError, FreezeError
from transferkit.models import Classifier, FreezePlan
from transferkit.models.engines import check_engine
from transferkit.models.modes import modes_kept
from transferkit.training.feature_cache import FeatureCache
from transferkit.training.feature_keys import describe_for_key
from transferkit.training.feed_choice import find_split, settings_of
from transferkit.training.optimizers import group_options, make_optimizer
from transferkit.training.phases import (
    RATE_NAMES,
    ResolvedPhase,
    resolve_phases,
    trainable_names,
)

if TYPE_CHECKING:
    from transferkit.training.job import Job


def check_frozen_by_plan(model: Classifier) -> None:
    """Check that exactly the parameters train that the model's freeze plan leaves.

    Raises:
        FreezeError: `requires_grad` of a parameter was set past the plan.
    """
    wanted = trainable_names(model.freeze_plan, model)
    found = {name for name, each in model.named_parameters() if each.requires_grad}
    strays = sorted(wanted ^ found)
    if strays:
        raise FreezeError(
            f"`requires_grad` of {len(strays)} parameters, such as `{strays[0]}`, is not what the "
            f"model's freeze plan says. Freeze by `model.freeze(...)`, which keeps their modules "
            f"in eval mode too, not by `requires_grad`."
        )


@contextmanager
def frozen_as(model: Classifier, plan: FreezePlan) -> Iterator[None]:
    """Run a block with the model frozen by another plan; afterwards it is as it was.

    Args:
        model: The model.
        plan: What is frozen within the block.
    """
    before = model.freeze_plan
    grads = [(each, each.grad) for each in model.parameters()]
    with modes_kept(model):
        try:
            model.freeze(plan)
            yield
        finally:
            model.freeze(before)
            for parameter, grad in grads:
                parameter.grad = grad


def trains_head_only(phase: ResolvedPhase) -> bool:
    """Tell whether a phase leaves the whole backbone as it is."""
    return all(name.startswith("head.") for name in phase.trainable)


def trains_whole_head_only(phase: ResolvedPhase, model: Classifier) -> bool:
    """Tell whether a phase trains the head, all of it, and nothing else."""
    return phase.trainable == {f"head.{name}" for name, _ in model.head.named_parameters()}


def shorten_solved(
    model: Classifier, phases: Sequence[ResolvedPhase], *, solver: str
) -> tuple[ResolvedPhase, ...]:
    """Return the phases, those that "lbfgs" solves with one epoch: it has no more."""
    if solver != "lbfgs":
        return tuple(phases)
    shortened = [
        replace(each.phase, epochs=1) if trains_whole_head_only(each, model) else each.phase
        for each in phases
    ]
    return resolve_phases(model, shortened)


def _check_updates(job: Job, phases: Sequence[ResolvedPhase]) -> dict[str, Any]:
    """Check that the optimizer and the schedules fit; return the first group's options."""
    updates = job.updates()
    options: dict[str, Any] = {}
    stepped = [phase for phase in phases if not job.solves(phase)]
    updates.check(stepped, steps_per_epoch=job.steps_per_epoch)
    for phase in stepped:
        with frozen_as(job.model, phase.freeze_plan):
            if not isinstance(job.optimizer, Optimizer):
                # On an optimizer of its own, to have the errors of schedules, too.
                updates.start_phase(phase.phase, steps_per_epoch=job.steps_per_epoch)
                options = options or dict(updates.options)
            elif not options:  # A trial schedule would change the user's own optimizer.
                recipe = job.recipe
                optimizer = make_optimizer(
                    job.optimizer,
                    job.model,
                    rates=None,
                    momentum=recipe.momentum,
                    weight_decay=recipe.weight_decay,
                )
                options = group_options(optimizer)[0]
    return options


def _check_something_is_finetuned(job: Job, phases: Sequence[ResolvedPhase]) -> None:
    wanted = {"l2_sp": job.l2_sp > 0, "wise_ft": job.wise_ft}
    given = [name for name, value in wanted.items() if value]
    if given and all(trains_head_only(phase) for phase in phases):
        raise ConfigError(
            f"`{given[0]}` goes back to the backbone's weights from before the fine-tuning, and in "
            f"no phase does the backbone train. Leave it out, or freeze less."
        )


def _check_cache_fits(job: Job, phases: Sequence[ResolvedPhase]) -> None:
    if job.cache is not True and not isinstance(job.cache, FeatureCache):
        return
    reasons = []
    for phase in phases:
        with frozen_as(job.model, phase.freeze_plan):
            split = find_split(job, epochs=phase.phase.epochs)
        reasons += [split] if isinstance(split, str) else []
    if len(reasons) == len(phases):
        raise ConfigError(
            f"Features cannot be cached, as `cache` wants it: {reasons[0]}. "
            f"Leave `cache` out to have them computed live."
        )
    if not reasons and settings_of(job.cache).views == 0 and "augmentation" in job.given:
        raise ConfigError(
            "`augmentation` would be ignored: with views=0 training sees the evaluation view "
            "alone. Leave it out, or take FeatureCache(views=4), say."
        )


def admit(
    job: Job, phases: Sequence[ResolvedPhase], *, at_door: bool = False, by_recipe: bool = False
) -> dict[str, Any]:
    """Check that a job can run these phases.

    Args:
        job: The job.
        phases: Its phases.
        at_door: These are only the phases that a fit without arguments would have: pass over
            what other phases may make right.
        by_recipe: The phases are the recipe's.

    Returns:
        The options of the optimizer's first group at the start; none where there is no
        optimizer since all phases are solved.

    Raises:
        ConfigError: Something does not fit, or would be ignored.
        FreezeError: `requires_grad` of a parameter was set past the freeze plan.
        UnknownNameError: There is no optimizer or scheduler of that name.
    """
    check_frozen_by_plan(job.model)
    _check_engine(job)
    _check_solver(job)
    options = _check_updates(job, phases)
    if not at_door:
        if by_recipe:
            _check_recipe_fits(job)
        _check_solver_fits(job, phases)
        _check_cache_fits(job, phases)
        _check_something_is_finetuned(job, phases)
    return options


def _check_engine(job: Job) -> None:
    """Check that what computes cached features is here, and that they can be kept."""
    cache = job.cache
    if isinstance(cache, FeatureCache):
        check_engine(cache.engine, cache.precision, job.device)
        if cache.folder is not None and cache.views != 0:
            describe_for_key(job.augmentation)


def _check_recipe_fits(job: Job) -> None:
    """Check that the recipe does not undo, or need undone, what is frozen in the model."""
    name, plan = job.recipe.name, job.model.freeze_plan
    if job.recipe.freeze == "none" and job.model.is_backbone_frozen:
        raise ConfigError(
            f"The recipe `{name}` trains the backbone, all of which is frozen. "
            f'Build the model with freeze="none", or take recipe="probe".'
        )
    if job.recipe.phases and plan.freezes and not job.model.is_backbone_frozen:
        raise ConfigError(
            f"A part of the model is frozen, and the recipe `{name}` would not keep it so: it "
            f'freezes and unfreezes by itself. Build the model with freeze="none", or say what '
            f"each phase freezes by `fit(phases=[...])`."
        )


def _check_solver(job: Job) -> None:
    """Check what solver="lbfgs" needs whatever the phases are."""
    if job.solver != "lbfgs":
        return
    if not isinstance(job.model.head, nn.Linear) or job.model.head_spec.dropout:
        raise ConfigError(
            f'solver="lbfgs" fits a linear head without dropout, found {job.model.head_spec}. '
            f'Build the model with head="linear", or take solver="sgd".'
        )
    if isinstance(job.cache, FeatureCache) and job.cache.views == "epochs":
        raise ConfigError(
            'solver="lbfgs" fits the head to all views at once and needs their number, found '
            'views="epochs". Take FeatureCache(views=4), say.'
        )
    _refuse_ignored(_what_changes_the_loss(job))


def _refuse_ignored(names: list[str]) -> None:
    if names:
        raise ConfigError(
            f'solver="lbfgs" would ignore {", ".join(f"`{name}`" for name in names)}. '
            f'Leave that out, or take solver="sgd".'
        )


def _check_solver_fits(job: Job, phases: Sequence[ResolvedPhase]) -> None:
    """Check that there is something to solve, and that nothing of these phases is ignored."""
    if job.solver != "lbfgs":
        return
    solved = [phase for phase in phases if job.solves(phase)]
    if not solved:
        raise ConfigError(
            'solver="lbfgs" fits the head of a frozen backbone, and in no phase does the head '
            'train alone. Freeze the backbone by freeze="backbone", or take solver="sgd".'
        )
    ignored = ["head_start"] if job.solves(phases[0]) and job.head_start is not None else []
    if len(solved) == len(phases):
        ignored += sorted(job.given - {"criterion", "augmentation"})
        ignored += ["average"] if job.average is not None else []
    _refuse_ignored(ignored)
    for phase in solved:
        _check_no_steps_are_set(phase)
    with frozen_as(job.model, solved[0].freeze_plan):
        split = find_split(job, epochs=1)
    if isinstance(split, str):
        raise ConfigError(f'solver="lbfgs" needs cached features, and there are none: {split}.')


def _what_changes_the_loss(job: Job) -> list[str]:
    """Return the arguments that the solver, which fits plain cross-entropy, knows nothing of."""
    changing = {
        "criterion": "criterion" in job.given,
        "label_smoothing": job.label_smoothing > 0,
        "balance": job.balance is not None,
        "batch_augmentation": job.batch_augmentation is not None,
    }
    return [name for name, is_given in changing.items() if is_given]


def _check_no_steps_are_set(phase: ResolvedPhase) -> None:
    names = (*RATE_NAMES, "scheduler")
    ignored = [name for name in names if getattr(phase.phase, name) is not None]
    ignored += ["warmup"] if phase.phase.warmup else []
    if ignored:
        raise ConfigError(
            f'solver="lbfgs" takes over the phase `{phase.phase.name}`, and would ignore its '
            f'{", ".join(f"`{name}`" for name in ignored)}. Leave that out, or take solver="sgd".'
        )
