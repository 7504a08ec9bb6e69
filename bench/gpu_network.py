"""A network pruned for sparse tensor cores, from training to the launches of its layers: ``python -m bench.gpu_network``.

Trains a small network, prunes copies of it to 2:4, to runs of 32 outputs (1xV) and to V:2:M, trains each a little more,
quantises it, chooses kernels for a GPU that nothing can be measured on, and runs every convolution and linear layer in the
emulator as it would be launched there. Prints the kernels, the test accuracy, and how far the logits are from the float
network's and from those that the same int8 network has on a CPU: not at all.

For scikit-learn's digits; ``--data fashion-mnist`` reads Fashion-MNIST (Debian: apt install dataset-fashion-mnist). No GPU.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import cnncomp
from cnncomp import data
from cnncomp.demo.common import agreement, correct, forward
from cnncomp.demo.digits import train
from cnncomp.dispatch import modelled
from cnncomp.dispatch import network as planning
from cnncomp.dispatch.plan import LayerPlan, Plan
from cnncomp.graph import trace
from cnncomp.models import DigitsNet
from cnncomp.nn import ConvertedLayer, QuantConv2d, QuantLinear
from cnncomp.nn.packed_quant import _PackedConv2d, _PackedQuant
from cnncomp.nn.units import Units
from cnncomp.ops import cuda, cuda_sparse
from cnncomp.results.idx import fashion_mnist
from tests.cuda_device import emulated_device

#: The patterns that int8 kernels of a GPU take, what prune calls them, and the format in the kernels' names.
PATTERNS = {"2:4": "sparse24", "32x4": "vectors", "64:2:8": "vnm"}
EXAMPLES = 8  # images that go through the emulator
RUN_ZEROS = 0.75  # of runs, whose zeros are not the pattern's


@dataclass
class Outcome:
    """One pruned network.

    Attributes:
        pattern: As :func:`cnncomp.prune` takes it.
        zeros: Fraction of the weights that were pruned.
        accuracy: Of the int8 network on all test images.
        kernels: Of each layer, by its name.
        in_units: Layers whose output went to the next ones in units of images.
        launched: Logits (EXAMPLES, classes) by the GPU's kernels; ``on_cpu``: by the CPU's; ``float_``: of the pruned network
            before it was quantised; ``dense``: of the one that was pruned.
    """

    pattern: str
    zeros: float
    accuracy: float
    kernels: dict[str, str]
    in_units: list[str]
    launched: Tensor
    on_cpu: Tensor
    float_: Tensor
    dense: Tensor


def load(name: str, folder: Path | None = None, images: int | None = None) -> data.Split:
    """ "digits" or "fashion-mnist", as floats; the first ``images`` of the training images."""
    if name == "digits":
        split = data.digits()
    else:
        found = fashion_mnist(folder)
        scaled = [s.images.float() / 255 for s in (found.train, found.test)]
        split = data.Split(scaled[0], found.train.labels, scaled[1], found.test.labels)
    return data.Split(split.train_images[:images], split.train_labels[:images], split.test_images, split.test_labels)


def pruned(model: nn.Module, split: data.Split, pattern: str, epochs: int) -> nn.Module:
    """A copy of ``model``, pruned in two steps where the pattern leaves a choice, and trained after each."""
    found = copy.deepcopy(model)
    for sparsity in (RUN_ZEROS / 2, RUN_ZEROS) if "x" in pattern else (None,):
        cnncomp.prune(found, sparsity, pattern, scope="layer", progress=False)
        train(found, split, epochs, 1e-3, f"training with {pattern}")
    return found


def planned(model: nn.Module, x: Tensor, format: str) -> tuple[nn.Module, Plan]:
    """An int8 network with the kernels of a GPU: those of ``format`` where a layer has the pattern, else what dispatch takes
    without measurement on sm_80. Its tensors stay on the CPU."""
    with (  # there is no such device to ask
        mock.patch.object(planning, "device_key", str),
        mock.patch.object(modelled, "arch_of", lambda device: "sm_80"),
    ):
        planner = planning.NetworkPlanner(trace(model, (x,)), (x,), torch.device("cuda"))
        wanted = Plan("cuda", planner.key)
        for chooser in planner.choosers:
            for node, layer in chooser.layers.items():
                found = [o.candidate.kernel for o in chooser.options[node] if f"_{format}_" in o.candidate.kernel]
                if found:
                    wanted.layers[layer.info.name] = LayerPlan(found[0])
        return planner.module, planner.replay(wanted)


def _launch_conv(layer: QuantConv2d, x: Tensor, residual: Tensor | None, clamped: bool) -> Tensor:
    g, weight = layer.geometry, layer.weight_int8()
    if isinstance(layer, _PackedConv2d):
        operator = functools.partial(cuda_sparse.conv2d, layer._format.name)
        return layer.run_on(operator, layer._pack_format(weight), x, residual, clamped)
    constants, lo, dtype = layer._constants(clamped)
    before, where = (constants, residual, layer.residual_scale, lo), (g.stride, g.padding, g.dilation, g.groups, dtype)
    return cuda.conv2d_int8(layer._input(x), weight.permute(0, 2, 3, 1), *before, *where, *layer._ending(clamped))


def _launch_linear(layer: QuantLinear, x: Tensor, residual: Tensor | None, clamped: bool = True) -> Tensor:
    weight = layer.weight_int8()
    constants, lo, dtype = layer._constants(clamped)
    rest = (constants, residual, layer.residual_scale, lo, dtype)
    if isinstance(layer, _PackedQuant):
        packed = layer._pack_format(weight[..., None, None])
        return cuda_sparse.linear(layer._format.name, layer._input(x), packed, *rest)
    return cuda.linear_int8(layer._input(x), weight, *rest, *layer._ending(clamped))


class Launched(NamedTuple):
    """Kernels of the layers that have run, and names of those whose output was in units of images."""

    kernels: list[str]
    in_units: list[str]


@contextmanager
def launched(module: nn.Module) -> Iterator[Launched]:
    """While this lasts, the int8 layers of a network run in the emulator, as their GPU kernels would be launched."""
    ran = Launched([], [])

    def noted(run: Callable[..., Any], layer: ConvertedLayer, *arguments: object, **named: object) -> Any:
        out = run(layer, *arguments, **named)
        ran.kernels.append(layer.kernel)
        ran.in_units.extend([layer.info.name] * isinstance(out, Units))
        return out

    layers = [m for m in module.modules() if isinstance(m, (QuantConv2d, QuantLinear))]
    with emulated_device():
        for layer in layers:
            name, run = ("_image", _launch_conv) if isinstance(layer, QuantConv2d) else ("_run", _launch_linear)
            setattr(layer, name, functools.partial(noted, run, layer))
        try:
            yield ran
        finally:
            for layer in layers:
                delattr(layer, "_image" if isinstance(layer, QuantConv2d) else "_run")


def run(split: data.Split, patterns: list[str], epochs: int, finetune: int) -> list[Outcome]:
    """Train the network, and all of the above with each pattern.

    Args:
        epochs: Of the dense network; ``finetune``: after each step of pruning.
    """
    torch.manual_seed(0)
    model = DigitsNet()
    train(model, split, epochs, 2e-3, "training")
    x = split.test_images[:EXAMPLES]
    found = []
    for pattern in patterns:
        sparse = pruned(model, split, pattern, finetune)
        with torch.no_grad():
            outputs = sparse(x), model(x)
        zeros = [layer for layer in cnncomp.sparsity_of(sparse).layers if layer.masked]
        quantized = cnncomp.quantize(copy.deepcopy(sparse), list(split.train_images[:256].split(64)))
        network, plan = planned(quantized, x, PATTERNS[pattern])
        with torch.inference_mode():
            on_cpu = network(x)
            with launched(network) as ran:
                logits = network(x)
            accuracy = correct(forward(network, split.test_images, batch=64), split.test_labels) / len(
                split.test_labels
            )
        kernels = {name: layer.kernel for name, layer in plan.layers.items()}
        assert sorted(ran.kernels) == sorted(kernels.values()), (ran, kernels)
        fraction = sum(layer.zeros for layer in zeros) / sum(layer.numel for layer in zeros)
        found.append(Outcome(pattern, fraction, accuracy, kernels, ran.in_units, logits, on_cpu, *outputs))
    return found


def table(outcomes: list[Outcome]) -> str:
    """One line for each pattern, and the kernels of its layers, of which some leave their output in units of images."""
    lines = [f"{'pattern':8} {'zeros':>6} {'accuracy':>8} {'off float':>9} {'same class':>10} {'off CPU':>8}  kernels"]
    for o in outcomes:
        off = float((o.launched - o.float_).norm() / o.float_.norm())
        numbers = f"{o.pattern:8} {o.zeros:6.1%} {o.accuracy:8.1%} {off:9.2%} {agreement(o.launched, o.dense):10.0%}"
        kernels = ", ".join(f"{n} {kernel}{' → units' * (n in o.in_units)}" for n, kernel in o.kernels.items())
        lines.append(f"{numbers} {float((o.launched - o.on_cpu).abs().max()):8g}  {kernels}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--folder", type=Path, help="of Fashion-MNIST's files, by default where Debian puts them")
    parser.add_argument("--images", type=int, help="training images, all by default")
    parser.add_argument("--pattern", action="append", choices=PATTERNS, help="all by default")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--finetune", type=int, default=8, help="epochs after each step of pruning")
    arguments = parser.parse_args()
    split = load(arguments.data, arguments.folder, arguments.images)
    print(table(run(split, arguments.pattern or list(PATTERNS), arguments.epochs, arguments.finetune)))


if __name__ == "__main__":
    main()
