"""Whole networks at batch 1, converted, against torch eager (both layouts) and torch.compile, in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cnncomp
from bench import Compare
from bench.layers import conv_shapes
from cnncomp.demo.common import compile_float


def _int8(model: nn.Module, x: Tensor) -> nn.Module:
    return cnncomp.quantize(model, [x, torch.randn_like(x)], progress=False)


def _sparse(model: nn.Module, x: Tensor) -> nn.Module:
    """90 % zeros in every layer but the first and the last, which ``prune`` leaves alone."""
    return cnncomp.prune(model, sparsity=0.9, scope="layer")


#: network, what is done to it, its name in the results.
CASES: dict[str, tuple[str, Callable[[nn.Module, Tensor], nn.Module]]] = {
    "mobilenet_v2-int8": ("mobilenet_v2", _int8),
    "resnet50-sparse-90": ("resnet50", _sparse),
}


def _rivals(model: nn.Module, x: Tensor, compiled: bool) -> dict[str, Callable[[], object]]:
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x_last = x.contiguous(memory_format=torch.channels_last)
    fns: dict[str, Callable[[], object]] = {
        "torch eager": lambda: model(x),
        "torch eager channels_last": lambda: last(x_last),
    }
    fast = compile_float(model, x) if compiled else ""
    if not isinstance(fast, str):
        fns["torch.compile"] = lambda: fast(x_last)
    return fns


@pytest.mark.parametrize("case", CASES)
def test_network(compare: Compare, quick: bool, case: str) -> None:
    name, change = CASES[case]
    torch.manual_seed(0)
    model = getattr(cnncomp.models, name)().eval()
    x = torch.randn(1, 3, 64, 64) if quick else torch.randn(1, 3, 224, 224)
    changed = change(copy.deepcopy(model), x)
    converted = cnncomp.convert(changed, x, measure=not quick, cache=False, progress=False)
    fns = {"cnncomp": lambda: converted(x), **_rivals(model, x, compiled=not quick)}
    macs = sum(s.macs * s.count for s in conv_shapes(name)) * x.shape[2] ** 2 // 224**2
    kernels = {name: layer.kernel for name, layer in converted.plan.layers.items()}
    compare(fns, "cnncomp", macs, network=name, layer=case, shape="×".join(map(str, x.shape)), kernels=kernels)
