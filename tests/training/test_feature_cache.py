from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from transferkit.data import ImageDataset, ImageSplits, load_folders
from transferkit.errors import ConfigError, DataError, FeatureError
from transferkit.images import Preprocess
from transferkit.models import build_model, engines
from transferkit.testing import make_image_folder
from transferkit.training import Callback, FeatureCache, Phase, Trainer, feed_choice
from transferkit.training import cached_feed as module
from transferkit.training.history import EpochRecord, History

Make = Callable[..., Trainer]
SMALL = Preprocess(crop_size=64, resize_size=72)


def losses(history: History) -> Any:
    return np.array([(each.train_loss, each.val_loss, each.val_accuracy) for each in history])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of pictures in each call of an engine."""
    calls: list[int] = []

    def make_engine(*args: Any, **options: Any) -> engines.Engine:
        engine = engines.make_engine(*args, **options)

        class Counting:
            def __call__(self, images: Tensor) -> Tensor:
                calls.append(len(images))
                return engine(images)

            def describe(self) -> dict[str, Any]:
                return engine.describe()

        return Counting()

    monkeypatch.setattr(module, "make_engine", make_engine)
    return calls


BACKBONES = ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "efficientnet_lite0"]


@pytest.mark.parametrize("views", ["epochs", 5])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_cached_and_live_training_have_the_same_losses(
    backbone: str, views: Any, tiny_splits: ImageSplits
) -> None:
    found = []
    for cache in (False, FeatureCache(views=views)):
        model = build_model(backbone, 2, weights=None, freeze="backbone", preprocess=SMALL)
        trainer = Trainer(
            model, tiny_splits, cache=cache, lr=0.05, batch_size=3, verbose=False, device="cpu"
        )
        found.append(losses(trainer.fit(4)))
        assert trainer.history.settings["features"]["probe"]["cached"] is bool(cache)
    live, cached = found
    assert np.abs(cached - live).max() <= 1e-5 * max(1.0, np.abs(live).max())


@pytest.mark.parametrize(
    ("backbone", "stage"),
    [
        ("resnet18", "layer3"),
        ("mobilenet_v3_small", "features.5"),
        ("efficientnet_lite0", "blocks.4"),
    ],
)
def test_a_frozen_prefix_is_cached_at_a_stage(
    backbone: str, stage: str, tiny_splits: ImageSplits, counted: list[int]
) -> None:
    found = []
    for cache in (False, FeatureCache(views="epochs")):
        # Statistics of batches of 4 would make large differences of small ones.
        freeze: dict[str, Any] = {"freeze": f"until:{stage}", "bn": "fixed"}
        model = build_model(backbone, 2, weights=None, preprocess=SMALL, **freeze)
        trainer = Trainer(
            model, tiny_splits, cache=cache, lr=0.01, scheduler="none", batch_size=4,
            verbose=False, device="cpu",
        )  # fmt: skip
        found.append(losses(trainer.fit(3)))
    live, cached = found
    assert sum(counted) == 3 * 16 + 8
    assert np.abs(cached - live).max() <= 1e-5 * max(1.0, np.abs(live).max())


@pytest.mark.parametrize(
    ("views", "num_images"), [(0, 16 + 8), (1, 16 + 8), (2, 2 * 16 + 8), (9, 4 * 16 + 8)]
)
def test_each_view_is_computed_once(
    views: int, num_images: int, make: Make, counted: list[int]
) -> None:
    make(freeze="backbone", cache=FeatureCache(views=views)).fit(4)
    assert sum(counted) == num_images


@pytest.mark.parametrize("balance", ["weights", "sampler"])
def test_balanced_losses_are_those_of_live_training(balance: Any, make: Make) -> None:
    found = []
    for cache in (False, FeatureCache(views="epochs")):
        options: dict[str, Any] = {"cache": cache, "balance": balance, "batch_size": 3}
        found.append(losses(make(freeze="backbone", lr=0.01, **options).fit(2)))
    assert found[1] == pytest.approx(found[0], abs=1e-5)


def test_the_suffix_sees_the_batches_of_the_fit(make: Make) -> None:
    sizes: set[int] = set()
    trainer = make(freeze="until:conv1", batch_size=3, cache=True)
    handle = trainer.model.head.register_forward_hook(
        lambda _module, inputs, _output: sizes.add(len(inputs[0]))
    )
    trainer.fit(1)
    handle.remove()
    assert max(sizes) == 3


def test_a_view_that_fails_the_check_is_not_kept(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FeatureCache(views=0, folder=tmp_path / "features")
    with monkeypatch.context() as patch:
        patch.setattr(module, "make_engine", broken_engine)
        with pytest.raises(FeatureError):
            make(freeze="backbone", cache=cache).fit(1)
    assert len(make(freeze="backbone", cache=cache).fit(1)) == 1


def broken_engine(*args: Any, **options: Any) -> Any:
    engine = engines.make_engine(*args, **options)

    class Broken:
        def __call__(self, images: Tensor) -> Tensor:
            return engine(images) + 1

        def describe(self) -> dict[str, Any]:
            return engine.describe()

    return Broken()


def test_an_augmentation_that_nothing_would_use_is_an_error(make: Make) -> None:
    message = (
        "`augmentation` would be ignored: with views=0 training sees the evaluation view alone. "
        "Leave it out, or take FeatureCache(views=4), say."
    )
    trainer = make(freeze="backbone", cache=FeatureCache(views=0), augmentation="light")
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        trainer.fit(1)
    assert len(trainer.fit(phases=[Phase("a", 1), Phase("b", 1, unfreeze="all")])) == 2


def test_features_that_nothing_has_room_for_are_computed_live_unasked(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage("."))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 100, 0))
    monkeypatch.setattr(feed_choice, "settings_of", lambda cache: FeatureCache(memory_bytes=1000))
    trainer = make(freeze="backbone")
    trainer.fit(1)
    assert trainer.history.settings["features"]["probe"] == {
        "cached": False,
        "reason": "the features of 24 pictures take 1,536 bytes, more than the 1,000 of "
        f"`memory_bytes` and half of what is free in `{tempfile.gettempdir()}`",
    }


def test_the_evaluation_view_is_what_training_sees_with_no_views(make: Make) -> None:
    # With the evaluation view alone, a fit at a rate of next to 0 has one loss in all epochs.
    history = make(freeze="backbone", cache=FeatureCache(views=0), lr=1e-12, scheduler="none").fit(
        3
    )
    train = history.column("train_loss")
    assert max(train) - min(train) < 1e-6
    trainer = make(freeze="backbone", cache=FeatureCache(views=0), lr=1e-12)
    trainer.fit(1)
    assert trainer.history[0].train_loss == pytest.approx(trainer.evaluate("train").loss, abs=1e-5)


def test_views_repeat_after_their_number(make: Make) -> None:
    history = make(freeze="backbone", cache=FeatureCache(views=2), lr=1e-12, scheduler="none").fit(
        4
    )
    first, second, third, fourth = history.column("train_loss")
    assert first == pytest.approx(third, abs=1e-6)
    assert second == pytest.approx(fourth, abs=1e-6)
    assert first != pytest.approx(second, abs=1e-6)


def test_the_frozen_part_is_byte_identical_and_modes_return(make: Make) -> None:
    trainer = make(freeze="backbone", cache=True, lr=0.1)
    before = {name: each.clone() for name, each in trainer.model.backbone.state_dict().items()}
    head = trainer.model.head.get_parameter("weight").clone()
    trainer.model.eval()
    trainer.fit(2)
    after = trainer.model.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(head, trainer.model.head.get_parameter("weight"))
    assert not any(each.training for each in trainer.model.modules())


class Tamper(Callback):
    """Change the frozen part after an epoch."""

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        with torch.no_grad():
            trainer.model.backbone.get_parameter("conv1.weight").mul_(1.5)


@pytest.mark.parametrize("views", [0, 1, "epochs"])
def test_a_change_of_the_frozen_part_is_noticed(views: Any, make: Make) -> None:
    trainer = make(freeze="backbone", cache=FeatureCache(views=views), callbacks=[Tamper()])
    message = (
        r"Cached features do not match those that the network gives now: relative to the largest "
        r"they differ by \S+, allowed are 0\.0001 \(seen near `[^`]+`\)\. The frozen part changed "
        r"during the fit, what was kept in a folder is stale, or float32 is too coarse for this "
        r"network\. Pass `cache=False` to compute all features anew in every epoch\."
    )
    with pytest.raises(FeatureError, match=f"^{message}$"):
        trainer.fit(3)
    assert trainer.history.status == "failed"
    assert len(trainer.history) == 1


def test_features_kept_in_a_folder_serve_a_later_run(
    make: Make, counted: list[int], tmp_path: Path
) -> None:
    cache = FeatureCache(views=2, folder=tmp_path / "features")
    first = losses(make(freeze="backbone", cache=cache).fit(3))
    assert sum(counted) == 2 * 16 + 8
    counted.clear()
    second = losses(make(freeze="backbone", cache=cache).fit(3))
    assert counted == []
    assert np.array_equal(first, second)
    other = make(freeze="backbone", cache=cache)
    with torch.no_grad():
        other.model.backbone.get_parameter("conv1.weight")[0, 0, 0, 0] += 1e-6
    other.fit(3)
    assert sum(counted) == 2 * 16 + 8


@pytest.mark.parametrize("change", ["picture", "seed", "augmentation"])
def test_a_kept_feature_is_never_stale(
    change: str, make: Make, counted: list[int], tmp_path: Path, tiny_splits: ImageSplits
) -> None:
    cache = FeatureCache(views=1, folder=tmp_path / "features")
    make(freeze="backbone", cache=cache).fit(1)
    counted.clear()
    options: dict[str, Any] = {"seed": 1} if change == "seed" else {}
    if change == "picture":
        path = tiny_splits.train.paths[3]
        path.write_bytes(tiny_splits.train.paths[4].read_bytes())
    elif change == "augmentation":
        options = {"augmentation": "light"}
    make(freeze="backbone", cache=cache, **options).fit(1)
    assert sum(counted) == 16  # The training view; the validation view is still good.


def test_features_over_the_budget_spill_to_a_file_that_is_removed(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    expected = losses(make(freeze="backbone", cache=FeatureCache(views=2)).fit(3))
    trainer = make(freeze="backbone", cache=FeatureCache(views=2, memory_bytes=0))
    assert np.array_equal(losses(trainer.fit(3)), expected)
    assert list(tmp_path.glob("transferkit*")) == []
    assert trainer.history.settings["features"]["probe"]["spilled_bytes"] == 4 * 16 * (16 + 16 + 8)


@pytest.fixture
def with_a_broken_one(tiny_splits: ImageSplits) -> ImageSplits:
    tiny_splits.train.paths[5].write_bytes(b"this is no picture")
    return tiny_splits


@pytest.mark.parametrize("views", [0, 2, "epochs"])
def test_a_picture_that_cannot_be_read_is_left_out(
    views: Any, make: Make, with_a_broken_one: ImageSplits
) -> None:
    found = []
    for cache in (False, FeatureCache(views=views)):
        trainer = make(
            freeze="backbone", cache=cache, data=with_a_broken_one, on_error="skip",
            max_skipped=0.1, batch_size=3, lr=1e-3,
        )  # fmt: skip
        trainer.fit(2)
        found.append(trainer.history)
    live, cached = found
    assert cached.skipped == live.skipped
    assert len(cached.skipped) == 1
    if views == "epochs":
        assert losses(cached) == pytest.approx(losses(live), abs=1e-5)


def test_a_split_without_a_readable_picture_is_an_error(
    make: Make, tiny_splits: ImageSplits
) -> None:
    for path in tiny_splits.val.paths:
        path.write_bytes(b"")
    trainer = make(freeze="backbone", cache=True, on_error="skip", max_skipped=1)
    with pytest.raises(DataError, match=r"^No picture of the val split can be read\.$"):
        trainer.fit(1)


@pytest.mark.parametrize("views", [2, "epochs"])
def test_balanced_drawing_is_followed(views: Any, tmp_path: Path, make: Make) -> None:
    data = load_folders(make_image_folder(tmp_path / "data", num_train=6))
    targets = data.train.targets.tolist()
    kept = [index for index, target in enumerate(targets) if target == 0 or index % 3 == 0]
    train = ImageDataset(
        [data.train.paths[index] for index in kept],
        [targets[index] for index in kept],
        class_names=data.class_names,
    )
    found = []
    for cache in (False, FeatureCache(views=views)):
        trainer = make(
            freeze="backbone", cache=cache, data=ImageSplits(train, data.val), balance="sampler",
            lr=0.01,
        )  # fmt: skip
        found.append(losses(trainer.fit(2)))
    if views == "epochs":  # A picture that comes twice in an epoch comes in two views.
        assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert np.isfinite(found[1]).all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"freeze": "none"}, "the first stage of the backbone trains"),
        ({"freeze": "backbone", "bn": "adapt"}, 'bn="adapt" changes the frozen part'),
        ({"freeze": "backbone", "bn": "train"}, 'bn="train" changes the frozen part'),
        (
            {"freeze": "backbone", "batch_augmentation": "mixup"},
            "a batch augmentation mixes pictures, not features",
        ),
    ],
)
def test_where_nothing_can_be_cached_it_says_so(
    options: dict[str, Any], reason: str, make: Make
) -> None:
    trainer = make(**options)
    trainer.fit(1)
    (features,) = trainer.history.settings["features"].values()
    assert features == {"cached": False, "reason": reason}
    message = (
        f"Features cannot be cached, as `cache` wants it: {reason}. "
        f"Leave `cache` out to have them computed live."
    )
    for cache in (True, FeatureCache()):
        trainer = make(**options, cache=cache)
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            trainer.fit(1)


def test_activations_that_do_not_fit_are_not_cached_unasked(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(freeze="until:conv1")
    trainer.fit(1)
    assert trainer.history.settings["features"]["finetune"]["cached"] is True
    monkeypatch.setattr(feed_choice, "settings_of", lambda cache: FeatureCache(memory_bytes=1000))
    trainer = make(freeze="until:conv1")
    trainer.fit(1)
    # 8 channels of 15 x 15 in float32, for one view of 16 pictures and for 8 pictures.
    assert trainer.history.settings["features"]["finetune"] == {
        "cached": False,
        "reason": "the activations of 24 pictures take 172,800 bytes, more than the 1,000 of "
        "`memory_bytes`",
    }


BAD: list[tuple[dict[str, Any], str]] = [
    ({"views": -1}, '`views` should be "epochs" or an integer of at least 0, found -1.'),
    ({"views": "all"}, "`views` should be \"epochs\" or an integer of at least 0, found 'all'."),
    (
        {"engine": "onnx"},
        '`engine` should be "pytorch", "openvino" or "onnxruntime", found \'onnx\'.',
    ),
    ({"precision": "fp16"}, '`precision` should be "float32" or "bfloat16", found \'fp16\'.'),
    ({"memory_bytes": -1}, "`memory_bytes` should be an integer of at least 0, found -1."),
    ({"batch_size": 0}, "`batch_size` should be an integer of at least 1, found 0."),
    ({"folder": 3}, "`folder` should be a path, found 3."),
    ({"tolerance": 0}, "`tolerance` should be a finite number above 0, found 0."),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_settings_that_cannot_work_are_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        FeatureCache(**options)


def test_a_choice_that_is_none_is_an_error(make: Make) -> None:
    message = "`cache` should be \"auto\", True, False or a FeatureCache, found 'on'."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(freeze="backbone", cache="on")


@pytest.mark.parametrize(
    "options", [{"num_workers": 2}, {"num_workers": 2, "worker_type": "process"}]
)
def test_workers_do_not_matter(options: dict[str, Any], make: Make) -> None:
    cache = FeatureCache(views=2)
    expected = losses(make(freeze="backbone", cache=cache).fit(2))
    found = losses(make(freeze="backbone", cache=cache, **options).fit(2))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_other_engines_compute_the_same_features(make: Make, engine: Any) -> None:
    pytest.importorskip(engine)
    expected = losses(make(freeze="backbone", cache=FeatureCache()).fit(2))
    trainer = make(freeze="backbone", cache=FeatureCache(engine=engine))
    assert losses(trainer.fit(2)) == pytest.approx(expected, abs=1e-4)
    assert trainer.history.settings["features"]["probe"]["engine"] == engine
