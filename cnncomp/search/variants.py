"""The network with every layer compressed in one way, from which single layers are taken."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from cnncomp._modules import layers_of, reduction_length, select
from cnncomp.errors import ArgumentError
from cnncomp.ops.library import MAX_REDUCTION
from cnncomp.pruning import prune
from cnncomp.quantization import quantize
from cnncomp.search.space import Choice, Config


class Variants:
    """Compresses copies of a float network.

    Args:
        model: the network; stays as it is.
        batches: to calibrate int8 with.
        quantization: arguments for :func:`cnncomp.quantize` that say how.
        exclude: name patterns of layers that stay dense.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], quantization: Mapping[str, Any], exclude: Sequence[str]
    ) -> None:
        self.model, self.batches, self.quantization = model, batches, quantization
        layers = layers_of(model)
        names = [name for name in layers if name]
        if not names:
            raise ArgumentError("model", "no Conv1d, Conv2d or Linear inside", "a network of layers")
        self.names = select(names, exclude)
        self.too_long = {n for n in names if reduction_length(layers[n]) > MAX_REDUCTION}

    def uniform(self, choice: Choice) -> nn.Module:
        """A copy in which every layer that can has ``choice``. Biases and rounding make up for what other layers do: where
        single layers will be taken, they stay as they are."""
        return self.build(dict.fromkeys(self.names, choice), alone=True)

    def build(
        self, config: Config, finetune: Callable[[nn.Module], object] | None = None, alone: bool = False
    ) -> nn.Module:
        """A copy, in eval mode, with ``config``: pruned, trained by ``finetune`` if anything was pruned, then quantised;
        ``alone``: each layer without regard to the others."""
        network = copy.deepcopy(self.model)
        by_pattern: dict[tuple[str, float], set[str]] = {}
        for layer, choice in config.items():
            if choice.sparsity:
                by_pattern.setdefault((choice.pattern, choice.sparsity), set()).add(layer)
        everything = [name for name in layers_of(network) if name]
        for (pattern, sparsity), chosen in sorted(by_pattern.items()):
            others = [escaped(name) for name in everything if name not in chosen]
            prune(network, sparsity, pattern, "layer", True, True, others)
        if finetune is not None and by_pattern:
            finetune(network)
        network.eval()
        int8 = {layer for layer, choice in config.items() if choice.int8 and layer not in self.too_long}
        if int8:
            others = [escaped(name) for name in everything if name not in int8]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # layers never reached stay float, and are in no table
                how = {k: v for k, v in self.quantization.items() if k == "method" or not alone}
                quantize(network, self.batches, exclude=others, progress=False, **how)
        return network


def escaped(name: str) -> str:
    """A pattern for :mod:`fnmatch` that matches this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


@contextmanager
def swapped(model: nn.Module, name: str, layer: nn.Module) -> Iterator[None]:
    """``model`` with ``layer`` in the place of the one called ``name``."""
    own = model.get_submodule(name)
    model.set_submodule(name, layer)
    try:
        yield
    finally:
        model.set_submodule(name, own)


def weight_bytes(model: nn.Module, config: Mapping[str, Choice]) -> int:
    """Bytes of the parameters and buffers in the form that :func:`cnncomp.save` writes, before it compresses them: int8
    weights with one float step per output channel, sparse ones as their non-zeros and a bitmap, all else as it is."""
    layers = layers_of(model)
    total = 0
    for name, module in model.named_modules():
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            choice = config.get(name) if name in layers and key == "weight" else None
            if choice is not None and choice.int8:
                total += tensor.numel() + 4 * tensor.shape[0]
            elif choice is not None and choice.sparsity:
                left = tensor.numel() - round(choice.sparsity * tensor.numel())
                total += left * tensor.element_size() + (tensor.numel() + 7) // 8
            else:
                total += tensor.numel() * tensor.element_size()
    return total
