"""One side of `benchmarks/predict.py`, in this process: label pictures, print times as JSON.

    python benchmarks/predict_sides.py '{"module": "predict_peers", "side": "loop", ...}'

The first pass is timed from the start of this program, with all imports, the network and whatever
the side sets up, to the last label; what Python itself takes before, some 20 ms, is left out. The
others are timed by themselves. With "trials", a list of options, no pass over all pictures is
made: the seconds that each of them takes for some pictures are printed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

Label: TypeAlias = "Callable[[Sequence[str]], list[str]]"
"""A side that is ready: from the paths of pictures to the names of their classes."""

NUM_WARM_UP, NUM_TRIED = 8, 64


def run_passes(
    make: Callable[[], Label], paths: Sequence[str], *, passes: int, started: float
) -> dict[str, Any]:
    """Label all pictures again and again; return the seconds and the labels."""
    label = make()
    labels = label(paths)
    cold = time.perf_counter() - started
    warm = []
    for _ in range(passes):
        begun = time.perf_counter()
        again = label(paths)
        warm.append(time.perf_counter() - begun)
        if again != labels:
            raise RuntimeError("Two passes of one side gave other labels.")
    return {"cold": cold, "warm": warm, "labels": labels}


def run_trials(make: Callable[..., Label], paths: Sequence[str], trials: list[Any]) -> list[float]:
    """Return the seconds that a side takes for some pictures with each of these options."""
    some = paths[:: max(1, len(paths) // NUM_TRIED)][:NUM_TRIED]
    seconds = []
    for options in trials:
        label = make(**options)
        label(some[:NUM_WARM_UP])
        begun = time.perf_counter()
        label(some)
        seconds.append(time.perf_counter() - begun)
    return seconds


def main() -> None:
    """Run the side that the first argument describes."""
    started = time.perf_counter()
    told = json.loads(sys.argv[1])
    found: dict[str, Any]
    with contextlib.redirect_stdout(sys.stderr):  # Peers print.
        try:
            side = importlib.import_module(told["module"]).SIDES[told["side"]]

            def make(**options: Any) -> Label:
                label: Label = side(told["task"], **told["options"], **options)
                return label

            paths = told["task"]["paths"]
            if "trials" in told:
                found = {"trials": run_trials(make, paths, told["trials"])}
            else:
                found = run_passes(make, paths, passes=told["passes"], started=started)
        except ModuleNotFoundError as error:
            found = {"missing": error.name}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
