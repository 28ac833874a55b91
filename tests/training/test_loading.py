"""What a fit does about broken pictures, rare classes, mixed batches and workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from transferkit.data import Batch, ImageSplits, class_weights, wrap_dataset
from transferkit.errors import ConfigError, DataError, ImageError, UnknownNameError
from transferkit.images import decode_image
from transferkit.inference import Predictor
from transferkit.models import BackboneSpec, build_model
from transferkit.training import History, Trainer
from transferkit.training.loading import mix

Make = Callable[..., Trainer]


@pytest.fixture
def make(tiny_spec: BackboneSpec, tiny_splits: ImageSplits) -> Make:
    def build(data: ImageSplits = tiny_splits, **options: Any) -> Trainer:
        model = build_model(tiny_spec, 2, weights=None)
        options = {"lr": 0.05, "batch_size": 4, "verbose": False, "device": "cpu", **options}
        return Trainer(model, data, **options)

    return build


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    trainer.fit(2)
    return trainer.model.state_dict()


# Workers


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 2, "worker_type": "thread"},
        {"num_workers": 1, "worker_type": "fork"},
        pytest.param({"num_workers": 2, "worker_type": "spawn"}, marks=pytest.mark.slow),
        {"cache_bytes": 0},
        {"cache_bytes": 0, "num_workers": 2, "worker_type": "thread"},
        {"cache_bytes": 40_000, "num_workers": 2, "worker_type": "fork"},
    ],
)
@pytest.mark.parametrize("batch_augmentation", [None, "mixup_or_cutmix"])
def test_weights_do_not_depend_on_how_pictures_are_loaded(
    make: Make, options: dict[str, Any], batch_augmentation: str | None
) -> None:
    expected = weights_of(make(num_workers=0, batch_augmentation=batch_augmentation))
    found = weights_of(make(batch_augmentation=batch_augmentation, **options))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_on_the_cpu_a_small_machine_keeps_its_cores_for_the_network(
    make: Make, monkeypatch: pytest.MonkeyPatch, tiny_splits: ImageSplits
) -> None:
    many = tiny_splits.train.subset(list(range(16)) * 5)
    data = ImageSplits(many, tiny_splits.val)
    for cores, expected in ((1, 0), (2, 1), (64, 1)):
        monkeypatch.setattr("transferkit.training.loading.num_cores", lambda cores=cores: cores)
        trainer = make(data)
        assert trainer._job.train_loader.num_workers == expected
        assert trainer._job.val_loader.num_workers == 0  # A handful of pictures.
    assert make(num_workers=3)._job.val_loader.num_workers == 3


# Broken pictures


@pytest.fixture
def damaged(tiny_splits: ImageSplits) -> ImageSplits:
    for path in (tiny_splits.train.paths[2], tiny_splits.val.paths[5]):
        path.write_bytes(b"no picture")
    return tiny_splits


def test_skipped_pictures_are_in_the_history(
    make: Make, damaged: ImageSplits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make(damaged, on_error="skip", max_skipped=0.2, verbose=True)
    history = trainer.fit(2)
    paths = str(damaged.train.paths[2]), str(damaged.val.paths[5])
    reason = "it is not a JPEG, PNG, WEBP, BMP, GIF or TIFF file, whatever its name says."
    expected = [
        {"split": split, "path": path, "reason": f"Cannot read the picture `{path}`: {reason}"}
        for split, path in zip(("train", "val"), paths, strict=True)
    ]
    assert history.skipped == expected
    assert History.from_json(history.to_json()) == history
    first = f"Cannot read the picture `{paths[0]}`: {reason}"
    line = f"Skipped 2 pictures, listed in the history. The first: {first}\n"
    assert line in capsys.readouterr().out
    evaluation = trainer.evaluate("val")
    assert evaluation.num_images == 7
    assert [str(each.path) for each in evaluation.skipped] == [paths[1]]
    assert evaluation.to_dict()["skipped"] == [{"path": paths[1], "reason": expected[1]["reason"]}]


def test_a_broken_picture_ends_the_fit_unless_told_otherwise(
    make: Make, damaged: ImageSplits
) -> None:
    with pytest.raises(ImageError, match=r"^Cannot read the picture "):
        make(damaged).fit(1)


def test_too_many_broken_pictures_end_the_fit(make: Make, damaged: ImageSplits) -> None:
    with pytest.raises(DataError, match=r"^1 of 16 pictures cannot be read, more than "):
        make(damaged, on_error="skip").fit(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "ignore"}, '`on_error` should be "raise" or "skip", found \'ignore\'.'),
        ({"max_skipped": 2}, "`max_skipped` should be a finite number in [0, 1], found 2."),
        ({"cache_bytes": -1}, "`cache_bytes` should be an integer of at least 0, found -1."),
        (
            {"balance": "classes"},
            '`balance` should be "sampler", "weights" or None, found \'classes\'.',
        ),
        (
            {"balance": "weights", "criterion": nn.CrossEntropyLoss()},
            '`balance="weights"` makes the criterion, so that yours would be ignored. Leave one '
            "out, or give yours the weights of `class_weights(data.train)`.",
        ),
        (
            {"batch_augmentation": 3},
            "`batch_augmentation` should be a name, or a callable from (images, targets) to "
            "both, found 3.",
        ),
    ],
)
def test_settings_that_cannot_work(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(**options)
    assert str(error.value) == message


# Rare classes


def test_balance_by_weights(make: Make, tiny_splits: ImageSplits) -> None:
    few = tiny_splits.train.subset([0, 1, 2, 3, 4, 5, 8])
    data = ImageSplits(few, tiny_splits.val)
    trainer = make(data, balance="weights")
    assert isinstance(trainer.criterion, nn.CrossEntropyLoss)
    assert torch.equal(trainer.criterion.weight, class_weights(few))  # type: ignore[arg-type]
    assert trainer.fit(1).settings["balance"] == "weights"


def test_balance_by_sampler(make: Make, tiny_splits: ImageSplits) -> None:
    few = tiny_splits.train.subset([0, 1, 2, 3, 4, 5, 8])
    seen: list[Tensor] = []

    def watch(logits: Tensor, targets: Tensor) -> Tensor:
        if logits.requires_grad:
            seen.append(targets)
        return nn.functional.cross_entropy(logits, targets)

    trainer = make(ImageSplits(few, tiny_splits.val), balance="sampler", criterion=watch)
    trainer.fit(2)
    counts = np.bincount(torch.cat(seen).numpy())
    assert counts.sum() == 14
    assert abs(counts[0] - counts[1]) <= 2


# Mixed batches


def test_mixing_reaches_the_criterion_and_leaves_accuracy_to_the_true_classes(make: Make) -> None:
    seen: list[Tensor] = []

    def watch(logits: Tensor, targets: Tensor) -> Tensor:
        if logits.requires_grad:
            seen.append(targets)
        return nn.functional.cross_entropy(logits, targets)

    trainer = make(batch_augmentation="mixup", criterion=watch)
    history = trainer.fit(3)
    assert all(each.shape == (4, 2) for each in seen)
    assert any(0.01 < float(each.min()) < 0.5 for each in seen)
    assert history.settings["batch_augmentation"] == "mixup"
    assert all(0 <= record.train_accuracy <= 1 for record in history)


def test_mixing_is_a_function_of_seed_epoch_and_batch() -> None:
    batch = Batch(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 1, 0]), torch.tensor([7, 1, 2, 3]))

    def noise(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return images + torch.rand(()), nn.functional.one_hot(targets, 2).float()

    state = torch.get_rng_state()
    first = mix(noise, batch, seed=1, epoch=2)[0]
    torch.rand(5)
    assert torch.equal(mix(noise, batch, seed=1, epoch=2)[0], first)
    assert not torch.equal(mix(noise, batch, seed=1, epoch=3)[0], first)
    assert not torch.equal(mix(noise, batch, seed=2, epoch=2)[0], first)
    torch.set_rng_state(state)
    mix(noise, batch, seed=1, epoch=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_unknown_mix(make: Make) -> None:
    with pytest.raises(UnknownNameError, match=r"^Unknown batch augmentation `mixupp`\. "):
        make(batch_augmentation="mixupp")


# Other sources


def test_a_fit_on_any_data_set(make: Make) -> None:
    rng = np.random.default_rng(0)
    colours = ((40, 60, 200), (200, 50, 40))
    pairs = [
        (
            Image.fromarray(
                np.clip(rng.normal(colours[label], 20, (20, 24, 3)), 0, 255).astype("u1")
            ),
            label,
        )
        for label in (0, 1) * 8
    ]
    data = ImageSplits(
        wrap_dataset(pairs, class_names=["blue", "red"]),  # type: ignore[arg-type]
        wrap_dataset(pairs[:6], class_names=["blue", "red"]),  # type: ignore[arg-type]
    )
    trainer = make(data)
    assert trainer.fit(8).best.val_accuracy == 1.0


def test_preprocessing_decides_about_the_decoder(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoders: list[str] = []

    def record(source: Any, *, decoder: str, max_pixels: int) -> Tensor:
        decoders.append(decoder)
        return decode_image(source)

    trainer = make()
    monkeypatch.setattr("transferkit.images.channels.decode_image", record)
    trainer.fit(1)
    Predictor(trainer.model, class_names=("a", "b")).predict(trainer.data.val.paths[0])
    assert set(decoders) == {"torchvision"}
    assert len(decoders) == 25
