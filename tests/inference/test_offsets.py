from __future__ import annotations

import random

from transferkit.inference.offsets import OffsetTable, to_key


def test_every_entry_is_found_and_no_other() -> None:
    rng = random.Random(0)
    keys = [rng.getrandbits(64) for _ in range(20_000)]
    table = OffsetTable()
    for offset, key in enumerate(keys):
        table.add(key, offset)
    assert len(table) == 20_000
    assert all(offset in table.find(key) for offset, key in enumerate(keys))
    assert not any(list(table.find(rng.getrandbits(64))) for _ in range(10_000))


def test_entries_with_one_key_are_all_found() -> None:
    table = OffsetTable()
    last = 2**64 - 1  # Its place is the last one, so that the search goes round.
    for offset in range(3000):
        table.add(last, offset)
        table.add(0, 10_000 + offset)
    assert sorted(table.find(last)) == list(range(3000))
    assert sorted(table.find(0)) == list(range(10_000, 13_000))


def test_names_that_are_no_text_have_keys() -> None:
    assert to_key("\udcff") != to_key("\udcfe")
