"""What happens between a batch and changed weights, compared with plain PyTorch."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from transferkit.errors import ConfigError
from transferkit.training import Callback, Trainer
from transferkit.training.precision import Precision

Make = Callable[..., Trainer]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_accumulated_batches_are_one_large_batch(make: Make) -> None:
    # Batches of 3, 3 and so on to a last one of 1: shares of the sum that differ.
    options: dict[str, Any] = {"bn": "fixed", "lr": 0.1, "scheduler": "none", "recipe": "finetune"}
    large = make(batch_size=6, **options)
    small = make(batch_size=3, accumulate=2, **options)
    for trainer in (large, small):
        trainer.model.backbone.drop = nn.Identity()
    small.model.load_state_dict(large.model.state_dict())
    assert (large.steps_per_epoch, small.steps_per_epoch) == (3, 3)
    found, expected = small.fit(2), large.fit(2)
    for one, other in zip(found, expected, strict=True):
        assert one.val_loss == pytest.approx(other.val_loss, abs=1e-6)
        assert one.train_loss == pytest.approx(other.train_loss, abs=1e-6)
    for name, value in weights(large).items():
        torch.testing.assert_close(small.model.state_dict()[name], value, atol=1e-6, rtol=1e-5)


def test_an_update_is_announced_once_for_its_batches(make: Make) -> None:
    class Count(Callback):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def on_step_end(self, trainer: Trainer, step: int) -> None:
            self.steps.append(step)

    count = Count()
    make(batch_size=3, accumulate=4, callbacks=[count]).fit(2)  # 6 batches.
    assert count.steps == [1, 2, 1, 2]


def test_gradients_are_clipped_to_the_norm(make: Make) -> None:
    norms: list[float] = []

    class Norm(Callback):
        def on_step_end(self, trainer: Trainer, step: int) -> None:
            grads = [each.grad for each in trainer.model.parameters() if each.grad is not None]
            norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))

    make(callbacks=[Norm()]).fit(1)
    unclipped = norms.copy()
    norms.clear()
    limit = min(unclipped) / 2
    make(callbacks=[Norm()], clip_norm=limit).fit(1)
    assert norms == pytest.approx([limit] * len(norms), rel=1e-4)


def test_activation_checkpointing_changes_no_bit(make: Make) -> None:
    usual, saving = make(), make(activation_checkpointing=True)
    saving.model.load_state_dict(usual.model.state_dict())
    found, expected = saving.fit(2), usual.fit(2)
    assert found.column("train_loss") == expected.column("train_loss")
    for name, value in weights(usual).items():
        assert torch.equal(saving.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "`accumulate` should be an integer of at least 1, found 0."),
        ({"clip_norm": 0}, "`clip_norm` should be a finite number above 0, found 0."),
        (
            {"precision": "half"},
            '`precision` should be "fp32", "bf16", "fp16" or "auto", found \'half\'.',
        ),
        (
            {"precision": "fp16"},
            'precision="fp16" needs an accelerator, found the device `cpu`. Pass precision="auto" '
            'or "fp32".',
        ),
        (
            {"activation_checkpointing": 1},
            "`activation_checkpointing` should be True or False, found 1.",
        ),
    ],
)
def test_settings_that_cannot_work(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(**options)


def test_bfloat16_needs_its_instructions(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transferkit.training.precision.has_bfloat16", lambda device: False)
    assert make(precision="auto").fit(1).settings["precision"] == "float32"
    message = (
        'precision="bf16" needs instructions for bfloat16, which `cpu` does not have; without them '
        'it takes many times as long. Pass precision="auto" or "fp32".'
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(precision="bf16")


def test_bfloat16_computes_in_it_and_keeps_float32(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transferkit.training.precision.has_bfloat16", lambda device: True)
    trainer = make(precision="auto")
    seen: list[torch.dtype] = []
    trainer.model.head.register_forward_hook(lambda _module, _inputs, out: seen.append(out.dtype))
    history = trainer.fit(1)
    assert set(seen) == {torch.bfloat16}
    assert history.settings["precision"] == "bfloat16"
    assert {each.dtype for each in trainer.model.parameters()} == {torch.float32}


@pytest.mark.gpu
def test_float16_on_an_accelerator(make: Make) -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no accelerator")
    trainer = make(precision="fp16", device="cuda", clip_norm=1.0)
    assert trainer.fit(2).settings["precision"] == "float16"
    assert all(torch.isfinite(each).all() for each in trainer.model.parameters())


def test_float32_leaves_autocast_alone() -> None:
    with Precision("fp32", torch.device("cpu")).autocast():
        assert not torch.is_autocast_enabled("cpu")
