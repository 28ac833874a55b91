"""The contract of a scheduler."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from transferkit.errors import ConfigError
from transferkit.training.schedulers import Schedule, make_schedule


def check_scheduler(
    factory: Callable[..., Schedule | LRScheduler],
    *,
    num_epochs: int = 3,
    steps_per_epoch: int = 4,
) -> list[float]:
    """Check a scheduler factory by running a fit's worth of steps, and return the rates.

    Args:
        factory: A `SchedulerFactory`.
        num_epochs: Epochs of the fit.
        steps_per_epoch: Optimizer updates in an epoch.

    Returns:
        The learning rate at each step, `num_epochs * steps_per_epoch` of them, from 1.0.

    Raises:
        ConfigError: It cannot be built, or gives a rate that is negative or not finite.

    Example:
        >>> from torch.optim.lr_scheduler import ExponentialLR
        >>> def halving(optimizer, *, num_epochs, steps_per_epoch):
        ...     return ExponentialLR(optimizer, gamma=0.5)
        >>> check_scheduler(halving, num_epochs=2, steps_per_epoch=2)
        [1.0, 1.0, 0.5, 0.5]
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    schedule = make_schedule(
        factory, optimizer, num_epochs=num_epochs, steps_per_epoch=steps_per_epoch, options={}
    )
    rates = []
    for _ in range(num_epochs):
        for _ in range(steps_per_epoch):
            rates.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            schedule.step("step")
        schedule.step("epoch", lambda _: 0.5)
    wrong = [rate for rate in rates if not 0 <= rate < float("inf")]
    if wrong:
        raise ConfigError(f"The scheduler gives the learning rate {wrong[0]}; expected at least 0.")
    return rates
