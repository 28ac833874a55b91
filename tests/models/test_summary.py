from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transferkit.images import Preprocess
from transferkit.models import BackboneSpec, build_model
from transferkit.models.summary import ModelSummary, StageSummary, summarize


def test_whole_table(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze="until:conv1")
    assert str(summarize(model)) == (
        "stage   modules                             output   parameters  trains  BatchNorm\n"
        "----------------------------------------------------------------------------------\n"
        "conv1   Conv2d, BatchNorm2d                 8x15x15         240  frozen  frozen\n"
        "layer1  Conv2d, BatchNorm2d, ReLU, Dropout  16            1,200     all  train\n"
        "head    Linear                              2                34     all  -\n"
        "tiny for images of 3x32x32: 1,234 of 1,474 parameters train, 240 are frozen"
    )


def test_table_is_printed_unless_it_is_not_wanted(
    tiny_spec: BackboneSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_model(tiny_spec, 2, weights=None)
    summary = model.summary()
    assert capsys.readouterr().out == f"{summary}\n"
    assert model.summary(verbose=False) == summary
    assert capsys.readouterr().out == ""


def test_values_are_those_of_the_table(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze="until:conv1")
    summary = summarize(model)
    assert summary == ModelSummary(
        "tiny",
        (3, 32, 32),
        (
            StageSummary("conv1", ("Conv2d", "BatchNorm2d"), (8, 15, 15), 240, 0, ("frozen",)),
            StageSummary(
                "layer1",
                ("Conv2d", "BatchNorm2d", "ReLU", "Dropout"),
                (16,),
                1200,
                1200,
                ("train",),
            ),
            StageSummary("head", ("Linear",), (2,), 34, 34, ()),
        ),
    )
    assert summary.num_parameters == model.num_parameters == 1474
    assert summary.num_trainable == model.num_trainable_parameters == 1234


@pytest.mark.parametrize(
    ("freeze", "bn", "modes"),
    [
        ("none", "frozen", ["train", "train"]),
        ("none", "fixed", ["fixed", "fixed"]),
        ("backbone", "frozen", ["frozen", "frozen"]),
        ("backbone", "train", ["train", "train"]),
        ("backbone", "adapt", ["adapt", "adapt"]),
        ("backbone", "fixed", ["frozen", "frozen"]),
        ("until:conv1", "frozen", ["frozen", "train"]),
        ("until:conv1", "adapt", ["adapt", "train"]),
        ("until:conv1", "fixed", ["frozen", "fixed"]),
        ("*.bias", "frozen", ["train", "train"]),
        ("backbone.bn1.*", "frozen", ["frozen", "train"]),
    ],
)
def test_modes_of_batchnorm_are_those_in_training(
    tiny_spec: BackboneSpec, freeze: str, bn: Any, modes: list[str]
) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze=freeze, bn=bn)
    for each in (model.train(), model.eval()):
        assert [stage.batch_norm for stage in summarize(each).stages] == [
            *((mode,) for mode in modes),
            (),
        ]


def test_stage_that_is_frozen_in_part_shows_how_much_trains() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), block)
    model = build_model(
        network,
        2,
        num_features=4,
        freeze=["backbone.2.0.*", "backbone.2.1.*"],
        preprocess=Preprocess(crop_size=2, resize_size=2),
    )
    assert str(summarize(model)) == (
        "stage  modules                  output  parameters      trains  BatchNorm\n"
        "-------------------------------------------------------------------------\n"
        "1      Flatten, Linear          4               52         all  -\n"
        "2      2 Linear, 2 BatchNorm1d  4               56  28 of them  frozen, train\n"
        "head   Linear                   2               10         all  -\n"
        "Sequential for images of 3x2x2: 90 of 118 parameters train, 28 are frozen"
    )


def test_parameters_outside_of_modules_are_counted() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    network.token = nn.Parameter(torch.zeros(7))
    preprocess = Preprocess(crop_size=2, resize_size=2)
    model = build_model(network, 2, num_features=4, preprocess=preprocess)
    first = summarize(model).stages[0]
    assert (first.name, first.num_parameters, first.num_trainable) == ("1", 59, 59)


def test_backbone_without_stages_has_one_row() -> None:
    preprocess = Preprocess(crop_size=2, resize_size=2)
    model = build_model(nn.Flatten(), 2, num_features=12, preprocess=preprocess)
    assert str(summarize(model)) == (
        "stage     modules  output  parameters  trains  BatchNorm\n"
        "--------------------------------------------------------\n"
        "backbone  Flatten  12               0       -  -\n"
        "head      Linear   2               26     all  -\n"
        "Flatten for images of 3x2x2: 26 of 26 parameters train, 0 are frozen"
    )


def test_stage_that_gives_no_tensor_has_no_shape() -> None:
    class Two(nn.Linear):
        def forward(self, inputs: Tensor) -> Any:
            return [super().forward(inputs), inputs]

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = Two(3, 3)
            self.blocks = nn.ModuleList([nn.Linear(3, 5)])

        def forward(self, images: Tensor) -> Tensor:
            features: Tensor = self.blocks[0](self.one(images.mean(dim=(2, 3)))[0])
            return features

    model = build_model(Network(), 2, num_features=5)
    text = str(summarize(model)).splitlines()
    assert text[2:4] == [
        "one     Two         -               12     all  -",
        "blocks  ModuleList  -               20     all  -",
    ]


def test_model_is_left_as_it_was(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None, freeze="until:conv1")
    model.head.eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    summarize(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_grey_images_have_one_channel(tiny_spec: BackboneSpec) -> None:
    model = build_model(tiny_spec, 2, weights=None, num_channels=1)
    assert summarize(model).image_shape == (1, 32, 32)
