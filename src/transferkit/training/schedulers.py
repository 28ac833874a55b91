"""Learning rate schedules: a registry of factories, with interval and monitor as data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, get_args, overload

from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from transferkit._checks import check_callable, check_integer, check_number
from transferkit._registry import Registry
from transferkit.errors import ConfigError, TransferkitError
from transferkit.training.history import Mode, check_monitor
from transferkit.training.settings import name_of

Interval: TypeAlias = Literal["step", "epoch"]


@dataclass(frozen=True)
class Schedule:
    """A PyTorch scheduler, and when to step it.

    Args:
        scheduler: The scheduler; None leaves the learning rate alone.
        interval: "step" steps it after each optimizer update, "epoch" after each epoch.
        monitor: The name of the record's value, or of one of the trainer's own metrics, that is
            handed to `scheduler.step`, for a plateau scheduler; None hands nothing.

    Raises:
        ConfigError: The interval is unknown, a plateau scheduler has no monitor, or a monitor
            is given by the step.
    """

    scheduler: LRScheduler | None
    interval: Interval = "epoch"
    monitor: str | None = None

    def __post_init__(self) -> None:
        if self.interval not in get_args(Interval):
            raise ConfigError(f'`interval` should be "step" or "epoch", found {self.interval!r}.')
        if isinstance(self.scheduler, ReduceLROnPlateau) != (self.monitor is not None):
            raise ConfigError(
                "A `monitor` belongs to ReduceLROnPlateau, which needs one, and to no other "
                f"scheduler: found {type(self.scheduler).__name__} with {self.monitor!r}."
            )
        if self.monitor is not None and self.interval == "step":
            raise ConfigError(
                'A scheduler with a monitor steps by the epoch: pass interval="epoch".'
            )

    def step(self, interval: Interval, metrics: Callable[[str], float] | None = None) -> None:
        """Step the scheduler if this is its interval.

        Args:
            interval: What has just ended.
            metrics: Gives the value of a record key, at the end of an epoch.
        """
        if self.scheduler is None or interval != self.interval:
            return
        if self.monitor is None:
            self.scheduler.step()
        elif metrics is not None:
            self.scheduler.step(metrics(self.monitor))  # type: ignore[arg-type]


class SchedulerFactory(Protocol):
    """A callable that builds the schedule of one fit."""

    def __call__(
        self, optimizer: Optimizer, /, *, num_epochs: int, steps_per_epoch: int
    ) -> Schedule | LRScheduler:
        """Return the schedule; a bare PyTorch scheduler is stepped by the epoch."""
        ...


_SCHEDULERS: Registry[Callable[..., Schedule | LRScheduler]] = Registry(
    "scheduler", lister="list_schedulers()"
)

_Factory: TypeAlias = "Callable[..., Schedule | LRScheduler]"


@overload
def register_scheduler(name: str, *, replace: bool = ...) -> Callable[[_Factory], _Factory]: ...
@overload
def register_scheduler(name: str, factory: _Factory, *, replace: bool = ...) -> _Factory: ...
def register_scheduler(
    name: str, factory: _Factory | None = None, *, replace: bool = False
) -> _Factory | Callable[[_Factory], _Factory]:
    """Register a scheduler under a name, as a decorator or by a call.

    Args:
        name: The name for `Trainer(scheduler=...)`.
        factory: A `SchedulerFactory`; it may take further keyword options, which come
            from `scheduler_options`. Left out, a decorator is returned.
        replace: Take the place of a scheduler with the same name.

    Returns:
        The factory, or the decorator.

    Raises:
        ConfigError: The name is taken and `replace` is False.

    Example:
        >>> @register_scheduler("halving", replace=True)
        ... def halving(optimizer, *, num_epochs, steps_per_epoch):
        ...     return lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        >>> "halving" in list_schedulers()
        True
    """
    if factory is None:
        return _SCHEDULERS.decorator(name, replace=replace)
    return _SCHEDULERS.add(name, factory, replace=replace)


def list_schedulers() -> list[str]:
    """Return the names of the schedulers, sorted.

    Example:
        >>> {"step", "cosine", "plateau"} <= set(list_schedulers())
        True
    """
    return _SCHEDULERS.names()


def make_schedule(
    scheduler: str | SchedulerFactory | Schedule | LRScheduler,
    optimizer: Optimizer,
    *,
    num_epochs: int,
    steps_per_epoch: int,
    options: dict[str, Any],
) -> Schedule:
    """Build the schedule of a fit.

    Args:
        scheduler: A name, a factory, a `Schedule` or a PyTorch scheduler.
        optimizer: The optimizer whose learning rates it sets.
        num_epochs: Epochs of the fit.
        steps_per_epoch: Optimizer updates in an epoch.
        options: Further options for a named scheduler.

    Returns:
        The schedule.

    Raises:
        UnknownNameError: There is no such scheduler.
        ConfigError: It does not take these options, or belongs to another optimizer.
    """
    if isinstance(scheduler, (Schedule, LRScheduler)):
        built: Schedule | LRScheduler = scheduler
    else:
        factory = _SCHEDULERS.get(scheduler) if isinstance(scheduler, str) else scheduler
        check_callable("scheduler", factory, "a name, a factory, a Schedule or a scheduler")
        sizes = {"num_epochs": num_epochs, "steps_per_epoch": steps_per_epoch}
        try:
            built = factory(optimizer, **sizes, **options)
        except TransferkitError:
            raise
        except (TypeError, ValueError) as error:
            name = getattr(factory, "__name__", "")
            reason = str(error).replace(f"{name}()", "it") if name else str(error)
            raise ConfigError(
                f"The scheduler {name_of(scheduler)!r} cannot be built with the options "
                f"{options}: {reason}."
            ) from error
    schedule = built if isinstance(built, Schedule) else _wrap(built)
    if schedule.scheduler is not None and schedule.scheduler.optimizer is not optimizer:
        raise ConfigError(
            "The scheduler belongs to another optimizer than the one that trains. Pass both "
            "as objects, or pass the scheduler by name or factory."
        )
    return schedule


def _wrap(scheduler: LRScheduler) -> Schedule:
    if not isinstance(scheduler, LRScheduler):
        raise ConfigError(
            f"A scheduler should be a Schedule or a PyTorch scheduler, "
            f"found {type(scheduler).__name__}."
        )
    return Schedule(scheduler)


@register_scheduler("none")
def _none(optimizer: Optimizer, *, num_epochs: int, steps_per_epoch: int) -> Schedule:
    """Keep the learning rate."""
    return Schedule(None)


@register_scheduler("step")
def _step(
    optimizer: Optimizer,
    *,
    num_epochs: int,
    steps_per_epoch: int,
    step_size: int = 7,
    gamma: float = 0.1,
) -> Schedule:
    """Multiply by `gamma` every `step_size` epochs."""
    step_size = check_integer("step_size", step_size, minimum=1)
    return Schedule(lr_scheduler.StepLR(optimizer, step_size, _check_factor("gamma", gamma)))


@register_scheduler("multistep")
def _multistep(
    optimizer: Optimizer,
    *,
    num_epochs: int,
    steps_per_epoch: int,
    milestones: tuple[int, ...] | None = None,
    gamma: float = 0.1,
) -> Schedule:
    """Multiply by `gamma` at each milestone; by default after 60 % and 85 % of the epochs."""
    points = milestones or (round(0.6 * num_epochs), round(0.85 * num_epochs))
    steps = [check_integer("milestones", each, minimum=0) for each in points]
    return Schedule(lr_scheduler.MultiStepLR(optimizer, steps, _check_factor("gamma", gamma)))


@register_scheduler("cosine")
def _cosine(optimizer: Optimizer, *, num_epochs: int, steps_per_epoch: int) -> Schedule:
    """Fall to zero along half a cosine, step by step (Loshchilov and Hutter, 2017)."""
    total = num_epochs * steps_per_epoch
    return Schedule(lr_scheduler.CosineAnnealingLR(optimizer, T_max=total), interval="step")


@register_scheduler("warmup_cosine")
def _warmup_cosine(
    optimizer: Optimizer, *, num_epochs: int, steps_per_epoch: int, warmup: float = 0.1
) -> Schedule:
    """Rise linearly over the share `warmup` of all steps, then fall along half a cosine."""
    warmup = _check_warmup(warmup)
    total = num_epochs * steps_per_epoch
    rise = math.ceil(warmup * total)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))

    return Schedule(lr_scheduler.LambdaLR(optimizer, factor), interval="step")


@register_scheduler("one_cycle")
def _one_cycle(
    optimizer: Optimizer, *, num_epochs: int, steps_per_epoch: int, warmup: float = 0.3
) -> Schedule:
    """Rise to the learning rate over the share `warmup`, then fall (Smith and Topin, 2018).

    The momentum stays what the user set.
    """
    warmup = _check_warmup(warmup)
    rates = [float(group["lr"]) for group in optimizer.param_groups]  # A tensor would change.
    total = num_epochs * steps_per_epoch
    scheduler = lr_scheduler.OneCycleLR(
        optimizer, max_lr=rates, total_steps=total, pct_start=warmup, cycle_momentum=False
    )
    return Schedule(scheduler, interval="step")


@register_scheduler("plateau")
def _plateau(
    optimizer: Optimizer,
    *,
    num_epochs: int,
    steps_per_epoch: int,
    monitor: str = "val_loss",
    mode: Mode = "auto",
    patience: int = 3,
    factor: float = 0.1,
) -> Schedule:
    """Multiply by `factor` when the monitored value has not improved for `patience` epochs."""
    patience = check_integer("patience", patience, minimum=0)
    factor = _check_factor("factor", factor)
    scheduler = ReduceLROnPlateau(
        optimizer, mode=check_monitor(monitor, mode), patience=patience, factor=factor
    )
    return Schedule(scheduler, monitor=monitor)


def _check_warmup(warmup: float) -> float:
    words = "in [0, 1), a share of all steps"
    return check_number("warmup", warmup, lambda value: 0 <= value < 1, words)


def _check_factor(name: str, factor: float) -> float:
    return check_number(name, factor, lambda value: 0 < value < 1, "between 0 and 1")
