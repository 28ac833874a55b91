"""What the tests of training share: a maker of quick trainers."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from transferkit.data import ImageSplits
from transferkit.models import BackboneSpec, build_model
from transferkit.training import Trainer


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    """Let SIGINT through, which a program that runs in the background may have to ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def make(tiny_spec: BackboneSpec, tiny_splits: ImageSplits) -> Callable[..., Trainer]:
    """Make a quick trainer; the first options are the model's, `data` replaces the pictures."""

    def build(
        *,
        freeze: Any = "none",
        bn: Any = "frozen",
        head: Any = "linear",
        data: Any = None,
        spec: Any = None,
        **options: Any,
    ) -> Trainer:
        model = build_model(spec or tiny_spec, 2, weights=None, freeze=freeze, bn=bn, head=head)
        defaults: dict[str, Any] = {"verbose": False, "device": "cpu", "batch_size": 4}
        return Trainer(model, data or tiny_splits, **(defaults | options))

    return build
