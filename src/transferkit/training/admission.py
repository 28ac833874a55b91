"""What is checked before a fit: that its phases, optimizer, solver and cache fit the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from transferkit.training.feed_choice import find_split, settings_of
from transferkit.training.optimizers import group_options, make_optimizer
from transferkit.training.phases import ResolvedPhase, resolve_phases, trainable_names

if TYPE_CHECKING:
    from transferkit.training.fitting import Job


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


def shorten_solved(
    model: Classifier, phases: Sequence[ResolvedPhase], *, solver: str
) -> tuple[ResolvedPhase, ...]:
    """Return the phases, those that "lbfgs" solves with one epoch: it has no more."""
    if solver != "lbfgs":
        return tuple(phases)
    shortened = [
        replace(each.phase, epochs=1) if trains_head_only(each) else each.phase for each in phases
    ]
    return resolve_phases(model, shortened)


def check_phases(job: Job, phases: Sequence[ResolvedPhase]) -> dict[str, Any]:
    """Check that the optimizer, the schedules and the cache fit all phases.

    Args:
        job: The job.
        phases: Its phases.

    Returns:
        The options of the optimizer's first group at the start; none where there is no
        optimizer since all phases are solved.

    Raises:
        ConfigError: They do not fit.
        UnknownNameError: There is no optimizer or scheduler of that name.
    """
    updates = job.updates()
    options: dict[str, Any] = {}
    for phase in phases:
        updates.rates(phase.phase)
        if job.solves(phase):
            continue
        with frozen_as(job.model, phase.freeze_plan):
            if not isinstance(job.optimizer, Optimizer):
                # On an optimizer of its own, to have the errors of schedules, too.
                updates.start_phase(phase.phase, steps_per_epoch=len(job.train_loader))
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
    _check_cache_fits(job, phases)
    _check_something_is_finetuned(job, phases)
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
        if not isinstance(split, str):
            settings = settings_of(job.cache)
            check_engine(settings.engine, settings.precision, job.device)
            return
        reasons.append(split)
    raise ConfigError(
        f"Features cannot be cached, as `cache` wants it: {reasons[0]}. "
        f"Leave `cache` out to have them computed live."
    )


def check_solver_fits(
    job: Job,
    phases: Sequence[ResolvedPhase],
    *,
    changing_loss: Mapping[str, bool],
    of_steps: Mapping[str, bool],
) -> None:
    """Check that solver="lbfgs" can do what it is asked for.

    Args:
        job: The job.
        phases: Its phases.
        changing_loss: Which arguments were given that the solver knows nothing of.
        of_steps: Which arguments were given that only matter where an optimizer steps.

    Raises:
        ConfigError: The solver cannot be used, or would ignore an argument.
    """
    if job.solver != "lbfgs":
        return
    solved = [phase for phase in phases if job.solves(phase)]
    if not solved:
        raise ConfigError(
            'solver="lbfgs" fits the head of a frozen backbone, and in no phase does the head '
            'train alone. Freeze the backbone by freeze="backbone", or take solver="sgd".'
        )
    if not isinstance(job.model.head, nn.Linear) or job.model.head_spec.dropout:
        raise ConfigError(
            f'solver="lbfgs" fits a linear head without dropout, found {job.model.head_spec}. '
            f'Build the model with head="linear", or take solver="sgd".'
        )
    ignored = [name for name, given in changing_loss.items() if given]
    if len(solved) == len(phases):
        ignored += [name for name, given in of_steps.items() if given]
    if ignored:
        raise ConfigError(
            f'solver="lbfgs" would ignore {", ".join(f"`{name}`" for name in ignored)}. '
            f'Leave that out, or take solver="sgd".'
        )
    if isinstance(job.cache, FeatureCache) and job.cache.views == "epochs":
        raise ConfigError(
            'solver="lbfgs" fits the head to all views at once and needs their number, found '
            'views="epochs". Take FeatureCache(views=4), say.'
        )
    with frozen_as(job.model, solved[0].freeze_plan):
        split = find_split(job, epochs=1)
    if isinstance(split, str):
        raise ConfigError(f'solver="lbfgs" needs cached features, and there are none: {split}.')
