from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from transferkit.errors import BackboneError, FreezeError, UnknownNameError
from transferkit.models import BackboneSpec, build_model, get_backbone
from transferkit.models.stages import Stage, find_stage, find_stages
from transferkit.models.torchvision_backbones import HEAD_PATHS, STAGE_PARENTS, torchvision_names

SMALLEST = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_lite0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "timm:convnext_atto",
    "timm:mobilenetv3_small_050",
    "timm:regnetx_002",
    "timm:resnet18",
]
"""A small network of each family that takes 96 pixels, and some of timm."""

LARGER = [
    "maxvit_t",
    "vgg11_bn",
    "vit_b_32",
    "timm:swin_tiny_patch4_window7_224",
    "timm:vit_tiny_patch16_224",
]
"""Networks with more parameters, or for large images alone."""


class Scale(nn.Module):
    """A parameter and no module."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale


def names_and_modules(network: nn.Module, *parents: str) -> list[tuple[str, tuple[str, ...]]]:
    return [(stage.name, stage.modules) for stage in find_stages(network, parents)]


# What belongs to what


def test_modules_without_weights_belong_to_the_stage_before() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)
    )
    assert names_and_modules(network) == [("0", ("0", "1", "2", "3")), ("4", ("4",))]


def test_dropout_and_what_follows_it_belong_to_the_stage_after() -> None:
    network = nn.Sequential(
        nn.Linear(4, 4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 4)
    )
    assert names_and_modules(network) == [("0", ("0", "1")), ("5", ("2", "3", "4", "5"))]


def test_dropout_within_a_module_without_weights_counts() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Dropout()), Scale())
    assert names_and_modules(network) == [("0", ("0",)), ("2", ("1", "2"))]


def test_normalisation_that_holds_dropout_belongs_to_the_stage_before() -> None:
    class NormAndDrop(nn.BatchNorm1d):
        def __init__(self) -> None:
            super().__init__(4)
            self.drop = nn.Dropout()

    network = nn.Sequential(nn.Linear(4, 4), NormAndDrop(), nn.Linear(4, 4))
    assert names_and_modules(network) == [("0", ("0", "1")), ("2", ("2",))]


def test_dropout_at_the_end_belongs_to_the_last_stage() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(), nn.Flatten())
    assert names_and_modules(network) == [("0", ("0",)), ("1", ("1", "2", "3"))]


def test_what_comes_first_belongs_to_the_first_stage() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    assert names_and_modules(network) == [("1", ("0", "1"))]


def test_normalisation_that_comes_first_is_a_stage() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3))
    assert names_and_modules(network) == [("0", ("0", "1")), ("2", ("2",))]


def test_children_of_parents_are_stages_at_any_depth() -> None:
    block: OrderedDict[str, nn.Module] = OrderedDict(one=nn.Linear(4, 4), two=nn.Linear(4, 4))
    network = nn.Sequential(
        OrderedDict(
            stem=nn.Linear(4, 4), body=nn.Sequential(OrderedDict(blocks=nn.Sequential(block)))
        )
    )
    assert [name for name, _ in names_and_modules(network)] == ["stem", "body"]
    assert [name for name, _ in names_and_modules(network, "body")] == ["stem", "body.blocks"]
    deep = ["stem", "body.blocks.one", "body.blocks.two"]
    assert [name for name, _ in names_and_modules(network, "body", "body.blocks")] == deep
    assert [name for name, _ in names_and_modules(network, "body.blocks")] == deep


def test_parameters_outside_of_modules_belong_to_the_first_stage() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    network.token = nn.Parameter(torch.zeros(4))
    network[1].position = nn.Parameter(torch.zeros(4))
    first, second = find_stages(network, ["1"])
    assert first == Stage("0", ("0",), ("token", "1.position"))
    assert second == Stage("1.0", ("1.0",))
    assert [first.holds(name) for name in ("token", "1.position", "0.bias", "1.0.bias")] == [
        True,
        True,
        True,
        False,
    ]


def test_a_stage_holds_no_module_whose_name_only_begins_like_its_own() -> None:
    stage = Stage("layer1", ("layer1",))
    assert stage.holds("layer1")
    assert stage.holds("layer1.0.weight")
    assert not stage.holds("layer10.weight")


def test_backbone_without_parameters_has_no_stages() -> None:
    assert find_stages(nn.Sequential(nn.Flatten(), nn.Dropout())) == ()


def test_parameters_of_the_backbone_alone_are_no_stage() -> None:
    assert find_stages(Scale()) == ()


def test_unknown_parent_is_an_error() -> None:
    with pytest.raises(BackboneError) as error:
        find_stages(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), ["layers"])
    assert str(error.value) == (
        "The backbone has no module `layers`, whose children should be stages. "
        "Its children are: 0, 1."
    )


# Finding one by its name


def test_stage_is_found_by_its_name() -> None:
    stages = find_stages(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert [find_stage(stages, name) for name in ("0", "1")] == [0, 1]


def test_nearest_name_of_a_stage_is_suggested() -> None:
    stages = [Stage(name, (name,)) for name in ("conv1", "layer1", "layer2")]
    with pytest.raises(UnknownNameError) as error:
        find_stage(stages, "layr2")
    assert str(error.value) == (
        "Unknown stage `layr2`. Did you mean `layer2`? "
        "`[stage.name for stage in model.stages]` names all 3."
    )


def test_backbone_without_stages_has_no_stage_of_any_name() -> None:
    with pytest.raises(FreezeError) as error:
        find_stage((), "layer1")
    assert str(error.value) == "There is no stage `layer1`: the backbone has no stages."


# Those of backbones


def test_stages_are_those_of_the_network(tiny_spec: BackboneSpec) -> None:
    assert build_model(tiny_spec, 2, weights=None).stages == (
        Stage("conv1", ("conv1", "bn1")),
        Stage("layer1", ("layer1", "drop", "fc")),
    )


def test_own_network_has_its_children_for_stages() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.ReLU(), nn.Linear(4, 4))
    model = build_model(network, 2, num_features=4)
    assert [stage.name for stage in model.stages] == ["1", "3"]


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("resnet18", ["conv1", "layer1", "layer2", "layer3", "layer4"]),
        ("timm:resnet18", ["conv1", "layer1", "layer2", "layer3", "layer4"]),
        ("shufflenet_v2_x0_5", ["conv1", "stage2", "stage3", "stage4", "conv5"]),
        ("efficientnet_lite0", ["conv_stem", *(f"blocks.{i}" for i in range(7)), "conv_head"]),
        ("mobilenet_v3_small", [*(f"features.{i}" for i in range(13)), "classifier.0"]),
        ("convnext_tiny", [f"features.{i}" for i in range(8)]),
        ("regnet_y_400mf", ["stem", *(f"trunk_output.block{i}" for i in range(1, 5))]),
        (
            "densenet121",
            [
                "features.conv0",
                *(
                    f"features.{kind}{i}"
                    for i in (1, 2, 3)
                    for kind in ("denseblock", "transition")
                ),
                "features.denseblock4",
            ],
        ),
        (
            "alexnet",
            [*(f"features.{i}" for i in (0, 3, 6, 8, 10)), "classifier.1", "classifier.4"],
        ),
        (
            "vit_b_32",
            ["conv_proj", *(f"encoder.layers.encoder_layer_{i}" for i in range(12))],
        ),
        ("timm:vit_tiny_patch16_224", ["patch_embed", *(f"blocks.{i}" for i in range(12))]),
        ("timm:convnext_atto", ["stem", *(f"stages.{i}" for i in range(4))]),
        (
            "timm:mobilenetv3_small_050",
            ["conv_stem", *(f"blocks.{i}" for i in range(6)), "conv_head"],
        ),
    ],
)
def test_names_of_stages(name: str, names: list[str]) -> None:
    spec = get_backbone(name)
    assert [stage.name for stage in spec.find_stages(spec.build_features()[0])] == names


def test_positions_and_tokens_of_a_transformer_belong_to_its_first_stage() -> None:
    spec = get_backbone("vit_b_32")
    stages = spec.find_stages(spec.build_features()[0])
    assert stages[0] == Stage("conv_proj", ("conv_proj",), ("class_token", "encoder.pos_embedding"))
    last = "encoder.layers.encoder_layer_11"
    assert stages[-1] == Stage(last, (last, "encoder.ln", "heads"))


def test_parents_are_given_for_families_that_there_are() -> None:
    assert all(
        any(name.startswith(family) for name in torchvision_names()) for family in STAGE_PARENTS
    )
    assert {"googlenet", "inception", "resnet", "resnext", "shufflenet", "wide_resnet"} == {
        family
        for family in HEAD_PATHS
        if not any(family.startswith(each) for each in STAGE_PARENTS)
    }


def check_partition(network: nn.Module, stages: tuple[Stage, ...]) -> None:
    for name, _ in network.named_parameters():
        assert sum(stage.holds(name) for stage in stages) == 1, name
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    assert all(stage.name in stage.modules for stage in stages)


def check_order(network: nn.Module, stages: tuple[Stage, ...], size: int) -> None:
    """Check that each stage has ended when the next one begins."""
    runs: list[int] = []
    for number, stage in enumerate(stages):
        for path in stage.modules:
            for module in network.get_submodule(path).modules():
                if next(module.parameters(recurse=False), None) is not None:
                    module.register_forward_pre_hook(lambda *_, number=number: runs.append(number))
    with torch.inference_mode():
        network.eval()(torch.zeros(1, 3, size, size))
    assert runs == sorted(runs)
    assert set(runs) == set(range(len(stages)))


@pytest.mark.parametrize("name", SMALLEST)
def test_stages_share_out_the_parameters_and_run_one_after_the_other(name: str) -> None:
    spec = get_backbone(name)
    network = spec.build_features()[0]
    stages = spec.find_stages(network)
    check_partition(network, stages)
    check_order(network, stages, 96)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER)
def test_stages_of_larger_networks_run_one_after_the_other(name: str) -> None:
    spec = get_backbone(name)
    network = spec.build_features()[0]
    stages = spec.find_stages(network)
    check_partition(network, stages)
    check_order(network, stages, spec.preprocess.crop_size)
