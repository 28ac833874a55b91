from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from transferkit.inference import Predictor
from transferkit.inference.lanes import run_in_lanes
from transferkit.models import BackboneSpec, build_model
from transferkit.models.engines import count_lanes


@pytest.fixture
def our_threads() -> Callable[[], set[threading.Thread]]:
    """Return a function that gives the threads that began in the test and have not ended."""
    before = set(threading.enumerate())
    return lambda: (
        {each for each in threading.enumerate() if each.name.startswith("transferkit-")} - before
    )


def make_predictor(spec: BackboneSpec, engine: Any, num_lanes: int) -> Predictor:
    """Make a predictor as on a machine with so many cores."""
    pytest.importorskip({"pytorch": "torch"}.get(engine, engine))
    model = build_model(spec, 2, weights=None)
    predictor = Predictor(model, class_names=("blue", "red"), device="cpu", engine=engine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: num_lanes)
        assert count_lanes(predictor._network.chosen()[1]) == num_lanes
    return predictor


def test_order_bound_and_threads(our_threads: Callable[[], set[threading.Thread]]) -> None:
    drawn, largest, taken = 0, 0, 0
    running, most = 0, 0
    lock = threading.Lock()

    def items() -> Iterator[int]:
        nonlocal drawn, largest
        for number in range(30):
            drawn += 1
            largest = max(largest, drawn - taken)
            yield number

    def run(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002 * (number % 3 + 1))  # Later ones are ready before earlier ones.
        with lock:
            running -= 1
        return number * number

    found = []
    for each in run_in_lanes(items(), run, num_lanes=3):
        taken += 1
        found.append(each)
    assert found == [number * number for number in range(30)]
    assert most == 3
    assert largest == 4  # Three that run, and one for the lane that is free first.
    assert not our_threads()


def test_one_lane_is_the_callers_thread() -> None:
    found = run_in_lanes(iter(range(3)), lambda _: threading.current_thread(), num_lanes=1)
    assert set(found) == {threading.current_thread()}


def test_errors_come_in_their_turn(our_threads: Callable[[], set[threading.Thread]]) -> None:
    def items() -> Iterator[int]:
        yield from range(4)
        raise OSError("the disk is gone")

    found: list[object] = []
    with pytest.raises(OSError, match=r"^the disk is gone$"):
        found.extend(run_in_lanes(items(), lambda number: number, num_lanes=2))
    assert found == [0, 1, 2, 3]
    found.clear()
    with pytest.raises(ZeroDivisionError):
        found.extend(run_in_lanes(iter([1, 2, 0, 4, 5]), lambda number: 2 // number, num_lanes=2))
    assert found == [2, 1]
    assert not our_threads()


def test_threads_end_with_the_iterator(our_threads: Callable[[], set[threading.Thread]]) -> None:
    found = run_in_lanes(itertools.count(), lambda number: number, num_lanes=2)
    assert next(found) == 0
    assert len(our_threads()) == 2
    found.close()  # type: ignore[attr-defined]
    assert not our_threads()


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = []
    for number in range(20):
        found.append(tmp_path / f"{number:02}.png")
        Image.new("RGB", (40, 36), (number * 12, 90, 255 - number * 12)).save(found[-1])
    return found


@pytest.mark.parametrize("engine", ["pytorch", "openvino", "onnxruntime"])
def test_a_predictor_with_lanes_gives_the_same(
    engine: Any, tiny_spec: BackboneSpec, paths: list[Path]
) -> None:
    predictor = make_predictor(tiny_spec, engine, 3)
    expected = [predictor.predict(path).top_k for path in paths]
    found = [each.top_k for each in predictor.predict_many(paths, batch_size=1)]
    assert found == expected
    for size in (2, 7):
        several = list(predictor.predict_many(paths, batch_size=size))
        assert [each.path for each in several] == paths
        for one, alone in zip(several, expected, strict=True):
            assert one.probability == pytest.approx(alone[0].probability, abs=1e-6)


@pytest.mark.parametrize("engine", ["pytorch", "openvino", "onnxruntime"])
def test_threads_that_share_a_predictor_do_not_mix_up(
    engine: Any,
    tiny_spec: BackboneSpec,
    paths: list[Path],
    predict_in_threads: Callable[[Predictor, list[Path]], list[Any]],
) -> None:
    predictor = make_predictor(tiny_spec, engine, 2)
    found = predict_in_threads(predictor, paths)
    assert found == [[predictor.predict(path).top_k for path in paths]] * 4
