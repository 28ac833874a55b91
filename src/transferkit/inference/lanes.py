"""Running batches in several threads, and giving what becomes of them in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import islice
from typing import TypeVar

from transferkit.data.workers import start_threads

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def run_in_lanes(
    items: Iterator[_Item],
    run: Callable[[_Item], _Result],
    *,
    num_lanes: int,
    cores_each: int = 1,
) -> Iterator[_Result]:
    """Run a function on items, several at a time, and yield what it gives in their order.

    The iterator of the items is advanced in the caller's thread, by one item more than are run
    at a time. The threads have ended when this iterator has, or is closed. An error of the
    function or of the items comes when its turn does.

    Args:
        items: The items; they may be endless.
        run: What makes a result of one.
        num_lanes: How many are run at a time; 1 runs them in the caller's thread.
        cores_each: With how many cores PyTorch computes in each of several threads.

    Yields:
        The results.
    """
    if num_lanes == 1:
        yield from map(run, items)
        return
    pool = start_threads(num_lanes, cores_each=cores_each)
    waiting: deque[Future[_Result]] = deque()
    error: Exception | None = None
    try:
        while True:
            try:
                # One more than there are lanes, for the one that is free first.
                for item in islice(items, num_lanes + 1 - len(waiting)):
                    waiting.append(pool.submit(run, item))
            except Exception as found:
                error = found
            if not waiting:
                break
            yield waiting.popleft().result()
        if error is not None:
            raise error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
