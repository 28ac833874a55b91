"""WiSE-FT: which weights it tries, which it picks, and that none are lost on the way."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from transferkit.errors import ConfigError
from transferkit.evaluation import Evaluation
from transferkit.models import BackboneSpec, Classifier, build_model
from transferkit.training.interpolation import wise_ft

FACTORS = [number / 10 for number in range(11)]
NAN = float("nan")
State = dict[str, Tensor]


@pytest.fixture
def model(tiny_spec: BackboneSpec) -> Classifier:
    torch.manual_seed(0)
    return build_model(tiny_spec, 2, weights=None)


def finetune(model: nn.Module) -> State:
    """Change the weights and statistics of a model; return its state from before."""
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.dtype.is_floating_point:
                value.add_(torch.randn(value.shape).to(value.dtype))
            else:
                value.add_(7)
    return before


def found(accuracy: float, loss: float) -> Evaluation:
    confusion = np.zeros((2, 2), dtype=np.int64)
    return Evaluation(loss, accuracy, 10, ("ants", "bees"), confusion)


def scripted(scores: Sequence[tuple[float, float]]) -> Callable[[], Evaluation]:
    left = iter(scores)
    return lambda: found(*next(left))


def favour(model: nn.Module, factor: float) -> tuple[Callable[[], Evaluation], list[State]]:
    """Return an evaluation that finds one factor best, and the states that it saw."""
    seen: list[State] = []

    def evaluate() -> Evaluation:
        seen.append(copy.deepcopy(model.state_dict()))
        return found(0.9 if len(seen) - 1 == FACTORS.index(factor) else 0.5, 1.0)

    return evaluate, seen


def same_bits(one: State, other: State) -> bool:
    return all(
        torch.equal(value.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8))
        for name, value in one.items()
    )


def floats(state: State) -> State:
    return {name: value for name, value in state.items() if value.dtype.is_floating_point}


@pytest.mark.parametrize("factor", [0.0, 0.3, 0.5, 1.0])
def test_weights_lie_on_the_line_and_the_picked_ones_stay(model: Classifier, factor: float) -> None:
    start = finetune(model)
    finetuned = copy.deepcopy(model.state_dict())
    evaluate, seen = favour(model, factor)
    result = wise_ft(model, start, evaluate)
    assert result.factor == factor
    assert [each["factor"] for each in result.scores] == FACTORS
    for step, state in zip(FACTORS, seen, strict=True):
        expected = {
            name: (1 - step) * start[name] + step * finetuned[name] for name in floats(finetuned)
        }
        torch.testing.assert_close(floats(state), expected)
    assert same_bits(floats(seen[0]), start)
    assert same_bits(seen[-1], finetuned)
    assert same_bits(seen[FACTORS.index(factor)], model.state_dict())


def test_the_ends_are_exact_where_the_line_is_not() -> None:
    model = nn.Linear(1, 3)
    start = {"bias": torch.tensor([-0.0, 1.0, float("inf")])}
    finetuned = torch.tensor([1.0, float("inf"), -0.0])
    model.load_state_dict({"bias": finetuned}, strict=False)
    evaluate, seen = favour(model, 1.0)
    wise_ft(model, start, evaluate)
    assert same_bits({"bias": seen[0]["bias"]}, start)
    assert same_bits({"bias": finetuned}, model.state_dict())


def test_counts_stay_those_of_the_finetuned_model(model: Classifier) -> None:
    start = finetune(model)
    evaluate, _ = favour(model, 0.0)
    wise_ft(model, start, evaluate)
    assert start["backbone.bn1.num_batches_tracked"].item() == 0
    assert model.state_dict()["backbone.bn1.num_batches_tracked"].item() == 7


def replaced(
    base: tuple[float, float], scores: dict[int, tuple[float, float]]
) -> list[tuple[float, float]]:
    return [scores.get(place, base) for place in range(11)]


@pytest.mark.parametrize(
    ("scores", "factor"),
    [
        (replaced((0.5, 0.1), {4: (0.6, 9.0)}), 0.4),  # The accuracy comes first,
        (replaced((0.5, 0.5), {4: (0.5, 0.4), 7: (0.5, 0.45)}), 0.4),  # then the loss,
        (replaced((0.5, 0.5), {}), 1.0),  # then the fine-tuned weights.
        (replaced((0.9, NAN), {3: (0.2, 5.0)}), 0.3),  # NaN is the worst.
        (replaced((0.9, NAN), {3: (0.2, float("inf"))}), 0.3),
        (replaced((0.5, NAN), {2: (0.6, NAN)}), 0.2),
        ([(0.5, float("nan")) for _ in FACTORS], 1.0),  # No NaN is less than another.
    ],
)
def test_what_is_best(model: Classifier, scores: list[tuple[float, float]], factor: float) -> None:
    result = wise_ft(model, finetune(model), scripted(scores))
    assert result.factor == factor
    pairs = [(each["val_accuracy"], each["val_loss"]) for each in result.scores]
    assert str(pairs) == str(scores)  # As text, in which NaN is NaN.


def test_the_result_is_plain_data(model: Classifier) -> None:
    scores = replaced((0.5, 0.5), {0: (0.5, NAN), 1: (0.5, float("inf"))})
    data = wise_ft(model, finetune(model), scripted(scores)).to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["factor"] == 1.0
    assert data["scores"][0] == {"factor": 0.0, "val_accuracy": 0.5, "val_loss": None}
    assert data["scores"][1]["val_loss"] is None
    assert data["scores"][10] == {"factor": 1.0, "val_accuracy": 0.5, "val_loss": 0.5}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", [0, 5])
def test_an_error_puts_the_finetuned_weights_back(
    model: Classifier, error: type[BaseException], place: int
) -> None:
    start = finetune(model)
    finetuned = copy.deepcopy(model.state_dict())
    left = iter(range(11))

    def evaluate() -> Evaluation:
        if next(left) == place:
            raise error
        return found(0.5, 0.5)

    with pytest.raises(error):
        wise_ft(model, start, evaluate)
    assert same_bits(finetuned, model.state_dict())


def test_what_did_not_change_is_not_touched(model: Classifier) -> None:
    start = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.get_parameter("head.weight").add_(1)
    versions = {name: value._version for name, value in model.state_dict().items()}
    wise_ft(model, start, lambda: found(0.5, 0.5))
    changed = {
        name for name, value in model.state_dict().items() if value._version != versions[name]
    }
    assert changed == {"head.weight"}


def test_a_start_may_hold_only_what_trains(model: Classifier) -> None:
    start = {"head.weight": finetune(model)["head.weight"]}
    before = copy.deepcopy(model.state_dict())
    evaluate, _ = favour(model, 0.0)
    wise_ft(model, start, evaluate)
    assert same_bits(start, {"head.weight": model.state_dict()["head.weight"]})
    del before["head.weight"]
    assert same_bits(before, model.state_dict())


def test_where_nothing_changed_one_evaluation_is_enough(model: Classifier) -> None:
    start = copy.deepcopy(model.state_dict())
    result = wise_ft(model, start, scripted([(0.5, 0.25)]))
    assert result.factor == 1.0
    assert result.scores == ({"factor": 1.0, "val_accuracy": 0.5, "val_loss": 0.25},)


def test_half_precision_is_rounded_once(model: Classifier) -> None:
    start = finetune(model.to(torch.bfloat16))
    finetuned = copy.deepcopy(model.state_dict())
    evaluate, seen = favour(model, 0.3)
    wise_ft(model, start, evaluate)
    expected = {
        name: torch.lerp(start[name].float(), value.float(), 0.3).bfloat16()
        for name, value in floats(finetuned).items()
    }
    assert same_bits(floats(seen[3]), expected)
    assert same_bits(floats(seen[0]), start)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("head.weight", "of the shape (2, 16)"),
        ("fc.weight", "none there"),
    ],
)
def test_a_start_of_another_model_is_an_error(model: Classifier, name: str, found: str) -> None:
    message = (
        f"`start` should be of this model's `state_dict()`, from before the fine-tuning: it has "
        f"`{name}` of the shape (3, 16), the model has {found}."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        wise_ft(model, {name: torch.zeros(3, 16)}, scripted([]))
