from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transferkit.data.workers import start_threads
from transferkit.errors import BackboneError, ConfigError, MissingDependencyError
from transferkit.inference.engine_choice import check_choice_of_engine
from transferkit.inference.lanes import run_in_lanes
from transferkit.models import build_model, engine_facts, engines
from transferkit.models.engines import (
    choose_batch_size,
    count_cores,
    count_lanes,
    find_batch_size,
    make_engine,
)

CPU = torch.device("cpu")
ENGINES = ["pytorch", "openvino", "onnxruntime"]
CONVERTING = [("openvino", "OpenVINO"), ("onnxruntime", "ONNX Runtime")]


def make_network() -> nn.Sequential:
    """Return a small network in training mode, with dropout and a moving BatchNorm."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    network = nn.Sequential(*layers, nn.Dropout(0.5), nn.Conv2d(8, 6, 3))
    network(torch.randn(16, 3, 12, 12))
    return network


def noise(count: int = 3, size: int = 12) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def evaluate(network: nn.Module, images: Tensor) -> Tensor:
    """Return what the network computes in eval mode."""
    with torch.no_grad():
        outputs: Tensor = copy.deepcopy(network).eval()(images)
    return outputs


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.fixture(params=ENGINES)
def engine_name(request: pytest.FixtureRequest) -> Any:
    if request.param != "pytorch":
        pytest.importorskip(request.param)
    return request.param


@pytest.fixture(params=CONVERTING, ids=lambda param: param[0])
def converting(request: pytest.FixtureRequest) -> Any:
    """An engine that converts, with the name of its library."""
    pytest.importorskip(request.param[0])
    return request.param


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that says it has bfloat16."""
    monkeypatch.setattr(engine_facts, "cpu_capabilities", lambda: {"avx512_bf16": True})


def test_engines_compute_what_the_network_does_in_eval_mode(engine_name: Any) -> None:
    network = make_network()
    engine = make_engine(network, engine=engine_name, device=CPU)
    for images in (noise(), noise(1), noise(7), noise(2, size=16)):
        assert_close(engine(images), evaluate(network, images))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121"])
def test_engines_run_backbones_of_torchvision(name: str, engine_name: Any) -> None:
    network = build_model(name, 2, weights=None).eval().backbone
    engine = make_engine(network, engine=engine_name, device=CPU)
    assert_close(engine(noise(size=64)), evaluate(network, noise(size=64)))


def test_engines_run_a_vision_transformer(engine_name: Any) -> None:
    from torchvision.models import VisionTransformer

    network = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32
    )
    nn.init.normal_(network.heads.get_submodule("head").weight)
    engine = make_engine(network, engine=engine_name, device=CPU)
    assert_close(engine(noise(size=32)), evaluate(network, noise(size=32)))


def test_engines_run_prefixes_of_efficientnet_lite0(engine_name: Any) -> None:
    pytest.importorskip("timm")
    model = build_model("efficientnet_lite0", 2, weights=None).eval()
    split = model.split(3)
    assert split is not None
    for prefix in (model.backbone, split.prefix):
        engine = make_engine(prefix, engine=engine_name, device=CPU)
        assert_close(engine(noise(size=64)), evaluate(prefix, noise(size=64)))


def test_network_stays_as_it_was(engine_name: Any) -> None:
    network = make_network()
    network[0].bias.requires_grad_(False)
    before, modules = copy.deepcopy(network.state_dict()), list(network.modules())
    strides = [each.stride() for each in network.parameters()]
    engine = make_engine(network, engine=engine_name, device=CPU)
    engine(noise())
    assert list(network.modules()) == modules
    assert all(module.training for module in modules)
    assert [each.stride() for each in network.parameters()] == strides
    assert [each.requires_grad for each in network.parameters()] == [True, False] + [True] * 4
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def test_engine_keeps_the_weights_of_its_beginning(engine_name: Any) -> None:
    network = make_network()
    engine = make_engine(network, engine=engine_name, device=CPU)
    expected = evaluate(network, noise())
    nn.init.zeros_(network.get_parameter("4.weight"))
    assert_close(engine(noise()), expected)


def test_images_and_random_state_stay_as_they_were(engine_name: Any) -> None:
    images = noise()
    before, state = images.clone(), torch.get_rng_state()
    engine = make_engine(make_network(), engine=engine_name, device=CPU)
    torch.set_rng_state(state)
    engine(images)
    find_batch_size(engine, (3, 12, 12))
    assert torch.equal(images, before)
    assert images.is_contiguous()
    assert torch.equal(torch.get_rng_state(), state)


def test_outputs_can_be_trained_on(engine_name: Any) -> None:
    engine = make_engine(make_network(), engine=engine_name, device=CPU)
    outputs = engine(noise().requires_grad_())
    assert not outputs.requires_grad
    layer = nn.Conv2d(6, 1, 1)
    layer(outputs).sum().backward()
    assert layer.weight.grad is not None


def test_later_calls_leave_earlier_outputs_alone(engine_name: Any) -> None:
    engine = make_engine(make_network(), engine=engine_name, device=CPU)
    first = engine(noise())
    before = first.clone()
    engine(-noise())
    assert torch.equal(first, before)


def test_an_outer_autocast_does_not_lower_the_precision(engine_name: Any) -> None:
    network = make_network()
    engine = make_engine(network, engine=engine_name, device=CPU)
    with torch.autocast("cpu", torch.bfloat16):
        found = engine(noise())
    assert_close(found, evaluate(network, noise()))


def test_engines_say_nothing(
    engine_name: Any, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        make_engine(make_network(), engine=engine_name, device=CPU)(noise())
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


def test_description_is_plain_data(engine_name: Any) -> None:
    found = make_engine(make_network(), engine=engine_name, device=CPU).describe()
    assert json.loads(json.dumps(found)) == found
    assert found["engine"] == engine_name
    assert found["precision"] == "float32"
    assert found["engine_version"]
    assert found["processor"] == engine_facts.describe_processor(CPU)


def test_description_tells_how_pytorch_computes() -> None:
    network = nn.Sequential(make_network(), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6))
    found = make_engine(network, device=CPU).describe()
    assert found["memory_format"] == "channels_last"
    assert (found["num_folded"], found["num_kept"]) == (2, 1)
    assert found["float32"] == "none none"


def test_description_follows_the_setting_of_matrix_products() -> None:
    engine = make_engine(make_network(), device=CPU)
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        assert engine.describe()["float32"].endswith(" tf32")
    finally:
        settings.fp32_precision = before


class Noting(nn.Module):
    """A network that keeps what it sees, and would mix it up if two threads ran it at a time."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen = torch.zeros(())
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.threads: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        self.threads.append(torch.get_num_threads())
        outputs: Tensor = self.inner(images)
        assert self.seen is images
        return outputs


def test_lanes_of_pytorch_have_modules_of_their_own_and_one_core() -> None:
    network = Noting(make_network())
    images = [noise(number % 4 + 1) for number in range(40)]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        engine = make_engine(network, device=CPU, num_lanes=3)
    finally:
        torch.set_num_threads(before)
    assert count_lanes(engine) == 3
    with start_threads(3) as pool:
        found = list(pool.map(engine, images))
    for one, expected in zip(found, images, strict=True):
        assert_close(one, evaluate(network, expected))
    lanes: Any = [engine._networks.get() for _ in range(3)]  # type: ignore[attr-defined]
    threads = [number for each in lanes for number in each.threads]
    assert threads == [1] * (len(images) + 1)  # One for the comparison.
    assert len({id(each.inner[0].weight) for each in lanes}) == 1
    assert len({id(each.count) for each in lanes}) == 3


def test_lanes_of_pytorch_share_the_cores() -> None:
    network = Noting(make_network())
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        engine = make_engine(network, device=CPU, num_lanes=2)
        engine(noise())
        lanes = {"num_lanes": count_lanes(engine), "cores_each": count_cores(engine)}
        assert lanes == {"num_lanes": 2, "cores_each": 2}
        outputs = list(run_in_lanes(iter([noise()] * 4), engine, **lanes))
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(before)
    assert len(outputs) == 4
    networks: Any = [engine._networks.get() for _ in range(2)]  # type: ignore[attr-defined]
    assert [number for each in networks for number in each.threads] == [2] * 6


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_call_outside_of_a_lane_has_the_bits_of_one_in_it(num_threads: int) -> None:
    network = build_model("resnet18", 2, weights=None).eval().backbone
    engine = make_engine(network, device=CPU, num_lanes=2)
    with start_threads(1) as pool:
        expected = pool.submit(engine, noise(size=64)).result()
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        found = engine(noise(size=64))
        assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, expected)


class Tapped(nn.Module):
    """A network whose forward pass asks its layers for their classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = make_network()

    def forward(self, images: Tensor) -> Tensor:
        outputs, taps = images, []
        for layer in self.layers:
            outputs = layer(outputs)
            if isinstance(layer, (nn.ReLU, nn.BatchNorm2d)):
                taps.append(outputs.mean(dim=(1, 2, 3), keepdim=True))
        return outputs + torch.stack(taps).sum(0)


class Listed(nn.Module):
    """A network that also keeps its layers where no engine looks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = make_network()
        self.order = list(self.layers)

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.order:
            images = layer(images)
        return images


@pytest.mark.parametrize("make", [Tapped, Listed])
@pytest.mark.parametrize("num_lanes", [1, 2])
def test_a_network_that_fewer_layers_change_runs_as_it_is(
    make: Callable[[], nn.Module], num_lanes: int
) -> None:
    network = make()
    engine = make_engine(network, device=CPU, num_lanes=num_lanes)
    assert engine.describe()["num_folded"] == 1
    for images in (noise(), noise(1), noise(5)):
        assert_close(engine(images), evaluate(network, images))


def test_a_network_that_gives_no_numbers_gives_none() -> None:
    network = make_network()
    nn.init.constant_(network.get_parameter("0.weight"), float("nan"))
    network.append(nn.Conv2d(6, 2, 1)).append(nn.ReLU())
    engine = make_engine(network, device=CPU)
    assert engine(noise()).isnan().all()


def test_an_engine_is_made_while_others_compute() -> None:
    network = build_model("squeezenet1_1", 2, weights=None).eval()
    images, is_over = noise(1, size=64), threading.Event()
    with torch.no_grad():
        expected = network(images)

    def compute() -> int:
        number = 0
        with torch.no_grad():
            while not is_over.is_set() or not number:
                assert torch.equal(network(images), expected)
                number += 1
        return number

    def make() -> None:
        other = copy.deepcopy(network.backbone)
        assert_close(make_engine(other, device=CPU)(images), evaluate(other, images))

    call = nn.Module.__call__
    with start_threads(4) as pool:
        computing = [pool.submit(compute) for _ in range(2)]
        try:
            for each in [pool.submit(make) for _ in range(6)]:
                each.result()
        finally:
            is_over.set()
        assert all(each.result() for each in computing)
    assert nn.Module.__call__ is call


def test_names_of_precisions_are_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_facts, "cpu_capabilities", dict)
    for engine, message in (
        (
            "onnxruntime",
            'engine="onnxruntime" computes in float32, found precision="bf16". Take '
            'precision="fp32", or another engine.',
        ),
        (
            "auto",
            'precision="bf16" needs a processor with instructions for it (AVX512-BF16, AMX or Arm '
            "BF16; a GPU from compute capability 8.0 on), which `cpu` of this machine lacks: "
            "imitating them would be up to hundreds of times slower. Take "
            'precision="fp32".',
        ),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            check_choice_of_engine(engine, "bf16", CPU)


@pytest.mark.parametrize("num_lanes", [1, 2])
def test_an_engine_whose_first_call_was_interrupted_goes_on(num_lanes: int) -> None:
    network = Noting(make_network())
    engine = make_engine(network, device=CPU, num_lanes=num_lanes)
    calls = iter(range(2))

    def interrupt(*_: Any) -> None:
        if next(calls, None) == 1:  # The one of the network with fewer layers.
            raise KeyboardInterrupt

    with start_threads(1) as pool:  # As a lane is.
        handle = nn.modules.module.register_module_forward_pre_hook(
            lambda module, _: interrupt() if isinstance(module, Noting) else None
        )
        try:
            with pytest.raises(KeyboardInterrupt):
                pool.submit(engine, noise()).result()
        finally:
            handle.remove()
        found = [pool.submit(engine, noise()).result(timeout=60) for _ in range(3)]
    for each in found:
        assert_close(each, evaluate(network, noise()))


class Switch(nn.Module):
    """A network whose forward pass depends on the values of the images."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.inner(images)
        return outputs if images.sum() == 0 else outputs + 1


def test_pytorch_runs_what_cannot_be_traced() -> None:
    network = Switch(make_network())
    engine = make_engine(network, device=CPU)
    assert engine.describe()["num_folded"] == 1
    for images in (noise(), torch.zeros(2, 3, 12, 12)):
        assert_close(engine(images), evaluate(network, images))


def test_what_a_conversion_would_change_is_refused(converting: Any) -> None:
    engine, library = converting
    network = Switch(nn.Conv2d(3, 1, 1, bias=False))
    nn.init.constant_(network.inner.weight, 0.0)  # type: ignore[arg-type]
    message = (
        f"The network gives other values in {library} than in PyTorch: relative to the largest "
        "they differ by 1, allowed are 0.0001. Its forward pass may depend on the values or the "
        'number of images. Take engine="pytorch".'
    )
    with pytest.raises(BackboneError, match=f"^{re.escape(message)}$"):
        make_engine(network, engine=engine, device=CPU)(noise())


class Nothing(nn.Module):
    """Gives what is no number."""

    def forward(self, images: Tensor) -> Tensor:
        return images * float("nan")


def test_values_that_are_no_numbers_agree_with_nothing(converting: Any) -> None:
    engine, library = converting
    message = f"The network gives other values in {library} than in PyTorch: relative to the "
    with pytest.raises(BackboneError, match=f"^{message}largest they differ by nan, "):
        make_engine(Nothing(), engine=engine, device=CPU)(noise())


class Unconvertible(nn.Module):
    """Calls an operator that no other library knows."""

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = torch.special.bessel_j0(images)
        return outputs


REASONS = {
    "openvino": "No conversion rule found for operations: aten::special_bessel_j0",
    "onnxruntime": "Exporting the operator 'aten::special_bessel_j0' to ONNX opset version 18 is "
    "not supported",
}


