"""Small converted networks of all kinds, for the tests of saved files."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import cnncomp
from cnncomp.dispatch import Plan
from cnncomp.models import ConcatNet, DigitsNet
from cnncomp.models.mobilenet import InvertedResidual
from cnncomp.models.resnet import BasicBlock, Bottleneck
from tests.helpers import mask_weights, randomize_norms


class SignalNet(nn.Module):
    """Conv1d layers, a transposed one that has no kernel of ours, and leftovers of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(3, 8, 5, padding="same"), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2))
        self.up = nn.ConvTranspose1d(8, 4, 3, stride=2)
        self.norm = nn.BatchNorm1d(4)
        self.reflect = nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect")
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.reflect(self.norm(self.up(self.body(x)))).mean(-1))


def _residual_net() -> nn.Module:
    blocks = (BasicBlock(8, 8, 1, None), Bottleneck(8, 2, 1, None), InvertedResidual(8, 8, 1, 3))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), *blocks, nn.Flatten(), nn.Linear(72, 5))


#: network, shape of its input, is it quantised, fraction of zeros.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool, float]] = {
    "int8": (DigitsNet, (2, 1, 8, 8), True, 0.0),
    "sparse": (DigitsNet, (2, 1, 8, 8), False, 0.9),
    "sparse-int8": (DigitsNet, (2, 1, 8, 8), True, 0.9),
    "dense": (DigitsNet, (1, 1, 8, 8), False, 0.0),
    "concat": (ConcatNet, (1, 3, 12, 10), True, 0.0),
    "residual": (_residual_net, (2, 3, 9, 9), True, 0.0),
    "conv1d-int8": (SignalNet, (2, 3, 20), True, 0.0),
    "conv1d-sparse": (SignalNet, (2, 3, 20), False, 0.8),
}


def dense_plan(model: cnncomp.ConvertedModel, device: str) -> Plan:
    plan = Plan.from_json(model.plan.to_json())
    for layer in plan.layers.values():
        layer.kernel = "dense.linear" if layer.kernel.startswith("linear") else "dense.nchw"
    plan.device = device
    return plan


@functools.cache
def converted(case: str, measure: bool = False, *, device: str | None = None) -> tuple[cnncomp.ConvertedModel, Tensor]:
    """A network of the table, converted by the rule of thumb; with ``device`` all dense, planned on that device."""
    torch.manual_seed(0)
    make, shape, quantized, zeros = NETWORKS[case]
    x = torch.randn(shape)
    model = mask_weights(randomize_norms(make()), zeros).eval()
    if quantized:
        cnncomp.quantize(model, [x], exclude="reflect" if "conv1d" in case else (), progress=False)
    plan = None if device is None else dense_plan(converted(case)[0], device)
    return cnncomp.convert(model, x, measure=measure, plan=plan, cache=False, progress=False), x
