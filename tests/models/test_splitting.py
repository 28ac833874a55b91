from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from transferkit.errors import ConfigError
from transferkit.images import Preprocess
from transferkit.models import BackboneSpec, Classifier, build_model
from transferkit.models.splitting import Split, split_backbone
from transferkit.models.stages import find_stages
from transferkit.models.torchvision_backbones import HEAD_PATHS, torchvision_names

QUICK = [
    "densenet121",
    "efficientnet_lite0",
    "mobilenet_v3_small",
    "resnet18",
    "squeezenet1_1",
    "timm:test_vit3",
]
SLOW = [
    "alexnet",
    "convnext_tiny",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "swin_t",
    "swin_v2_t",
    "timm:convnext_atto",
    "timm:mobilenetv3_small_050",
    "timm:regnetx_002",
    "timm:resnet18",
    "timm:swin_tiny_patch4_window7_224",
    "timm:vit_tiny_patch16_224",
    "timm:xception41",
    "vgg11_bn",
    "vit_b_32",
    "wide_resnet50_2",
]
"""One network of each family, at every stage: minutes in all."""

FIXED_SIZES = {
    "inception_v3": 75,
    "maxvit_t": 224,
    "timm:swin_tiny_patch4_window7_224": 224,
    "timm:test_vit3": 160,
    "timm:vit_tiny_patch16_224": 224,
    "vit_b_32": 224,
}


def make_model(name: str) -> Classifier:
    """Build a model for small images whose BatchNorm layers have seen something."""
    size = FIXED_SIZES.get(name, 64)
    preprocess = Preprocess(crop_size=size, resize_size=size)
    model = build_model(name, 2, weights=None, preprocess=preprocess)
    stir(model)
    return model


def stir(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.running_mean is not None
                assert layer.running_var is not None
                for tensor, low in ((layer.running_mean, -0.1), (layer.running_var, 0.5)):
                    tensor.copy_(low + 0.9 * torch.rand(tensor.shape, generator=generator))
                layer.weight.copy_(0.5 + torch.rand(layer.weight.shape, generator=generator))
                layer.bias.copy_(0.2 * torch.rand(layer.bias.shape, generator=generator))


def make_images(model: Classifier, count: int = 2) -> Tensor:
    size = model.preprocess.crop_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def step(model: Classifier, compute: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Return the loss, the gradients and the state after one pass in training mode."""
    model.train().zero_grad(set_to_none=True)
    torch.manual_seed(3)  # Dropout and stochastic depth.
    loss = F.cross_entropy(model.head(compute()), torch.tensor([0, 1]))
    loss.backward()  # type: ignore[no-untyped-call]
    found = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found, **model.state_dict()}


def restore(model: Classifier, state: dict[str, Tensor]) -> None:
    # Not `load_state_dict`: some networks want a module version there.
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(state[name])


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if torch.__version__.startswith("2.10."):
            # It multiplies matrices with other last bits where they lie elsewhere in memory.
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-8)
        else:
            assert torch.equal(found[name], value), name


def check_boundary(model: Classifier, number: int) -> None:
    """Check that the cut after so many stages changes nothing, in evaluation and training."""
    split = model.split(number)
    assert split is not None
    assert split.num_stages == number
    images = make_images(model)
    model.eval()
    with torch.inference_mode():
        activations = split.prefix(images)
        kept = activations.clone()
        features = model.features_from(activations, split)
        assert torch.equal(activations, kept)
        assert torch.equal(features, model.features(images))
    model.freeze(f"until:{model.stages[number - 1].name}")
    assert model.num_inert_stages == number
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = {
        name: value.clone() for name, value in step(model, lambda: model.features(images)).items()
    }
    restore(model, before)
    assert_equal(step(model, lambda: model.features_from(kept.clone(), split)), wanted)
    restore(model, before)
    model.freeze("none")


@pytest.mark.parametrize("name", QUICK)
def test_cuts_change_nothing(name: str) -> None:
    model = make_model(name)
    numbers = range(1, len(model.stages) + 1)
    for number in sorted({numbers[0], numbers[len(numbers) // 2], numbers[-2], numbers[-1]}):
        check_boundary(model, number)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK + SLOW)
def test_cuts_at_every_stage_change_nothing(name: str) -> None:
    model = make_model(name)
    for number in range(1, len(model.stages) + 1):
        check_boundary(model, number)


def test_tiny_network_is_cut_at_every_stage(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    stir(model)
    for number in (1, 2):
        check_boundary(model, number)


# What is cut, and where


def test_the_longest_inert_prefix_is_cut_off(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    assert model.split() is None
    for freeze, number in (("until:conv1", 1), ("until:layer1", 2), ("backbone", 2)):
        split = model.freeze(freeze).split()
        assert split is not None
        assert split.num_stages == number


def test_whole_backbone_is_its_own_prefix(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze="backbone")
    split = model.split()
    assert split is not None
    assert split.prefix is model.backbone
    features = torch.rand(2, 16)
    assert split.suffix(features) is features


def test_parts_share_the_modules_of_the_backbone(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    split = model.split(1)
    assert split is not None
    parts = [*split.prefix.parameters(), *split.suffix.parameters()]
    assert [id(each) for each in parts] == [id(each) for each in model.backbone.parameters()]


def test_cutting_leaves_the_model_as_it_is(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze="until:conv1")
    attributes = set(vars(model.backbone))
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    assert model.split() is not None
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert set(vars(model.backbone)) == attributes
    assert_equal(model.state_dict(), state)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "`num_stages` should be an integer of at least 1, found 0."),
        (-1, "`num_stages` should be an integer of at least 1, found -1."),
        (True, "`num_stages` should be an integer of at least 1, found True."),
        (3, "`num_stages` should be at most 2, the number of stages of the backbone, found 3."),
    ],
)
def test_number_of_stages_that_there_is_not_is_an_error(
    tiny_spec: BackboneSpec, number: int, words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        build_model(tiny_spec, 2, weights=None).split(number)
    assert str(error.value) == words


# What cannot be cut


class Chain(nn.Module):
    """Three layers of 4, with what a test does between the first and the second."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def between(self, values: Tensor) -> Any:
        return values

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.three(self.two(self.between(self.one(inputs))))
        return outputs


INPUTS = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))


