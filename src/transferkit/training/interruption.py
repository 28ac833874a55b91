"""SIGINT and SIGTERM in a fit: the step at work ends, the state is saved, then the fit ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from transferkit.training.distributed import World

_T = TypeVar("_T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal asks the fit to end, at a point where its state is whole.

    Args:
        number: The signal.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number: signal.Signals = number


class Interruption:
    """Note the first signal for the fit to see, and let a second one end it at once.

    Example:
        >>> interruption = Interruption()
        >>> with interruption.listening():
        ...     interruption.check()
        >>> interruption.number is None
        True
    """

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Run a block in which signals are noted; afterwards all handlers are as before.

        Only the main thread can listen, and only to signals that the program does not ignore:
        elsewhere a block runs as it would without.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        try:
            for number in _SIGNALS:
                before = signal.getsignal(number)
                # None is a handler that was not set from Python, which could not be put back.
                if before is not signal.SIG_IGN and before is not None:
                    self._before[number] = before
                    signal.signal(number, self._note)
            yield
        finally:
            self._stop_listening()

    def check(self) -> None:
        """End the fit here where a signal has come.

        Raises:
            Interrupted: One has.
        """
        if self.number is not None:
            raise Interrupted(self.number)

    def agree(self, world: World) -> None:
        """Take over what signal another of several processes got."""
        if not world.is_alone:
            own = [int(self.number is each) for each in _SIGNALS]
            for each, count in zip(_SIGNALS, world.agree(own), strict=True):
                if count:
                    self.number = each

    def checked(self, items: Iterable[_T]) -> Iterator[_T]:
        """Iterate, with a check before each item."""
        for item in items:
            self.check()
            yield item

    def _note(self, number: int, frame: FrameType | None) -> None:
        noted = signal.Signals(number)
        if self.number is None:
            self.number = noted
            self._let_workers_die()
            return
        self._stop_listening()
        if noted is signal.SIGTERM:
            raise SystemExit(exit_code(noted))
        raise KeyboardInterrupt

    def _let_workers_die(self) -> None:
        """Let worker processes, which got the signal as well, end without an error in a step."""
        if hasattr(signal, "SIGCHLD"):
            before = signal.getsignal(signal.SIGCHLD)
            if before is not None:
                self._before[signal.SIGCHLD] = before
                # A handler that does nothing: one that is gone when its turn comes is an error.
                signal.signal(signal.SIGCHLD, _ignore)

    def _stop_listening(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing about a signal."""


def exit_code(number: signal.Signals) -> int:
    """Return the exit code of a program that a signal ended: 128 and its number.

    Example:
        >>> exit_code(signal.SIGTERM)
        143
    """
    return 128 + number
