"""Models: sizes, parameter names, output shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from cnncomp import models
from cnncomp.errors import ArgumentError


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (models.resnet18, 11_689_512),
        (models.resnet50, 25_557_032),
        (models.mobilenet_v2, 3_504_872),
        (models.vgg16, 138_357_544),
        (models.vgg16_bn, 138_365_992),
        (models.DigitsNet, 168_810),
        (models.ArticleNet, 76_938),
    ],
)
def test_parameter_counts(build: Callable[[], nn.Module], expected: int) -> None:
    with torch.device("meta"):
        assert parameters(build()) == expected


@pytest.mark.parametrize(
    ("build", "entries", "shapes"),
    [
        (
            models.resnet50,
            320,
            {
                "conv1.weight": (64, 3, 7, 7),
                "layer1.0.downsample.1.num_batches_tracked": (),
                "layer3.5.conv2.weight": (256, 256, 3, 3),
                "layer4.2.bn3.weight": (2048,),
                "fc.weight": (1000, 2048),
            },
        ),
        (
            models.mobilenet_v2,
            314,
            {
                "features.0.0.weight": (32, 3, 3, 3),
                "features.1.conv.1.weight": (16, 32, 1, 1),
                "features.2.conv.1.0.weight": (96, 1, 3, 3),
                "features.17.conv.3.running_var": (320,),
                "features.18.1.running_mean": (1280,),
                "classifier.1.bias": (1000,),
            },
        ),
        (
            models.vgg16,
            32,
            {
                "features.0.weight": (64, 3, 3, 3),
                "features.28.bias": (512,),
                "classifier.0.weight": (4096, 25088),
                "classifier.6.weight": (1000, 4096),
            },
        ),
        (models.vgg16_bn, 97, {"features.41.running_mean": (512,), "classifier.6.bias": (1000,)}),
        (models.resnet18, 122, {"layer4.1.bn2.bias": (512,), "layer2.0.downsample.0.weight": (128, 64, 1, 1)}),
    ],
)
def test_state_dict_has_the_names_of_torchvision(
    build: Callable[[], nn.Module], entries: int, shapes: dict[str, tuple[int, ...]]
) -> None:
    with torch.device("meta"):
        state = build().state_dict()
    assert len(state) == entries
    for name, shape in shapes.items():
        assert tuple(state[name].shape) == shape, name


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (models.resnet18(7), (2, 3, 64, 64)),
        (models.resnet50(7), (1, 3, 64, 64)),
        (models.mobilenet_v2(7), (2, 3, 33, 47)),
        (models.mobilenet_v2(7, width_mult=0.35), (1, 3, 32, 32)),
        (models.DigitsNet(7), (3, 1, 8, 8)),
        (models.ArticleNet(7), (3, 3, 32, 32)),
        (models.ConcatNet(7), (3, 3, 9, 11)),
    ],
)
def test_forward_and_backward(model: nn.Module, shape: tuple[int, ...]) -> None:
    model.train(shape[0] > 1)
    out = model(torch.randn(shape))
    assert out.shape == (shape[0], 7)
    assert 1e-4 < out.std() < 1e4  # initialised so that signals neither die nor explode
    out.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("build", [models.vgg16, models.vgg16_bn])
def test_vgg_gives_logits(build: Callable[[int], nn.Module]) -> None:
    with torch.device("meta"):
        assert build(7)(torch.empty(2, 3, 224, 224)).shape == (2, 7)


def test_resnet50_strides_in_the_3x3() -> None:
    with torch.device("meta"):
        block = models.resnet50().layer2[0]
    assert (block.conv1.stride, block.conv2.stride, block.conv3.stride) == ((1, 1), (2, 2), (1, 1))


@pytest.mark.parametrize(("width", "first", "last"), [(1.0, 32, 1280), (1.4, 48, 1792), (0.35, 16, 1280)])
def test_mobilenet_width(width: float, first: int, last: int) -> None:
    with torch.device("meta"):
        model = models.mobilenet_v2(width_mult=width)
    assert (model.features[0][0].out_channels, model.classifier[1].in_features) == (first, last)


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan")])
def test_mobilenet_refuses_a_width_that_is_none(width: float) -> None:
    with pytest.raises(ArgumentError, match="width_mult"):
        models.mobilenet_v2(width_mult=width)
