"""A registry: names to plug-ins, where a taken name is an error and an unknown one suggests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from transferkit.errors import ConfigError, unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Map names to plug-ins of one kind.

    Args:
        kind: What is registered, singular, for the error texts: "backbone".
        lister: The public function that lists the names, as code: "list_backbones()".

    Example:
        >>> numbers: Registry[int] = Registry("number", lister="list_numbers()")
        >>> numbers.add("one", 1)
        1
        >>> numbers.get("one")
        1
    """

    def __init__(self, kind: str, *, lister: str) -> None:
        self.kind = kind
        self.lister = lister
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T, *, replace: bool = False) -> T:
        """Register `entry` under `name` and return it.

        Raises:
            ConfigError: The name is empty, or taken and `replace` is False.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"A {self.kind} needs a name, found {name!r}.")
        if name in self._entries and not replace:
            raise ConfigError(
                f"A {self.kind} `{name}` is registered already. "
                f"Choose another name or pass `replace=True`."
            )
        self._entries[name] = entry
        return entry

    def decorator(self, name: str, *, replace: bool = False) -> Callable[[T], T]:
        """Return a decorator that registers what it decorates under `name`."""

        def register(entry: T) -> T:
            return self.add(name, entry, replace=replace)

        return register

    def get(self, name: str) -> T:
        """Return the entry called `name`.

        Raises:
            UnknownNameError: No entry has this name; the nearest one is suggested.
        """
        try:
            return self._entries[name]
        except KeyError:
            raise unknown_name(self.kind, name, self._entries, lister=self.lister) from None

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._entries)

    def remove(self, name: str) -> None:
        """Forget `name`, so that a test or a notebook can register it anew.

        Raises:
            UnknownNameError: No entry has this name.
        """
        self.get(name)
        del self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries
