"""How a fit runs: measured where it is long, and kept by what goes on with it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transferkit.data import ImageSplits
from transferkit.errors import ConfigError
from transferkit.images import Preprocess
from transferkit.models import BackboneSpec, build_model
from transferkit.training import Callback, Checkpoints, FeatureCache, Phase, Trainer, execution
from transferkit.training.execution import Execution, pick_format
from transferkit.training.updates import lay_out_state

Make = Callable[..., Trainer]
NAMES = {True: "channels_last", False: "contiguous"}


def costing(last: float, first: float, runs: list[tuple[str, int]] | None = None) -> Any:
    """Return a run that takes so many seconds for each picture."""

    def run(name: str, count: int) -> float:
        if runs is not None:
            runs.append((name, count))
        return count * (last if name == "channels_last" else first)

    return run


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have every fit, also a short one, choose a layout."""

    def have(name: str) -> None:
        found = Execution(memory_format=name, reason="measured: so it is")
        monkeypatch.setattr(execution, "MIN_BATCHES", 1)
        monkeypatch.setattr(execution, "pick_format", lambda run, size: found)

    return have


@pytest.mark.parametrize(
    ("last", "first", "expected"),
    [
        (0.01, 0.02, "channels_last"),
        (0.02, 0.01, "contiguous"),
        (0.0104, 0.01, "channels_last"),
        (0.0106, 0.01, "contiguous"),
    ],
)
def test_the_faster_layout_is_taken_and_of_equals_the_channels_last(
    last: float, first: float, expected: str
) -> None:
    assert pick_format(costing(last, first), 8).memory_format == expected


def test_what_is_run_and_said() -> None:
    runs: list[tuple[str, int]] = []
    found = pick_format(costing(0.01, 0.02, runs), 32)
    assert str(found) == (
        "execution: channels_last (measured: channels_last 0.32 s, contiguous 0.64 s for 32 "
        "pictures)"
    )
    few = [("channels_last", 2)] * 2 + [("contiguous", 2)] * 2
    assert runs == [*few, *[("channels_last", 32)] * 2, *[("contiguous", 32)] * 2]


def test_the_faster_of_the_timed_runs_counts() -> None:
    seconds = {"channels_last": [1.0, 1.0, 9.0, 1.0], "contiguous": [1.0, 1.0, 2.0, 2.0]}
    found = pick_format(lambda name, count: seconds[name].pop(0), 2)
    assert found.memory_format == "channels_last"


def test_slow_networks_are_measured_on_fewer_pictures() -> None:
    runs: list[tuple[str, int]] = []
    found = pick_format(costing(0.1, 0.1, runs), 32)
    assert found.reason.endswith("for 10 pictures")
    assert sum(0.1 * count for _, count in runs[4:]) == pytest.approx(4)
    runs.clear()
    pick_format(costing(9.0, 9.0, runs), 32)
    assert {count for _, count in runs} == {2}
    pick_format(costing(9.0, 9.0, runs), 1)
    assert runs[-1] == ("contiguous", 1)


@pytest.mark.parametrize("fails", ["channels_last", "contiguous"])
def test_a_layout_that_fails_is_not_taken(fails: str) -> None:
    def run(name: str, count: int) -> float:
        if name == fails:
            raise RuntimeError("it cannot be\nand here is a trace")
        return 1.0

    (other,) = set(NAMES.values()) - {fails}
    assert pick_format(run, 4) == Execution(
        memory_format=other, reason=f"{fails} fails: it cannot be"
    )


def test_no_memory_to_measure_in() -> None:
    def run(name: str, count: int) -> float:
        if name == "contiguous":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return 1.0

    expected = Execution(memory_format="channels_last", reason="too little memory to measure")
    assert pick_format(run, 4) == expected


@pytest.mark.parametrize("value", [None, 1, "last"])
def test_another_value_is_an_error(make: Make, value: Any) -> None:
    message = f'`channels_last` should be "auto", True or False, found {value!r}.'
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(channels_last=value)


@pytest.mark.parametrize("given", [True, False])
def test_what_is_given_holds(make: Make, given: bool) -> None:
    settings = make(channels_last=given).fit(13).settings
    assert settings["execution"] == {"memory_format": NAMES[given], "reason": "given"}
    assert settings["channels_last"] is given


SHORT = {"memory_format": "channels_last", "reason": "too short to measure"}


