"""The contract of a callback."""

from __future__ import annotations

import json
import re
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from transferkit._checks import check_type
from transferkit.data import ImageSplits, load_folders
from transferkit.errors import ConfigError
from transferkit.images import Preprocess
from transferkit.models import BackboneSpec, Classifier, build_model
from transferkit.testing.folders import make_image_folder
from transferkit.training import Callback, EpochRecord, Phase, Trainer
from transferkit.training.callbacks import EVENTS
from transferkit.training.history import rank

_LETTERS = dict(zip(EVENTS, "FPESBXZ", strict=True))
_ORDER = "F(P(ES*B?X)+)+Z"
"""The order of the events in a fit that nothing cuts off, a letter for each."""

_PHASES = (Phase("head", 2, freeze="backbone"), Phase("all", 2, unfreeze="all"))


def check_callback(callback: Callback) -> None:
    """Check that a callback keeps its contract, by some fits of a tiny network.

    Its events come in their order; results and weights, epoch by epoch, are those of a fit
    without it, as far as it lets the fit go; a second fit with it ends where the first did. Its
    state is plain JSON data, and loading it gives the same state. `on_fit_end` works after
    Ctrl-C and after an error, also where the fit ended before the callback's first event.
    What it prints and the files that it writes are real.

    Args:
        callback: The callback; it goes through several fits.

    Raises:
        ConfigError: A promise is broken; the message says which. An error that the callback
            raises at another event than `on_fit_end` comes through as it is.

    Example:
        >>> from transferkit.training import EarlyStopping
        >>> check_callback(EarlyStopping(patience=2))
    """
    check_type("callback", callback, Callback, "a Callback")
    with tempfile.TemporaryDirectory() as folder:
        data = load_folders(make_image_folder(folder, num_train=4, num_val=2, size=(16, 16)))
        expected, first, second = (_fit(each, data) for each in (Callback(), callback, callback))
        for run in (first, second):
            _compare(callback, run, expected)
        counts = [len(run.records) for run in (first, second)]
        _require(
            callback,
            counts[0] == counts[1],
            f"its first fit has {counts[0]} epochs and its second {counts[1]}: something is left "
            f"from the first",
        )
        for state in (first.states[0], first.states[-1]):
            _compare(callback, _fit(callback, data, state=state), expected)
        for event, error in _CUTS:
            run = _fit(callback, data, cut=_Cut(event, error))
            _require(callback, run.events.count("Z") == 1, f"cut off at {event}, it has no end")


@dataclass
class _Run:
    """What is seen of a fit; records have no seconds, which differ."""

    model: Classifier
    events: str = ""
    records: list[EpochRecord] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)


class _Spy(Callback):
    """Hand all events on, and note what comes of them.

    Args:
        callback: Who gets the events.
        run: Where to note.
        state: What to load as a fit that is resumed does; None loads nothing.
    """

    def __init__(self, callback: Callback, run: _Run, state: dict[str, Any] | None) -> None:
        self._callback, self._run, self._state = callback, run, state
        self.failure: Exception | None = None
        for event in EVENTS:
            setattr(self, event, partial(self._hand_on, event))

    def _hand_on(self, event: str, trainer: Trainer, *arguments: Any) -> None:
        run = self._run
        run.events += _LETTERS[event]
        try:
            getattr(self._callback, event)(trainer, *arguments)
        except Exception as error:
            if event != "on_fit_end":
                raise
            self.failure = error  # After an error of the fit nobody else would see it.
        if event == "on_phase_start" and self._state is not None:
            self._load(self._state)
            self._state = None
        if event == "on_epoch_end":
            run.records.append(replace(arguments[0], seconds=0.0))
            run.weights.append(_copy(trainer.model))
            run.states.append(self._plain_state())

    def _load(self, state: dict[str, Any]) -> None:
        self._callback.load_state_dict(state)
        same = self._plain_state() == state
        _require(self._callback, same, f"it loads {state} and then has another state")

    def _plain_state(self) -> dict[str, Any]:
        """Return the state as it comes back from a file."""
        state = self._callback.state_dict()
        try:
            plain: dict[str, Any] = json.loads(json.dumps(state, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise _broken(self._callback, f"its state is no JSON data ({error})") from error
        _require(self._callback, plain == state, f"its state {state} is {plain} after JSON")
        return plain


class _CutOffError(Exception):
    """An error of nobody else."""


class _Cut(Callback):
    """Raise an error as soon as an event comes."""

    def __init__(self, event: str, error: type[BaseException]) -> None:
        setattr(self, event, partial(self._raise, error))

    def _raise(self, error: type[BaseException], *_: Any) -> None:
        raise error


_CUTS: tuple[tuple[str, type[BaseException]], ...] = (
    ("on_fit_start", _CutOffError),
    ("on_step_end", KeyboardInterrupt),
    ("on_best", _CutOffError),
    ("on_epoch_end", _CutOffError),
)


def _fit(
    callback: Callback,
    data: ImageSplits,
    *,
    state: dict[str, Any] | None = None,
    cut: _Cut | None = None,
) -> _Run:
    """Run a fit that the callback watches; the one who cuts it off comes first."""
    run = _Run(build_model(_SPEC, data.num_classes, weights=None))
    spy = _Spy(callback, run, state)
    trainer = Trainer(
        run.model,
        data,
        lr=0.05,
        batch_size=4,
        cache=False,
        callbacks=[spy] if cut is None else [cut, spy],
        device="cpu",
        num_workers=0,
        verbose=False,
    )
    with suppress(_CutOffError):
        trainer.fit(phases=_PHASES)
    if spy.failure is not None:
        problem = f"`on_fit_end` fails after `{run.events}` ({spy.failure!r})"
        raise _broken(callback, problem) from spy.failure
    return run


def _compare(callback: Callback, run: _Run, expected: _Run) -> None:
    """Compare a fit with one without the callback, as far as they have the same phases."""
    order = bool(re.fullmatch(_ORDER, run.events))
    _require(callback, order, f"its events come in the order {run.events}, not {_ORDER}")
    for epoch, (record, other) in enumerate(zip(run.records, expected.records, strict=False)):
        if record.phase != other.phase:
            return  # It ended a phase, and what comes then is another training.
        _require(callback, record == other, f"it changes the results of epoch {epoch + 1}")
        same = _same(run.weights[epoch], expected.weights[epoch])
        _require(callback, same, f"it changes the weights in epoch {epoch + 1}")
    best = min(run.records, key=rank)
    kept = _same(_copy(run.model), expected.weights[best.epoch - 1])
    _require(callback, kept, "it changes the weights that are kept")


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(weights: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, others[name]) for name, value in weights.items())


def _require(callback: Callback, holds: bool, problem: str) -> None:
    if not holds:
        raise _broken(callback, problem)


def _broken(callback: Callback, problem: str) -> ConfigError:
    return ConfigError(f"Callback `{type(callback).__name__}` breaks its contract: {problem}.")


def _build_network() -> nn.Module:
    """Return a network on which a callback can do damage: with BatchNorm and dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
    )


_SPEC = BackboneSpec(
    name="check_callback",
    build=_build_network,
    num_features=4,
    preprocess=Preprocess(crop_size=16, resize_size=16),
)
