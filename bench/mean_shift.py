"""Mean-shift against symmetric int8 weights, layer by layer on trained networks, as a Markdown table.

    python -m bench.mean_shift

The error of a layer is Σ|y − ŷ|² / Σ|y|² on its own float inputs, with its weights alone quantised, one scale (and mean) per
output channel and the scales of least squared error. The inputs come from photographs or digits that nothing was fitted to.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bench.quantization import VALIDATION, crops_of
from cnncomp import data
from cnncomp._modules import is_depthwise, layers_of
from cnncomp.demo.common import machine_line
from cnncomp.demo.digits import train
from cnncomp.demo.mobilenet import pretrained
from cnncomp.models import DigitsNet
from cnncomp.quantization.fake import FakeQuantizeWeight
from cnncomp.quantization.scales import weight_scales


def quantized_weight(weight: Tensor, shifted: bool) -> Tensor:
    """The weight as int8 gives it."""
    shift = weight.flatten(1).mean(1) if shifted else None
    centred = weight if shift is None else weight - shift.view(-1, *[1] * (weight.dim() - 1))
    return FakeQuantizeWeight(weight_scales(centred, "mse"), shift)(weight)


@torch.no_grad()
def errors(model: nn.Module, x: Tensor) -> dict[str, tuple[float, float]]:
    """By layer: the errors of the symmetric and of the mean-shift scheme."""
    found: dict[str, tuple[float, float]] = {}

    def watch(name: str) -> Any:
        def hook(layer: Any, args: tuple[Tensor], out: Tensor) -> None:
            weight, both = layer.weight.data, []
            for shifted in (False, True):
                layer.weight.data = quantized_weight(weight, shifted)
                both.append(((layer.forward(*args) - out).square().sum() / out.square().sum()).item())
            layer.weight.data = weight
            found[name] = (both[0], both[1])

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers_of(model).items()]
    model(x)
    for handle in handles:
        handle.remove()
    return found


def kind(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return "linear"
    size = "×".join(map(str, layer.kernel_size))  # type: ignore[union-attr, arg-type]
    return f"{size} depthwise" if is_depthwise(layer) else size


def main() -> None:
    """Print a row for each layer and one for each network."""
    torch.set_num_threads(1)
    photos = [p for p in data.calibration_photos() if p.name in VALIDATION]
    digits = data.digits()
    torch.manual_seed(0)
    net = DigitsNet()
    train(net, digits, 15, 2e-3, "training")
    networks = {
        "MobileNetV2": (pretrained(), crops_of(photos, 8, seed=10_000)),
        "DigitsNet": (net.eval(), digits.test_images),
    }
    print(machine_line(), "\n")
    print("| network | layer | kind | symmetric, dB | mean-shift, dB | wins |\n|---|---|---|---:|---:|---|")
    for network, (model, x) in networks.items():
        wins = {"symmetric": 0, "mean-shift": 0}
        for name, both in errors(model, x).items():
            symmetric, shifted = (10 * math.log10(e) for e in both)
            winner = "mean-shift" if shifted < symmetric else "symmetric"
            wins[winner] += 1
            row = (network, name, kind(layers_of(model)[name]), f"{symmetric:.2f}", f"{shifted:.2f}", winner)
            print(f"| {' | '.join(row)} |")
        print(f"| **{network}** | all | | {wins['symmetric']} layers | {wins['mean-shift']} layers | |")


if __name__ == "__main__":
    main()
