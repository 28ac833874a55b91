"""What happens to the weights in a step: one optimizer for the fit, one schedule for a phase."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from transferkit.errors import CheckpointError, ConfigError
from transferkit.models import Classifier
from transferkit.training.groups import Rates, regroup, set_option
from transferkit.training.history import EpochRecord, check_record_key
from transferkit.training.optimizers import OptimizerFactory, group_options, make_optimizer
from transferkit.training.phases import RATE_NAMES, Phase, ResolvedPhase
from transferkit.training.recipes import Recipe
from transferkit.training.schedulers import Schedule, SchedulerFactory, make_schedule


class Updates:
    """The optimizer of a fit and the schedules of its phases.

    A name or a factory makes the optimizer of what trains in the first phase; an object has to
    hold just that. In later phases what is unfrozen joins it, with the state of the rest kept.

    Args:
        model: The model.
        recipe: The settings where a phase has none of its own.
        optimizer: A name, a factory or an optimizer, see `Trainer`.
        scheduler: A name or a factory, which makes a schedule for each phase; or a `Schedule` or
            a PyTorch scheduler, which goes on from phase to phase and from fit to fit.
        metrics: The names of the trainer's own metrics, which a schedule may monitor.
    """

    def __init__(
        self,
        model: Classifier,
        recipe: Recipe,
        *,
        optimizer: str | OptimizerFactory | Optimizer,
        scheduler: str | SchedulerFactory | Schedule | LRScheduler,
        metrics: Collection[str] = (),
    ) -> None:
        self._model = model
        self._recipe = recipe
        self._given = optimizer
        self._scheduler = scheduler
        self._metrics = metrics
        self.optimizer: Optimizer | None = None
        self._schedule = Schedule(None)
        self._starts: list[tuple[dict[str, Any], dict[str, Any]]] = []  # Groups and options.
        self._warmup_steps = 0
        self._step = 0

    @property
    def keeps_schedule(self) -> bool:
        """Whether the schedule is an object of the user's, which goes on from fit to fit."""
        return isinstance(self._scheduler, (Schedule, LRScheduler))

    def check(self, phases: Sequence[ResolvedPhase], *, steps_per_epoch: int) -> None:
        """Check what can be told of the phases before the first of them starts.

        Args:
            phases: The phases of the fit.
            steps_per_epoch: Optimizer updates in an epoch.

        Raises:
            ConfigError: A phase sets what would be ignored, or a schedule cannot be built, or
                is an object that cannot follow what trains.
            UnknownNameError: There is no scheduler of a name.
        """
        for each in phases:
            self.rates(each.phase)
        if self.keeps_schedule:
            self._check_kept_schedule(phases)
            return
        if isinstance(self._given, Optimizer):
            for each in phases:
                if isinstance(self._scheduler_of(each.phase), str):
                    # On a stand-in: a schedule would change the user's own optimizer.
                    self._make_schedule(_stand_in(self._given), each.phase, steps_per_epoch)

    def _check_kept_schedule(self, phases: Sequence[ResolvedPhase]) -> None:
        for each in phases:
            if each.phase.scheduler is not None:
                raise ConfigError(
                    f"The phase `{each.phase.name}` names the scheduler "
                    f"`{each.phase.scheduler}`, and the fit has one that is given as an object. "
                    f"Leave one of them out."
                )
        if len({each.trainable for each in phases}) > 1:
            raise ConfigError(
                "A scheduler that is given as an object knows only the parameter groups that its "
                "optimizer had when it was built, and what trains differs between the phases. "
                "Pass it by name or as a factory, which makes a new one for each phase."
            )

    def rates(self, phase: Phase) -> Rates | None:
        """Return the learning rates of a phase; None where the optimizer has its own.

        Raises:
            ConfigError: The phase sets rates that the optimizer would ignore.
        """
        own = {name: getattr(phase, name) for name in RATE_NAMES}
        own = {name: value for name, value in own.items() if value is not None}
        if isinstance(self._given, str):
            return Rates(**{name: getattr(self._recipe, name) for name in RATE_NAMES} | own)
        if own:
            raise ConfigError(
                f"The phase `{phase.name}` sets {', '.join(f'`{name}`' for name in own)}, which "
                f"cannot be set for an optimizer that is given as an object or a factory: it has "
                f"its own. Leave them out, or name the optimizer."
            )
        return None

    def start_phase(self, phase: Phase, *, steps_per_epoch: int) -> None:
        """Bring the optimizer up to date with what trains, and build the phase's schedule.

        Args:
            phase: The phase; the model is frozen as it says already.
            steps_per_epoch: Optimizer updates in an epoch.

        Raises:
            ConfigError: Optimizer, schedule and model do not fit.
            UnknownNameError: There is no optimizer or scheduler of that name.
        """
        rates = self.rates(phase)
        if self.optimizer is None:
            self.optimizer = make_optimizer(
                self._given,
                self._model,
                rates=rates,
                momentum=self._recipe.momentum,
                weight_decay=self._recipe.weight_decay,
            )
        else:
            self.finish()
            if not self.keeps_schedule:  # Which knows its groups by their places.
                regroup(self.optimizer, self._model, rates)
        groups = self.optimizer.param_groups
        self._starts = list(zip(groups, group_options(self.optimizer), strict=True))
        if not self.keeps_schedule:
            for group in groups:
                group.pop("initial_lr", None)  # What the last phase's schedule started from.
        self._schedule = self._make_schedule(self.optimizer, phase, steps_per_epoch)
        total = phase.epochs * steps_per_epoch
        # The last step has the full rate; rounding since 0.1 * 30 is more than 3.
        self._warmup_steps = min(math.ceil(round(phase.warmup * total, 6)), total - 1)
        self._step = 0

    def _scheduler_of(self, phase: Phase) -> str | SchedulerFactory | Schedule | LRScheduler:
        return self._scheduler if phase.scheduler is None else phase.scheduler

    def _make_schedule(self, optimizer: Optimizer, phase: Phase, steps_per_epoch: int) -> Schedule:
        options: dict[str, Any] = {}
        if phase.scheduler is not None:
            options = phase.scheduler_options
        elif isinstance(self._scheduler, str):
            options = self._recipe.scheduler_options
        schedule = make_schedule(
            self._scheduler_of(phase),
            optimizer,
            num_epochs=phase.epochs,
            steps_per_epoch=steps_per_epoch,
            options=options,
        )
        if schedule.monitor is not None:
            check_record_key(schedule.monitor, self._metrics)
        return schedule

    def step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Update the weights, then the learning rates where they go by the step.

        Args:
            scaler: What has scaled the gradients, and leaves the update out where they are not
                finite; None where nothing has.
        """
        optimizer = self.built
        with self._warmed_up(optimizer):
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        self._step += 1
        self._schedule.step("step")

    def end_epoch(self, record: EpochRecord) -> None:
        """Update the learning rates where they go by the epoch."""
        self._schedule.step("epoch", record.get)

    def zero_grad(self) -> None:
        """Clear the gradients of what trains."""
        self.built.zero_grad(set_to_none=True)

    @property
    def lr(self) -> float:
        """The learning rate of the first group, usually the head's, at the next step."""
        return float(self.built.param_groups[0]["lr"]) * self._factor

    @property
    def lrs(self) -> dict[str, float]:
        """The learning rate of each group, by its name or place, at the next step."""
        return {
            str(group.get("name", place)): float(group["lr"]) * self._factor
            for place, group in enumerate(self.built.param_groups)
        }

    @property
    def options(self) -> dict[str, Any]:
        """The options of the first group at the start of the phase, before its schedule."""
        _ = self.built  # An error of its own where there is none.
        return dict(self._starts[0][1])

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer and of the phase's schedule, by parameter names."""
        optimizer = self.built
        names: dict[Tensor, str] = {each: name for name, each in self._model.named_parameters()}
        scheduler = self._schedule.scheduler
        return {
            "step": self._step,
            "groups": [
                {key: value for key, value in group.items() if key != "params"}
                | {"params": [names[each] for each in group["params"]]}
                for group in optimizer.param_groups
            ],
            "state": {names[each]: state for each, state in optimizer.state.items()},
            "scheduler": None if scheduler is None else scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, after `start_phase` of the same phase.

        Raises:
            CheckpointError: The optimizer holds other parameters, or is another one.
        """
        optimizer = self.built
        names = {parameter: name for name, parameter in self._model.named_parameters()}
        found = [[names[each] for each in group["params"]] for group in optimizer.param_groups]
        wanted = [group["params"] for group in state["groups"]]
        if found != wanted:
            raise CheckpointError(
                f"The checkpoint's optimizer holds {len(wanted)} groups with "
                f"{sum(map(len, wanted))} parameters, this one {len(found)} with "
                f"{sum(map(len, found))}, or in another order. Resume with the same optimizer."
            )
        optimizer.load_state_dict(self._by_number(state, found))
        self._starts = [
            (group, options)
            for group, (_, options) in zip(optimizer.param_groups, self._starts, strict=True)
        ]
        if self._schedule.scheduler is not None:
            self._schedule.scheduler.load_state_dict(state["scheduler"])
        self._step = state["step"]

    def _by_number(self, state: dict[str, Any], names: list[list[str]]) -> dict[str, Any]:
        """Return a state with PyTorch's numbers in the place of the parameters' names."""
        numbers = {name: number for number, name in enumerate(itertools.chain(*names))}
        groups = [
            {**group, "params": [numbers[name] for name in group["params"]]}
            for group in state["groups"]
        ]
        values = {
            numbers[name]: {
                key: laid_out(value, self._model.get_parameter(name)) for key, value in each.items()
            }
            for name, each in state["state"].items()
        }
        return {"state": values, "param_groups": groups}

    def finish(self) -> None:
        """Put the rates back to where the phase found them, where a schedule of ours ran.

        An optimizer given as an object is not left with the last rate, which may be 0.
        """
        if not self.keeps_schedule:
            for group, options in self._starts:
                for name, value in options.items():
                    set_option(group, name, value)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer updates."""
        return [each for group in self.built.param_groups for each in group["params"]]

    @property
    def built(self) -> Optimizer:
        """The optimizer.

        Raises:
            ConfigError: No phase has been started.
        """
        if self.optimizer is None:
            raise ConfigError("No phase has been started: there is no optimizer yet.")
        return self.optimizer

    @property
    def _factor(self) -> float:
        """What the warm-up multiplies the rates of the next step with."""
        if self._step >= self._warmup_steps:
            return 1.0
        return (self._step + 1) / (self._warmup_steps + 1)

    @contextmanager
    def _warmed_up(self, optimizer: Optimizer) -> Iterator[None]:
        """Scale the rates for a block only: schedules go on from what they set themselves."""
        factor = self._factor
        if factor == 1:
            yield
            return
        before = [(group, group["lr"]) for group in optimizer.param_groups]
        for group, lr in before:
            group["lr"] = lr * factor
        try:
            yield
        finally:
            for group, lr in before:
                group["lr"] = lr


def lay_out_state(optimizer: Optimizer) -> None:
    """Bring an optimizer's momentum and the like into the layouts that its parameters have now.

    Fused kernels go through the memory of both as it lies.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            state[name] = laid_out(value, parameter)


def laid_out(value: Any, parameter: Tensor) -> Any:
    """Return a parameter's momentum and the like in the layout of the parameter."""
    if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return value


def _stand_in(optimizer: Optimizer) -> Optimizer:
    """Return another optimizer with as many parameter groups and the same rates."""
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": float(group["lr"])}
        for group in optimizer.param_groups
    ]
    return torch.optim.SGD(groups, lr=1.0)
