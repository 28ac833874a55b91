"""Curves of a fit: what a history holds, what a plan foresees, what a sweep of rates found."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from transferkit.errors import ConfigError, DataError
from transferkit.plots.axes import AxesArray
from transferkit.training import FitPlan, History, LRFind

_MAX_CHARACTERS = 70
"""So many of a phase's name go into one line that is as wide as the Axes of a new figure."""


def plot_history(history: History, *, axes: Sequence[Axes] | AxesArray | None = None) -> AxesArray:
    """Draw loss and accuracy of both passes over the epochs, the best epoch marked.

    Args:
        history: At least one record.
        axes: Two Axes, for loss and accuracy; None makes a new figure.

    Returns:
        The two Axes.

    Raises:
        DataError: The history has no record.
        ConfigError: There are not two Axes.
    """
    best = history.best
    if axes is None:
        _, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    if len(axes) != 2:
        raise ConfigError(f"`axes` should be two Axes, for loss and accuracy, found {len(axes)}.")
    epochs = history.column("epoch")
    for ax, name in zip(axes, ("loss", "accuracy"), strict=True):
        for split, style in (("train", "--"), ("val", "-")):
            ax.plot(epochs, history.column(f"{split}_{name}"), style, marker=".", label=split)
        ax.axvline(best.epoch, color="gray", linewidth=0.8, linestyle=":", label="best epoch")
        ax.set_xlabel("epoch")
        ax.set_ylabel(name)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend()
    return np.asarray(axes, dtype=object)


def plot_plan(plan: FitPlan, *, ax: Axes | None = None) -> Axes:
    """Draw the learning rate of each parameter group over the epochs of a fit.

    The rates stand on a logarithmic scale. A line marks where a phase begins, with its name
    above, which is wrapped or turned where the phase is short; a phase that a solver takes
    over has no rates.

    Args:
        plan: What `trainer.plan()` returned.
        ax: Where to draw; None makes a new figure.

    Returns:
        The Axes.

    Raises:
        DataError: The plan has no learning rates.
    """
    if not any(phase.lrs for phase in plan.phases):
        raise DataError("There is nothing to draw: no phase of the plan has learning rates.")
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
    names = list(dict.fromkeys(name for phase in plan.phases for name in phase.lrs))
    num_epochs = sum(phase.num_epochs for phase in plan.phases)
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(names)))
    for phase in plan.phases:
        start = phase.first_epoch - 1
        epochs = start + np.asarray(phase.steps) / max(1, phase.steps_per_epoch)
        for name, rates in phase.lrs.items():
            # On a logarithmic scale there is no 0, where most schedules end.
            shown = np.where(np.asarray(rates) > 0, rates, np.nan)
            ax.plot(epochs, shown, color=shades[names.index(name)], label=name)
        ax.axvline(start, color="gray", linewidth=0.8, linestyle=":")
        _write_name(
            ax, phase.name, start, width=max(1, _MAX_CHARACTERS * phase.num_epochs // num_epochs)
        )
    ax.set(xlabel="epoch", ylabel="learning rate", yscale="log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = ax.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    ax.legend(
        list(unique.values()), list(unique), fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    return ax


def plot_lr_find(found: LRFind, *, ax: Axes | None = None) -> Axes:
    """Draw the loss over the learning rates of a sweep, the suggestion marked.

    The points are the losses of the batches, the line is their smoothed mean. The rates stand
    on a logarithmic scale. The last steps of a sweep that diverged may lie above the picture.

    Args:
        found: What `trainer.lr_find()` returned.
        ax: Where to draw; None makes a new figure.

    Returns:
        The Axes.

    Raises:
        DataError: The sweep has no loss.
    """
    if not found.losses:
        raise DataError("There is nothing to draw: the sweep has no loss that is finite.")
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    ax.plot(found.lrs, found.losses, ".", color="lightgray", label="batch")
    ax.plot(found.smoothed_lrs, found.smoothed, label="smoothed")
    if found.suggestion is not None:
        label = f"suggestion {found.suggestion:.2g}"
        ax.axvline(found.suggestion, color="tab:orange", linestyle="--", label=label)
    # Where it diverges, the loss may be so high that nothing else could be told apart.
    usual = found.losses[: 1 + len(found.losses) // 2]
    high = max(usual) + 0.5 * abs(max(usual))
    if found.end == "diverged" and high < max(found.losses):
        ax.set_ylim(top=high)
    ax.set(xlabel="learning rate", ylabel="loss", xscale="log")
    ax.legend()
    return ax


def _write_name(ax: Axes, name: str, start: int, *, width: int) -> None:
    """Write a phase's name above its start, in lines of so many characters if its words fit."""
    fits = all(len(word) <= width for word in name.split())
    ax.annotate(
        textwrap.fill(name, width) if fits else name,
        (start, 1),
        xycoords=("data", "axes fraction"),
        xytext=(3, 3),
        textcoords="offset points",
        fontsize=8,
        rotation=0 if fits else 90,
        parse_math=False,
    )