def test_short_fits_and_cached_phases_are_not_measured(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(run: Any, size: int) -> None:
        raise AssertionError

    monkeypatch.setattr(execution, "pick_format", never)
    assert make().fit(12).settings["execution"] == SHORT
    cached = make(freeze="backbone", cache=FeatureCache(views=1))
    assert cached.fit(13).settings["execution"] == SHORT
    solved = make(freeze="backbone", solver="lbfgs", batch_size=1)
    assert solved.fit().settings["execution"] == SHORT
    phases = [Phase("head", 9, freeze="backbone"), Phase("all", 4, unfreeze="all")]
    assert make().fit(phases=phases).settings["execution"] == SHORT


def test_a_long_fit_measures_and_gives_the_same(make: Make) -> None:
    torch.manual_seed(0)
    auto = make(recipe="finetune", activation_checkpointing=True)
    state = {name: value.clone() for name, value in auto.model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    history = auto.fit(13)
    assert torch.equal(torch.rand(1), expected)
    found = history.settings["execution"]
    assert re.match(
        r"^measured: channels_last \S+ s, contiguous \S+ s for 4 pictures$", found["reason"]
    )
    assert history.settings["channels_last"] == "auto"
    is_last = found["memory_format"] == "channels_last"
    given = make(recipe="finetune", channels_last=is_last)
    given.model.load_state_dict(state)
    assert given.fit(13).column("val_loss") == history.column("val_loss")
    for name, value in given.model.state_dict().items():
        assert torch.equal(value, auto.model.state_dict()[name]), name


def test_the_choice_lays_model_and_images_out(make: Make, choose: Callable[[str], None]) -> None:
    choose("contiguous")
    torch.manual_seed(0)
    trainer = make()
    assert trainer.model.get_parameter("backbone.conv1.weight").stride(1) == 1
    layouts: list[bool] = []
    trainer.model.get_submodule("backbone.conv1").register_forward_pre_hook(
        lambda _, inputs: layouts.append(inputs[0].is_contiguous())
    )
    assert trainer.fit(1).settings["execution"]["memory_format"] == "contiguous"
    assert layouts
    assert all(layouts)
    assert trainer.model.get_parameter("backbone.conv1.weight").is_contiguous()


class _Killed(BaseException):
    """In the place of a power cut."""


class _Kill(Callback):
    def __init__(self) -> None:
        self.left = 5

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        self.left -= 1
        if not self.left:
            raise _Killed


@pytest.mark.parametrize("first", ["channels_last", "contiguous"])
def test_a_fit_that_goes_on_keeps_its_layout(
    make: Make, tmp_path: Path, choose: Callable[[str], None], first: str
) -> None:
    (other,) = set(NAMES.values()) - {first}
    choose(first)
    torch.manual_seed(0)
    whole = make(optimizer="adamw")
    state = {name: value.clone() for name, value in whole.model.state_dict().items()}
    expected = whole.fit(3)
    options: dict[str, Any] = {
        "optimizer": "adamw",
        "checkpoints": Checkpoints(folder=tmp_path / "fit", every_steps=1),
    }
    cut = make(callbacks=[_Kill()], **options)
    cut.model.load_state_dict(state)
    with pytest.raises(_Killed):
        cut.fit(3)
    choose(other)
    resumed = make(**options)
    resumed.model.load_state_dict(state)
    history = resumed.fit(3, resume=True)
    assert history.settings["execution"] == expected.settings["execution"]
    assert history.column("val_loss") == expected.column("val_loss")
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name
    weight = resumed.model.get_parameter("backbone.conv1.weight")
    assert weight.is_contiguous() is (first == "contiguous")
    assert make().fit(3).settings["execution"]["memory_format"] == other


class _Viewing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=16)

    def forward(self, images: Tensor) -> Tensor:
        flat: Tensor = self.conv(images).view(len(images), -1)
        return flat


def viewing(data: ImageSplits, network: nn.Module) -> Trainer:
    preprocess = Preprocess(crop_size=32, resize_size=32)
    model = build_model(network, 2, num_features=32, preprocess=preprocess)
    return Trainer(model, data, verbose=False, device="cpu", batch_size=4)


def test_a_network_that_needs_the_channels_first_gets_them(tiny_splits: ImageSplits) -> None:
    trainer = viewing(tiny_splits, _Viewing())
    (note,) = trainer.plan(13, verbose=False).notes
    found = trainer.fit(13).settings["execution"]
    assert found["memory_format"] == "contiguous"
    assert found["reason"].startswith("channels_last fails: view size is not compatible")
    assert note == f"execution: contiguous ({found['reason']})"


def test_a_model_that_cannot_be_copied_is_not_measured(tiny_splits: ImageSplits) -> None:
    network = _Viewing()
    network.lock = threading.Lock()  # type: ignore[assignment]
    trainer = viewing(tiny_splits, network)
    with pytest.raises(ConfigError, match="Pass `channels_last=False`"):
        trainer.fit(13)
    assert trainer.history.settings["execution"] == {
        "memory_format": "channels_last",
        "reason": "the model cannot be copied: cannot pickle '_thread.lock' object",
    }


def test_a_plan_shows_how_the_fit_will_run(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make()
    trainer.plan(13)
    assert re.search(r"^execution: \w+ \(measured: .+ for 4 pictures\)$", capsys.readouterr().out,
                     re.MULTILINE)  # fmt: skip
    trainer.plan(1)
    assert "execution: channels_last (too short to measure)\n" in capsys.readouterr().out
    trainer.plan(1, measure=False)
    assert "execution: the memory format is chosen as the fit starts\n" in capsys.readouterr().out
    make(channels_last=False).plan(1, measure=False)
    assert "execution: contiguous (given)\n" in capsys.readouterr().out


def test_the_state_of_an_optimizer_follows_the_layout(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    optimizer = torch.optim.Adam(model.parameters())
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    optimizer.step()
    model.to(memory_format=torch.channels_last)
    lay_out_state(optimizer)
    weight = next(each for each in model.parameters() if each.dim() == 4)
    assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()
    assert optimizer.state[weight]["exp_avg"].unique().numel() == 1


def test_a_network_that_refuses_noise_is_not_measured() -> None:
    def run(name: str, count: int) -> float:
        raise ValueError("no noise, please")

    found = pick_format(run, 8)
    assert (found.memory_format, found.reason) == (
        "channels_last",
        "cannot be measured: no noise, please",
    )
