"""The pictures of a bulk prediction: where they are, and which of them are the same file."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from transferkit.errors import ConfigError
from transferkit.inference.doors import find_files

Shard = tuple[int, int]

_NUM_THREADS = 4
_NUM_AHEAD = 64
_CHUNK_BYTES = 1 << 17


class Input(NamedTuple):
    """A picture that is to be predicted.

    Args:
        path: As it was given.
        size: The bytes of the file; None where it cannot be looked at.
        modified: When it was last changed, in nanoseconds; None likewise.
        digest: The SHA-256 of its bytes, in hex; None where it is not wanted or cannot be had.
        offset: Where the journal has it already; None where it does not.
    """

    path: str
    size: int | None = None
    modified: int | None = None
    digest: str | None = None
    offset: int | None = None


def find_paths(images: Any) -> Iterable[Any]:
    """Return the paths that a folder, a file, a glob pattern or an iterable stands for.

    Raises:
        DataError: A folder holds no pictures, or nothing is there.
        ConfigError: It is something else.
    """
    if isinstance(images, (str, os.PathLike)):
        return find_files(images)
    if isinstance(images, (bytes, bytearray)) or not isinstance(images, Iterable):
        raise ConfigError(
            f"`images` should be a folder, a glob pattern or an iterable of paths, found "
            f"{type(images).__name__}."
        )
    return images


def take_shard(paths: Iterable[Any], shard: Shard | None) -> Iterable[Any]:
    """Return every n-th path, from one's own on; all of them without a shard."""
    return paths if shard is None else islice(paths, shard[0], None, shard[1])


def count(paths: Iterable[Any], shard: Shard | None) -> int | None:
    """Return how many paths there are, without looking at them; None if nobody knows."""
    if not isinstance(paths, Sized):
        return None
    total = len(paths)
    return total if shard is None else len(range(shard[0], total, shard[1]))


def examine(
    paths: Iterable[Any], find: Callable[[Input], int | None], *, with_digest: bool
) -> Generator[Input, None, None]:
    """Look at the files some steps ahead, in threads, and yield what they are in their order.

    The bytes that are read here come from memory when they are decoded, so that slow disks
    are read by several threads also where few decode.

    Args:
        paths: Texts or path objects.
        find: Returns where the journal has a picture, if it does; called in the threads. Such
            a picture is not read.
        with_digest: Compute the digests.

    Yields:
        The inputs.

    Raises:
        ConfigError: Something is no path, when its turn comes.
    """

    def look(given: object) -> Input:
        path = _check_path(given)
        found = _look(path)
        offset = find(found)
        if offset is not None or not with_digest or found.size is None:
            return found._replace(offset=offset)
        return found._replace(digest=_hash(path))

    waiting: deque[Future[Input]] = deque()
    pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="transferkit-examine")
    try:
        for path in paths:
            waiting.append(pool.submit(look, path))
            if len(waiting) >= _NUM_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _check_path(path: object) -> str:
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise ConfigError(
            f"Each of `images` should be a path, since rows need names, found "
            f"{type(path).__name__}. `predict_many` takes pictures of every kind."
        )
    return text


def _look(path: str) -> Input:
    try:
        status = Path(path).stat()
    except (OSError, ValueError):  # Whoever decodes it will say what is wrong.
        return Input(path)
    if not stat.S_ISREG(status.st_mode):
        return Input(path)
    return Input(path, status.st_size, status.st_mtime_ns)


def _hash(path: str) -> str | None:
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()