def cut(network: nn.Module, *numbers: int) -> Split | None:
    return split_backbone(network, find_stages(network), numbers, INPUTS)


def check_cut(network: nn.Module, number: int = 1) -> None:
    split = cut(network, number)
    assert split is not None
    network.eval()
    activations = split.prefix(INPUTS)
    kept = activations.clone()
    assert torch.equal(split.suffix(activations), network(INPUTS))
    assert torch.equal(activations, kept)


def test_numbers_are_tried_in_their_order() -> None:
    class Skipping(Chain):
        def forward(self, inputs: Tensor) -> Tensor:
            early = self.one(inputs)
            outputs: Tensor = self.three(self.two(early) + early)
            return outputs

    for numbers, found in (((2, 1), 2), ((1, 2), 1), ((3, 1), 3)):
        split = cut(Skipping(), *numbers)
        assert split is not None
        assert split.num_stages == found


def test_two_tensors_across_a_cut_move_it_to_an_earlier_one() -> None:
    class Skipping(Chain):
        def forward(self, inputs: Tensor) -> Tensor:
            early = self.one(inputs)
            outputs: Tensor = self.three(self.two(early)) + early
            return outputs

    network = Skipping()
    assert cut(network, 2) is None
    split = cut(network, 2, 1)
    assert split is not None
    assert split.num_stages == 1
    check_cut(network, 1)


def test_images_across_a_cut_are_not_cut() -> None:
    class Remembering(Chain):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) + inputs

    assert cut(Remembering(), 2, 1) is None


def test_forward_pass_that_cannot_be_traced_is_not_cut() -> None:
    class Deciding(Chain):
        def between(self, values: Tensor) -> Tensor:
            return -values if values.sum() > 0 else values

    assert cut(Deciding(), 2, 1) is None
    assert cut(Deciding(), 3, 1) is not None


def test_course_that_differs_in_training_is_not_cut() -> None:
    class Dropping(Chain):
        def between(self, values: Tensor) -> Tensor:
            return F.dropout(values, 0.5, self.training)

    assert cut(Dropping().train(), 2, 1) is None
    assert cut(Dropping().eval(), 2, 1) is None


def test_more_outputs_in_training_are_not_cut() -> None:
    class Aiding(Chain):
        def forward(self, inputs: Tensor) -> Any:
            early = self.one(inputs)
            outputs = self.three(self.two(early))
            return (outputs, early) if self.training else outputs

    assert cut(Aiding().train(), 2, 1) is None
    assert cut(Aiding().eval(), 2, 1) is None


def test_noise_in_every_mode_is_not_cut() -> None:
    class Dropping(Chain):
        def between(self, values: Tensor) -> Tensor:
            return F.dropout(values, 0.5)

    assert cut(Dropping(), 2) is None


class Giving(nn.Linear):
    """Give what `change` makes of the outputs."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__(4, 4)
        self.change = change

    def forward(self, inputs: Tensor) -> Any:
        return self.change(super().forward(inputs))


class Taking(nn.Linear):
    """Take what `change` makes of the inputs."""

    def __init__(self, change: Callable[[Any], Tensor]) -> None:
        super().__init__(4, 4)
        self.change = change

    def forward(self, inputs: Any) -> Tensor:
        return super().forward(self.change(inputs))


@pytest.mark.parametrize(
    ("give", "take"),
    [
        (lambda values: [values, -values], lambda both: both[0] + 2 * both[1]),
        (lambda values: values.T, lambda values: values.T),
        (lambda values: values[None], lambda values: values[0]),
    ],
)
def test_what_is_no_tensor_with_an_entry_for_each_image_is_not_cut(
    give: Callable[[Tensor], Any], take: Callable[[Any], Tensor]
) -> None:
    network = nn.Sequential(Giving(give), Taking(take), nn.Linear(4, 4))
    assert cut(network, 1) is None
    check_cut(network, 2)


def test_constants_of_a_forward_pass_are_not_written_into_the_network() -> None:
    class Adding(Chain):
        def between(self, values: Tensor) -> Tensor:
            return values + torch.ones(4)

    network = Adding()
    attributes = set(vars(network))
    assert cut(network, 2, 1) is None
    assert set(vars(network)) == attributes


def test_hook_on_the_whole_network_is_not_cut() -> None:
    network = Chain()
    network.register_forward_hook(lambda module, inputs, outputs: 2 * outputs)
    assert cut(network, 2, 1) is None


# What can


def test_buffers_are_read_when_the_parts_run() -> None:
    class Shifting(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.zeros(4))

        def between(self, values: Tensor) -> Tensor:
            return values + self.get_buffer("shift") * 2

    network = Shifting().eval()
    for number in (1, 2):
        split = cut(network, number)
        assert split is not None
        network.get_buffer("shift").fill_(float(number))
        assert torch.equal(split.suffix(split.prefix(INPUTS)), network(INPUTS))


@pytest.mark.parametrize(
    "act", [F.relu_, lambda values: values.add_(1), lambda values: values.mul_(2).exp()]
)
def test_suffix_that_works_in_place_leaves_activations_alone(
    act: Callable[[Tensor], Tensor],
) -> None:
    class InPlace(Chain):
        def forward(self, inputs: Tensor) -> Tensor:
            values = self.one(inputs)
            outputs: Tensor = self.three(self.two(act(values)))
            return outputs

    network = InPlace()
    check_cut(network, 1)

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.layer(act(inputs))
            return outputs

    check_cut(nn.Sequential(nn.Linear(4, 4), Module()), 1)


def test_work_in_place_whose_result_is_not_used_is_kept() -> None:
    class InPlace(Chain):
        def between(self, values: Tensor) -> Tensor:
            values.add_(1)
            return values

    for number in (1, 2):
        check_cut(InPlace(), number)


def test_further_arguments_keep_their_defaults() -> None:
    class Masking(Chain):
        def forward(self, inputs: Tensor, mask: Tensor | None = None, factor: int = 2) -> Tensor:
            values = self.two(self.one(inputs))
            if mask is not None:
                values = values * mask
            outputs: Tensor = self.three(values) * factor
            return outputs

    for number in (1, 2):
        check_cut(Masking(), number)


def test_parameters_outside_of_modules_are_cut_with_their_stage() -> None:
    class Token(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.rand(4))

        def between(self, values: Tensor) -> Tensor:
            return values + self.token.expand(values.shape[0], -1)

    for number in (1, 2):
        split = cut(Token(), number)
        assert split is not None
        check_cut(Token(), number)


def test_frozen_stage_that_runs_again_later_is_in_both_parts() -> None:
    class Again(Chain):
        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.three(self.one(self.two(self.one(inputs))))
            return outputs

    for number in (1, 2):
        check_cut(Again(), number)


# Backbones without stages


class Bare(nn.Module):
    """A backbone with a parameter of its own and no stages."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.drop = nn.Dropout()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.drop(images.mean(dim=(2, 3)) * self.scale)
        return features


def test_backbone_without_stages_is_all_prefix_or_none() -> None:
    model = build_model(Bare(), 2, num_features=3)
    assert model.stages == ()
    assert model.split() is None
    split = model.freeze("backbone").split()
    assert split is not None
    assert split.prefix is model.backbone
    assert split.num_stages == 0
    with pytest.raises(ConfigError) as error:
        model.split(1)
    assert str(error.value) == (
        "`num_stages` should be at most 0, the number of stages of the backbone, found 1."
    )


def test_backbone_without_parameters_is_not_inert_since_nothing_pins_it() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout())
    model = build_model(network, 2, num_features=3 * 224 * 224)
    assert model.split() is None


def test_activations_of_each_image_are_its_own() -> None:
    model = make_model("resnet18")
    model.freeze("until:layer2").train()
    split = model.split()
    assert split is not None
    images = make_images(model, 3)
    with torch.no_grad():
        together = split.prefix(images)
        alone = torch.cat([split.prefix(image[None]) for image in images])
    assert together.shape == (3, 128, 8, 8)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_registered_families_are_all_swept() -> None:
    swept = {name for name in QUICK + SLOW if not name.startswith("timm:")}
    for family in HEAD_PATHS:
        own = {name for name in torchvision_names() if name.startswith(family)}
        assert own & swept, family
