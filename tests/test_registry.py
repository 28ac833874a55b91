from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transferkit._registry import Registry
from transferkit.errors import ConfigError, UnknownNameError

NAMES = st.text(alphabet="abc_1", min_size=1, max_size=4)


def make_registry() -> Registry[int]:
    return Registry("number", lister="list_numbers()")


@settings(deadline=None)
@given(st.dictionaries(NAMES, st.integers()))
def test_what_was_added_is_found_and_listed(entries: dict[str, int]) -> None:
    registry = make_registry()
    for name, entry in entries.items():
        assert registry.add(name, entry) == entry
    assert registry.names() == sorted(entries)
    assert {name: registry.get(name) for name in registry.names()} == entries


@settings(deadline=None)
@given(st.dictionaries(NAMES, st.integers(), min_size=1), st.data())
def test_what_was_removed_is_unknown_and_can_come_back(
    entries: dict[str, int], data: st.DataObject
) -> None:
    registry = make_registry()
    for name, entry in entries.items():
        registry.add(name, entry)
    gone = data.draw(st.sampled_from(sorted(entries)))
    registry.remove(gone)
    assert gone not in registry
    assert registry.names() == sorted(set(entries) - {gone})
    with pytest.raises(UnknownNameError, match=rf"^Unknown number `{re.escape(gone)}`\."):
        registry.get(gone)
    registry.add(gone, -1)
    assert registry.get(gone) == -1


@settings(deadline=None)
@given(st.sampled_from(["efficientnet", "mobilenet", "shufflenet"]), st.data())
def test_one_wrong_letter_suggests_the_right_name(name: str, data: st.DataObject) -> None:
    registry = make_registry()
    for each in ("efficientnet", "mobilenet", "shufflenet"):
        registry.add(each, 0)
    place = data.draw(st.integers(0, len(name) - 1))
    wrong = name[:place] + "#" + name[place + 1 :]
    with pytest.raises(UnknownNameError) as error:
        registry.get(wrong)
    assert str(error.value) == (
        f"Unknown number `{wrong}`. Did you mean `{name}`? `list_numbers()` names all 3."
    )


def test_membership() -> None:
    registry = make_registry()
    registry.add("one", 1)
    assert "one" in registry
    assert "two" not in registry
    assert 1 not in registry


def test_taken_name_is_an_error_and_the_first_entry_stays() -> None:
    registry = make_registry()
    registry.add("one", 1)
    with pytest.raises(ConfigError) as error:
        registry.add("one", 2)
    assert str(error.value) == (
        "A number `one` is registered already. Choose another name or pass `replace=True`."
    )
    assert registry.get("one") == 1


def test_replace_takes_the_place() -> None:
    registry = make_registry()
    registry.add("one", 1)
    registry.add("one", 2, replace=True)
    assert registry.get("one") == 2


def test_empty_name_is_an_error() -> None:
    with pytest.raises(ConfigError) as error:
        make_registry().add("", 1)
    assert str(error.value) == "A number needs a name, found ''."


def test_removing_an_unknown_name_is_an_error() -> None:
    with pytest.raises(UnknownNameError) as error:
        make_registry().remove("one")
    assert str(error.value) == "Unknown number `one`. `list_numbers()` names all 0."


def test_decorator_registers_and_returns_what_it_decorates() -> None:
    registry: Registry[object] = Registry("thing", lister="things()")

    @registry.decorator("function")
    def function() -> None: ...

    assert registry.get("function") is function
    with pytest.raises(ConfigError):
        registry.decorator("function")(object())
    other = object()
    assert registry.decorator("function", replace=True)(other) is other
    assert registry.get("function") is other
