from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from transferkit.errors import ConfigError
from transferkit.models import HeadSpec, PretrainedHead
from transferkit.training import Trainer

Make = Callable[..., Trainer]


@pytest.mark.parametrize("start", ["class_means", "ridge", "logistic"])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_head_that_is_fitted_starts_well(start: str, kind: Any, make: Make) -> None:
    options: dict[str, Any] = {"freeze": "backbone", "head": HeadSpec(kind=kind), "lr": 1e-9}
    at_random = make(**options).fit(1)[0]
    trainer = make(**options, head_start=start)
    started = trainer.fit(1)[0]
    assert started.val_loss < at_random.val_loss
    if kind == "linear":
        assert started.val_accuracy == 1.0
    assert trainer.history.settings["head_start"] == {"start": start, "num_features": 16}


def with_pretrained(make: Make, **options: Any) -> Trainer:
    """Make a trainer whose model knows the classifier that its backbone was trained with."""
    trainer = make(freeze="backbone", lr=1e-9)
    trainer.model.pretrained_head = PretrainedHead(
        weight=torch.arange(48.0).reshape(3, 16),
        bias=torch.tensor([1.0, 2.0, 3.0]),
        class_names=("red", "grey", "sky blue"),
    )
    return Trainer(
        trainer.model, trainer.data, verbose=options.pop("verbose", False), device="cpu",
        lr=1e-9, **options,
    )  # fmt: skip


def test_rows_of_the_pretrained_classifier(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = with_pretrained(make, head_start={"blue": "sky blue"}, verbose=True)
    trainer.fit(1)
    expected = torch.stack([torch.arange(32.0, 48.0), torch.arange(16.0)])
    assert torch.allclose(trainer.model.head.get_parameter("weight").detach(), expected, atol=1e-3)
    assert torch.allclose(
        trainer.model.head.get_parameter("bias").detach(), torch.tensor([3.0, 1.0]), atol=1e-3
    )
    assert trainer.history.settings["head_start"] == {
        "start": "pretrained",
        "rows": {"blue": ["2 sky blue"], "red": ["0 red"]},
    }
    line = (
        "The head starts from rows of the pretrained classifier: blue from 2 sky blue; "
        "red from 0 red"
    )
    assert line in capsys.readouterr().out.splitlines()


def test_a_name_that_fits_no_row_is_an_error_at_the_door(make: Make) -> None:
    message = (
        "The name 'blue' fits none of the 3 names of the pretrained classifier. The closest are "
        "'sky blue'. Say what the class is called there, by a name or an index: "
        "head_start={'blue': 'sky blue'}."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        with_pretrained(make, head_start="pretrained")


def test_a_start_without_training(make: Make) -> None:
    trainer = make(freeze="backbone", head_start="ridge")
    assert trainer.start_head() == {"start": "ridge", "num_features": 16}
    assert trainer.evaluate("val").accuracy == 1.0
    assert len(trainer.history) == 0
    assert make().start_head() is None


def test_a_model_without_pretrained_classifier_is_an_error(make: Make) -> None:
    message = (
        'head_start="pretrained" needs the classifier that `tiny` was trained with, which this '
        "model does not have: it was built without weights, or these came without a head. "
        'Take head_start="ridge" or None.'
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(head_start="pretrained")


def test_a_start_that_is_none_is_an_error(make: Make) -> None:
    message = (
        '`head_start` should be None, "class_means", "ridge", "logistic", "pretrained" or a '
        "mapping from class names to those of the pretrained classifier, found 'mean'."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(head_start="mean")


def test_an_mlp_cannot_be_fitted_and_says_so_at_the_door(make: Make) -> None:
    message = (
        'head_start="ridge" writes a linear classifier into the head, which a head of the kind '
        '"mlp" cannot take. Build the model with head="linear", or leave `head_start` out.'
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(head="mlp", head_start="ridge")
