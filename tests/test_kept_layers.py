"""Networks of which something stays as it is: what stays is plain, and what is around it sees what it saw before."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnncomp
from cnncomp.nn import ConvertedLayer, QuantConv2d, SparseConv2d

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Keeps(nn.Module):
    """Layers that are shared, called twice, a subclass, or read by the forward itself."""

    class Own(nn.Conv2d):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.b.weight = self.a.weight
        self.own, self.read = self.Own(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.last = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(self.c(self.c(self.b(self.a(x)))))
        return self.last(F.conv2d(self.read(x), self.read.weight))


def parametrized(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if hasattr(m, "parametrizations")]


@pytest.mark.parametrize("quantized", [False, True])
def test_kept_layers_are_plain(quantized: bool) -> None:
    model = cnncomp.prune(Keeps(), sparsity=0.5, include_first_last=True).eval()
    if quantized:
        cnncomp.quantize(model, [X], progress=False)
    fast = cnncomp.convert(model, X, measure=False)
    assert {"a", "b", "c", "own", "read"} <= set(fast.conversion.kept)
    # The graph computes the quantised weight of `read` from its parametrizations.
    assert (
        not [name for name in parametrized(fast) if not (quantized and "read" in name)] and len(parametrized(model)) > 5
    )
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X), rtol=0.1 if quantized else 1e-4, atol=0.1 if quantized else 1e-5)
    network = fast.network
    assert network.a.weight is network.b.weight or not torch.equal(network.a.weight, network.b.weight)
    assert torch.equal(network.c.weight == 0, model.c.weight == 0) or quantized
    if quantized:
        return
    stored = io.BytesIO()
    torch.save(fast, stored)
    stored.seek(0)
    for again in (pickle.loads(pickle.dumps(fast)), torch.load(stored, weights_only=False), copy.deepcopy(fast)):
        assert torch.equal(again(X), fast(X))


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_a_hook_on_the_network_does_not_stop_conversion(kind: str) -> None:
    model = cnncomp.prune(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)).eval(), 0.9)
    seen: list[int] = []
    if kind == "pre":
        model.register_forward_pre_hook(lambda m, args: seen.append(1) or (args[0] + 1,))
    else:
        model.register_forward_hook(lambda m, args, out: seen.append(1) or out + 1)
    fast = cnncomp.convert(model, X, measure=False)
    assert fast.conversion.kept["(model)"].startswith("has hooks")
    assert [type(m).__name__ for m in fast.modules() if isinstance(m, ConvertedLayer)].count("SparseConv2d") == 1
    seen.clear()
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X), rtol=1e-4, atol=1e-5)
    assert len(seen) == 2


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("pair", [False, True])
def test_results_have_torchs_layout(dims: int, pair: bool) -> None:
    """An int8 network computes in channels_last; who calls it may ask for a view of what it gives."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            conv = nn.Conv2d if dims == 2 else nn.Conv1d
            self.a, self.b = conv(3, 8, 3), conv(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor | dict[str, list[Tensor]]:
            y = self.a(x).relu()
            return {"out": [self.b(y), y]} if pair else self.b(y)

    x = X if dims == 2 else X.flatten(2)
    model = cnncomp.quantize(Net().eval(), [x], progress=False)
    fast = cnncomp.convert(model, x, measure=False)
    assert any(isinstance(m, (QuantConv2d, SparseConv2d)) for m in fast.modules())
    result = fast(x)
    for out in result["out"] if pair else [result]:
        assert out.is_contiguous() and out.view(2, -1).shape == (2, out[0].numel())