def test_what_cannot_be_converted_is_named(
    converting: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    engine, library = converting
    message = (
        f"{library} cannot convert the network for images of the shape (3, 12, 12): "
        f'{REASONS[engine]}. Take engine="pytorch".'
    )
    with pytest.raises(BackboneError, match=f"^{re.escape(message)}$"):
        make_engine(Unconvertible(), engine=engine, device=CPU)(noise())
    assert capfd.readouterr() == ("", "")


class Pair(nn.Module):
    """Gives two tensors."""

    def forward(self, images: Tensor) -> Any:
        return images, images


class Sum(nn.Module):
    """Gives one number for all images."""

    def forward(self, images: Tensor) -> Tensor:
        return images.sum(dim=(0, 2, 3))[:2]


@pytest.mark.parametrize(
    # The first two images are looked at by themselves.
    ("network", "count", "found"),
    [(Pair(), 2, "tuple"), (Sum(), 3, "the shape (2,)")],
)
def test_networks_give_one_tensor_with_a_row_for_each_image(
    network: nn.Module, count: int, found: str
) -> None:
    message = (
        f"The network should give one tensor with a row for each of {count} images, found {found}."
    )
    with pytest.raises(BackboneError, match=f"^{re.escape(message)}$"):
        make_engine(network, device=CPU)(noise())


def test_conversions_are_of_one_tensor_too(converting: Any) -> None:
    message = "The network should give one tensor with a row for each of 2 images, found tuple."
    with pytest.raises(BackboneError, match=f"^{re.escape(message)}$"):
        make_engine(Pair(), engine=converting[0], device=CPU)(noise())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"engine": "onnx"},
            '`engine` should be "pytorch", "openvino" or "onnxruntime", found \'onnx\'.',
        ),
        (
            {"precision": "float16"},
            '`precision` should be "float32" or "bfloat16", found \'float16\'.',
        ),
        (
            {"engine": "openvino", "device": torch.device("cuda:0")},
            'engine="openvino" runs on the CPU, the model is on `cuda:0`. Move it to the CPU, or '
            'take engine="pytorch".',
        ),
        (
            {"engine": "onnxruntime", "device": torch.device("cuda:0")},
            'engine="onnxruntime" runs on the CPU, the model is on `cuda:0`. Move it to the CPU, '
            'or take engine="pytorch".',
        ),
        (
            {"engine": "onnxruntime", "precision": "bfloat16"},
            'engine="onnxruntime" computes in float32, found precision="bfloat16". Take '
            'precision="float32", or another engine.',
        ),
    ],
)
def test_engines_that_there_are_not(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make_engine(make_network(), **{"device": CPU, **options})


@pytest.mark.parametrize("engine", ["pytorch", "openvino"])
def test_bfloat16_needs_a_processor_that_has_it(
    monkeypatch: pytest.MonkeyPatch, engine: Any
) -> None:
    monkeypatch.setattr(engine_facts, "cpu_capabilities", lambda: {"avx2": True})
    message = (
        'precision="bfloat16" needs a processor with instructions for it (AVX512-BF16, AMX or Arm '
        "BF16; a GPU from compute capability 8.0 on), which `cpu` of this machine lacks: imitating "
        'them would be up to hundreds of times slower. Take precision="float32".'
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make_engine(make_network(), engine=engine, precision="bfloat16", device=CPU)


@pytest.mark.usefixtures("bfloat16")
def test_bfloat16_is_coarser_and_said() -> None:
    network = make_network()
    engine = make_engine(network, precision="bfloat16", device=CPU)
    found, expected = engine(noise()), evaluate(network, noise())
    assert_close(found, expected, tolerance=0.05)
    assert not torch.allclose(found, expected, rtol=1e-4)
    assert engine.describe()["precision"] == "bfloat16"


@pytest.mark.parametrize(
    ("engine", "package", "extra"),
    [
        ("openvino", "openvino", "openvino"),
        ("onnxruntime", "onnx", "onnx"),
        ("onnxruntime", "onnxruntime", "onnx"),
    ],
)
def test_engines_that_are_not_installed(
    monkeypatch: pytest.MonkeyPatch, engine: Any, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = (
        f'engine="{engine}" needs `{package}`, which is not installed: pip install '
        f'"transferkit[{extra}]"'
    )
    with pytest.raises(MissingDependencyError, match=f"^{re.escape(message)}$"):
        make_engine(make_network(), engine=engine, device=CPU)


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16", "sve_bf16"])
def test_processors_with_bfloat16(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(engine_facts, "cpu_capabilities", lambda: {name: True})
    assert engine_facts.has_bfloat16(CPU) is True
    monkeypatch.setattr(engine_facts, "cpu_capabilities", lambda: {name: False})
    assert engine_facts.has_bfloat16(CPU) is False


@pytest.mark.parametrize("has", [True, False])
def test_gpus_with_bfloat16(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: has)
    assert engine_facts.has_bfloat16(torch.device("cuda")) is has


def test_processor_is_asked_where_pytorch_does_not_know(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    facts = tmp_path / "cpuinfo"
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(engine_facts, "_CPU_FACTS", facts)
    assert engine_facts.has_bfloat16(CPU) is False
    facts.write_text("processor : 0\nflags : fpu avx2 avx512_bf16 amx_tile\n")
    assert engine_facts.has_bfloat16(CPU) is True
    facts.write_text("processor : 0\nflags : fpu avx2 avx512_bf16x\n")
    assert engine_facts.has_bfloat16(CPU) is False


class Clocked:
    """An engine that takes so many seconds for a batch, by a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> None:
        self.now, self.seconds, self.sizes = 0.0, seconds, list[int]()
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def __call__(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (3, 4, 5)
        self.sizes.append(len(images))
        self.now += self.seconds[len(images)]
        return images

    def describe(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("seconds", "best", "tried"),
    [
        ({8: 0.08, 16: 0.12, 32: 0.20, 64: 0.36}, 64, {8, 16, 32, 64}),
        ({8: 0.08, 16: 0.12, 32: 0.25}, 16, {8, 16, 32}),
        ({8: 0.08, 16: 0.159}, 8, {8, 16}),  # A gain of less than 2 % is none.
        ({8: 0.30, 16: 0.58}, 16, {8, 16}),  # After 2 seconds no other is tried.
        ({8: 1.0}, 8, {8}),
    ],
)
def test_batch_size_that_is_fastest(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], best: int, tried: set[int]
) -> None:
    engine = Clocked(monkeypatch, seconds)
    assert find_batch_size(engine, (3, 4, 5)) == best
    assert set(engine.sizes) == tried


def test_batch_size_is_tried_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Clocked(monkeypatch, {8: 0.08, 16: 0.159})
    shape = (3, 4, 5)
    cuda = torch.device("cuda")
    assert choose_batch_size(engine, shape, num_images=1999, device=CPU) == 32
    assert engine.sizes == []
    assert choose_batch_size(engine, shape, num_images=2000, device=CPU) == 8
    assert choose_batch_size(engine, shape, num_images=10, device=cuda) == 8


@pytest.mark.parametrize(("name", "size"), [("openvino", 8), ("onnxruntime", 16)])
def test_batch_size_of_few_images_in_other_libraries(name: Any, size: int) -> None:
    pytest.importorskip(name)
    engine = make_engine(make_network(), engine=name, device=CPU)
    assert choose_batch_size(engine, (3, 12, 12), num_images=1999, device=CPU) == size


@pytest.mark.parametrize("count", [1, 2])
def test_threads_of_onnx_runtime_are_those_of_pytorch(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    opened = []

    class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, model: Any, options: Any, **others: Any) -> None:
            opened.append(options.intra_op_num_threads)
            super().__init__(model, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    engine = make_engine(make_network(), engine="onnxruntime", device=CPU)
    for images in (noise(), noise(5), noise(size=16), noise(1)):
        engine(images)
    assert opened == [count, count]  # One for each size of images.


def test_batch_sizes_are_multiples_of_the_first() -> None:
    assert all(size % engines.BATCH_SIZES[0] == 0 for size in engines.BATCH_SIZES)


def test_signals_arrive_after_engines_that_ended() -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    program = """
import faulthandler, os, signal
import torch
from transferkit.models.engines import make_engine

faulthandler.enable()  # As pytest does: it sets the stack that OpenVINO replaces.
engines = [
    make_engine(torch.nn.Conv2d(3, 4, 3), engine="openvino", precision="float32",
                device=torch.device("cpu"))
    for _ in range(2)
]
for engine in engines:
    engine(torch.zeros(1, 3, 8, 8))
del engine
while engines:
    del engines[0]
signal.signal(signal.SIGTERM, lambda *_: print("arrived"))
os.kill(os.getpid(), signal.SIGTERM)
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, "arrived\n"), result.stderr
