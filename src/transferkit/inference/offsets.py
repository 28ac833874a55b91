"""A table from keys to places in a file, small enough for millions of them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator

_EMPTY = -1
_MAX_LOAD = 0.6


def to_key(text: str) -> int:
    """Return the 64 bits under which a text is looked up.

    Example:
        >>> to_key("a.jpg") == to_key("a.jpg"), to_key("a.jpg") == to_key("b.jpg")
        (True, False)
    """
    data = text.encode("utf-8", errors="surrogatepass")  # File names need not be text.
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class OffsetTable:
    """A hash table from 64-bit keys to offsets in a file.

    An entry takes 54 bytes at most (82 while the table grows), where one of a dict of texts
    takes some 200. Two texts may have one key, so that `find` gives candidates: whoever asks
    has to look at what stands at the offsets.

    Example:
        >>> table = OffsetTable()
        >>> table.add(to_key("a.jpg"), 100)
        >>> list(table.find(to_key("a.jpg"))), list(table.find(to_key("b.jpg")))
        ([100], [])
    """

    def __init__(self) -> None:
        self._num_entries = 0
        self._make(1024)

    def __len__(self) -> int:
        return self._num_entries

    def add(self, key: int, offset: int) -> None:
        """Add an entry beside those that have the same key.

        Args:
            key: What `to_key` gives, in [0, 2^64).
            offset: At least 0.
        """
        if self._num_entries >= _MAX_LOAD * len(self._keys):
            self._grow()
        self._put(key, offset)
        self._num_entries += 1

    def find(self, key: int) -> Iterator[int]:
        """Yield the offsets of the entries with a key."""
        mask = len(self._keys) - 1
        place = key & mask
        while self._offsets[place] != _EMPTY:
            if self._keys[place] == key:
                yield self._offsets[place]
            place = (place + 1) & mask

    def _make(self, size: int) -> None:
        self._keys = array("Q", bytes(8 * size))
        self._offsets = array("q", b"\xff" * (8 * size))  # All of them -1.

    def _put(self, key: int, offset: int) -> None:
        mask = len(self._keys) - 1
        place = key & mask
        while self._offsets[place] != _EMPTY:
            place = (place + 1) & mask
        self._keys[place], self._offsets[place] = key, offset

    def _grow(self) -> None:
        entries = zip(self._keys, self._offsets, strict=True)
        self._make(2 * len(self._keys))
        for key, offset in entries:
            if offset != _EMPTY:
                self._put(key, offset)
