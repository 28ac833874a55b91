"""Fits whose loaders give pixels, as for an accelerator, are to the bit those of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from torch import Tensor

from transferkit.data import ImageLoader, ImageSplits
from transferkit.models import BackboneSpec, build_model
from transferkit.models.features import compute_features
from transferkit.training import SWA, Callback, FeatureCache, Trainer
from transferkit.training.loading import Loading
from transferkit.training.resident import ResidentTensors

Make = Callable[..., Trainer]


@pytest.fixture
def pixels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make loaders give pixels from now on, and keep copies of activations."""

    def keep(self: ResidentTensors, key: Hashable, tensor: Tensor) -> Tensor:
        return self._copies.setdefault(key, tensor.clone())

    def switch() -> None:
        monkeypatch.setattr(Loading, "sends_pixels", property(lambda self: True))
        monkeypatch.setattr(ResidentTensors, "get", keep)

    return switch


@pytest.fixture
def dtypes(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """What loaders give, batch by batch."""
    found: list[torch.dtype] = []
    plain = ImageLoader._admit

    def note(self: ImageLoader, loaded: Any) -> Any:
        batch = plain(self, loaded)
        if batch is not None:
            found.append(batch.images.dtype)
        return batch

    monkeypatch.setattr(ImageLoader, "_admit", note)
    return found


def outcome(trainer: Trainer) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    records = [vars(record) | {"seconds": 0.0} for record in trainer.fit(3)]
    return records, {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(found: Any, expected: Any) -> None:
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert torch.equal(found[1][name], value), name


FITS: dict[str, dict[str, Any]] = {
    "live": {},
    "channels first": {"channels_last": False},
    "mixed": {"batch_augmentation": "mixup_or_cutmix"},
    "accumulated": {"accumulate": 3},
    "stronger": {"augmentation": "strong"},
    "averaged": {"average": SWA()},
    "interpolated": {"wise_ft": True},
    "balanced": {"balance": "sampler"},
    "started": {"head_start": "ridge"},
    "threads": {"num_workers": 2, "worker_type": "thread"},
    "processes": {"num_workers": 1, "worker_type": "fork"},
    "nothing kept": {"cache_bytes": 0},
    "some kept": {"cache_bytes": 3 * 4 * 3 * 32 * 32},
    "features": {"freeze": "backbone", "cache": FeatureCache(views=0)},
    "features of views": {"freeze": "backbone", "cache": FeatureCache(views=2)},
    "features of every epoch": {"freeze": "backbone", "cache": FeatureCache(views="epochs")},
    "features of a part": {"freeze": "until:layer1", "cache": FeatureCache(views=1)},
    "features, balanced": {
        "freeze": "backbone",
        "cache": FeatureCache(views=2),
        "balance": "sampler",
    },
    "features, solved": {"freeze": "backbone", "solver": "lbfgs"},
}


@pytest.mark.parametrize("name", FITS)
def test_pixels_that_are_normalised_later_give_the_same_fit(
    make: Make, tiny_splits: ImageSplits, pixels: Any, dtypes: list[torch.dtype], name: str
) -> None:
    few = tiny_splits.train.subset([*range(8), 8, 9])  # 8 of one class and 2 of the other.
    data = ImageSplits(few, tiny_splits.val)
    options = {"data": data, "num_workers": 0, **FITS[name]}
    torch.manual_seed(0)
    expected = outcome(make(**options))
    dtypes.clear()
    pixels()
    torch.manual_seed(0)
    found = outcome(make(**options))
    assert set(dtypes) == {torch.uint8}
    assert_same(found, expected)


def test_on_the_cpu_workers_normalise_training_pictures(
    make: Make, dtypes: list[torch.dtype]
) -> None:
    make().fit(2)
    # 4 training batches in each epoch, and 2 of validation that are loaded once.
    assert dtypes == [torch.float32] * 4 + [torch.uint8] * 2 + [torch.float32] * 4


@pytest.mark.parametrize("split", ["train", "val"])
def test_evaluation_is_the_same(
    make: Make, pixels: Any, dtypes: list[torch.dtype], split: str
) -> None:
    trainer = make()
    expected = trainer.evaluate(split).to_dict()
    assert set(dtypes) == {torch.float32}
    dtypes.clear()
    pixels()
    assert trainer.evaluate(split).to_dict() == expected
    assert set(dtypes) == {torch.uint8}


def test_the_sweep_of_learning_rates_is_the_same(
    make: Make, pixels: Any, dtypes: list[torch.dtype]
) -> None:
    torch.manual_seed(0)
    expected = make().lr_find(num_steps=10, verbose=False)
    dtypes.clear()
    pixels()
    torch.manual_seed(0)
    assert make().lr_find(num_steps=10, verbose=False) == expected
    assert set(dtypes) == {torch.uint8}


def test_features_are_the_same(tiny_spec: BackboneSpec, tiny_splits: ImageSplits) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    values = [
        compute_features(
            model,
            ImageLoader(tiny_splits.val, model.preprocess.eval(normalize=normalize), batch_size=3),
        ).values
        for normalize in (True, False)
    ]
    assert torch.equal(*values)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FITS)
def test_fits_on_an_accelerator(make: Make, dtypes: list[torch.dtype], name: str) -> None:
    if not torch.accelerator.is_available():
        pytest.skip("PyTorch finds no accelerator")
    history = make(device="auto", **FITS[name]).fit(3)
    assert set(dtypes) == {torch.uint8}
    assert all(0 < record.val_loss < 10 for record in history)


@pytest.mark.gpu
@pytest.mark.parametrize("freeze", ["none", "backbone"])
def test_no_step_waits_for_an_accelerator(make: Make, freeze: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA")
    trainer = make(device="cuda", freeze=freeze)
    trainer.fit(1)  # What is set up once may wait.
    before = torch.cuda.get_sync_debug_mode()
    steps: list[int] = []

    class Watch(Callback):
        def on_step_end(self, trainer: Trainer, step: int) -> None:
            # From the second step on: waiting before the first is none of the steps' business.
            steps.append(step)
            is_last = step == trainer.steps_per_epoch
            torch.cuda.set_sync_debug_mode(before if is_last else "error")

    trainer._callbacks.append(Watch())
    try:
        trainer.fit(1)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert len(steps) == 4
