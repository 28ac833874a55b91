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

from transferkit.errors import ConfigError, ImageError
from transferkit.inference import Failure, Prediction, Predictor
from transferkit.inference.pipeline import Broken, read_ahead
from transferkit.models import BackboneSpec, build_model


@pytest.fixture
def predictor(tiny_spec: BackboneSpec) -> Predictor:
    model = build_model(tiny_spec, 2, weights=None)
    return Predictor(model, class_names=("blue", "red"), device="cpu")


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = []
    for number in range(11):
        found.append(tmp_path / f"{number:02}.png")
        Image.new("RGB", (24, 20), (number * 20, 90, 255 - number * 20)).save(found[-1])
    return found


@pytest.fixture(autouse=True)
def threads_before() -> frozenset[threading.Thread]:
    return frozenset(threading.enumerate())


@pytest.fixture
def workers(threads_before: frozenset[threading.Thread]) -> Callable[[], set[str]]:
    """Return a function that names the threads that began in the test and have not ended."""

    def name() -> set[str]:
        names = {each.name for each in set(threading.enumerate()) - threads_before}
        return {each for each in names if "transferkit-loader" in each}

    return name


@pytest.mark.parametrize("num_workers", [0, 3])
def test_order_and_bound(num_workers: int, workers: Callable[[], set[str]]) -> None:
    drawn, largest, taken = 0, 0, 0

    def sources() -> Iterator[Any]:
        nonlocal drawn, largest
        for number in range(40):
            drawn += 1
            largest = max(largest, drawn - taken)
            yield number

    def read(number: Any) -> torch.Tensor:
        time.sleep(0.002 * (number % 3))  # Later ones are ready before earlier ones.
        if number == 7:
            raise ImageError("seven")
        return torch.tensor(number)

    found: list[Any] = []
    for source, result in read_ahead(
        sources(), read, hold=lambda each: each, num_workers=num_workers, num_ahead=5
    ):
        taken += 1
        found.append((source, str(result) if isinstance(result, ImageError) else int(result)))  # type: ignore[arg-type]
    assert found == [(n, "seven" if n == 7 else n) for n in range(40)]
    assert largest <= 6
    assert not workers()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_the_iterator_comes_after_what_it_gave(
    predictor: Predictor, paths: list[Path], num_workers: int, workers: Callable[[], set[str]]
) -> None:
    def sources() -> Iterator[Path]:
        yield from paths[:3]
        raise OSError("the disk is gone")

    found: list[Any] = []
    predictions = predictor.predict_many(sources(), num_workers=num_workers)
    with pytest.raises(OSError, match=r"^the disk is gone$"):
        found.extend(each.path for each in predictions)
    assert found == paths[:3]
    assert not workers()


def test_threads_end_with_the_iterator(
    predictor: Predictor, paths: list[Path], workers: Callable[[], set[str]]
) -> None:
    found = predictor.predict_many(itertools.cycle(paths), num_workers=2, batch_size=2)
    next(found)
    assert workers()
    found.close()  # type: ignore[attr-defined]
    assert not workers()


def test_what_becomes_of_pictures_that_cannot_be_read(
    predictor: Predictor, paths: list[Path]
) -> None:
    paths[4].write_bytes(b"no picture")
    good = [path for path in paths if path is not paths[4]]
    with pytest.raises(ImageError) as caught:
        predictor.predict(paths[4])
    before: list[Any] = []
    predictions = predictor.predict_many(paths, batch_size=3)
    with pytest.raises(ImageError, match=r"04\.png"):
        before.extend(each.path for each in predictions)
    assert before == paths[:4]
    skipped = list(predictor.predict_many(paths, batch_size=3, on_error="skip"))
    assert [each.path for each in skipped] == good
    recorded = list(predictor.predict_many(paths, batch_size=3, on_error="record"))
    assert [each.path for each in recorded] == paths
    assert recorded[4] == Failure(str(caught.value), paths[4])
    assert recorded[4].to_dict() == {"path": str(paths[4]), "error": str(caught.value)}
    assert [each for each in recorded if isinstance(each, Prediction)] == skipped
    for path in paths:
        path.write_bytes(b"no picture")
    every: list[Path] = [*paths] * 20
    assert len(list(predictor.predict_many(every, batch_size=2, on_error="record"))) == 220
    assert not list(predictor.predict_many(every, batch_size=2, on_error="skip"))


def test_values_at_the_door(predictor: Predictor) -> None:
    with pytest.raises(
        ConfigError,
        match=r'^`on_error` should be "raise", "record" or "skip", found \'ignore\'\.$',
    ):
        predictor.predict_many([], on_error="ignore")  # type: ignore[call-overload]
    with pytest.raises(
        ConfigError,
        match=r'^`num_workers` should be "auto" or an integer of at least 0, found -1\.$',
    ):
        predictor.predict_many([], num_workers=-1)


def test_workers_batches_and_mates_change_last_bits_only(
    predictor: Predictor, paths: list[Path]
) -> None:
    expected = [predictor.predict(path) for path in paths]
    for options in ({"num_workers": 3}, {"batch_size": 1}, {"batch_size": 4, "num_workers": 1}):
        found = list(predictor.predict_many(paths, **options))  # type: ignore[call-overload]
        assert [each.label for each in found] == [each.label for each in expected]
        for each, alone in zip(found, expected, strict=True):
            assert each.probability == pytest.approx(alone.probability, abs=1e-6)


def test_several_threads_with_a_model_in_training(
    tiny_spec: BackboneSpec,
    paths: list[Path],
    predict_in_threads: Callable[[Predictor, list[Path]], list[Any]],
) -> None:
    model = build_model(tiny_spec, 2, weights=None).train()
    predictor = Predictor(model, class_names=("blue", "red"), device="cpu")
    expected = [predictor.predict(path).top_k for path in paths]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert predict_in_threads(predictor, paths) == [expected] * 4
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_bar_shows_on_a_terminal_only(
    predictor: Predictor, paths: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    list(predictor.predict_many(paths, progress=True))
    assert capsys.readouterr().err == ""


def test_broken_holds_its_error() -> None:
    def sources() -> Iterator[Any]:
        raise ValueError("x")
        yield

    ((source, found),) = read_ahead(
        sources(), torch.tensor, hold=lambda each: each, num_workers=0, num_ahead=1
    )
    assert source is None
    assert isinstance(found, Broken)
    assert str(found.error) == "x"
