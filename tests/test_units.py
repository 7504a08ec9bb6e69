"""Where networks keep activations in units of images between layers that gather them."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from cnncomp import serialization
from cnncomp.convert import Conversion, ConvertedModel
from cnncomp.dispatch.plan import Plan
from cnncomp.graph import trace
from cnncomp.graph.chain import settle_units
from cnncomp.nn import (
    Clamp,
    ConcatChannels,
    Geometry,
    QuantConv2d,
    QuantMaxPool2d,
    QuantSpec,
    VectorsQuantConv2d,
    VnmQuantConv2d,
)
from cnncomp.nn.units import Units
from cnncomp.profile import _float_call, _record_calls
from cnncomp.sparsity import vectors
from tests.helpers import random_8bit
from tests.test_packers import masked_vnm

SPEC = QuantSpec(0.05, torch.uint8)
FLOATS, GATHER = None, VectorsQuantConv2d


def conv(cls=GATHER, output=SPEC, c=16, k=16):
    geometry, weight = Geometry(c, k, (1, 1)), torch.randint(-9, 10, (k, c, 1, 1), dtype=torch.int8)
    weight = masked_vnm(weight, 64, 8) if cls is VnmQuantConv2d else weight
    return cls(geometry, weight, torch.full((k,), 0.01), None, SPEC, Clamp(0.0), output)


def network(*layers):
    """A graph of modules, each with the numbers of the values that it reads: the input, what the first module gives, ..."""
    root, graph = nn.Module(), fx.Graph()
    values = [graph.placeholder("x")]
    for i, (module, *inputs) in enumerate(layers):
        root.add_module(f"m{i + 1}", module)
        values.append(graph.call_module(f"m{i + 1}", tuple(values[j] for j in inputs)))
    graph.output(values[-1])
    gm = fx.GraphModule(root, graph)
    settle_units(gm)
    return gm


def chained(gm):
    return [name for name, m in gm.named_modules() if getattr(m, "out_units", False)]


CASES = {
    "two layers": ([(conv(), 0), (conv(output=FLOATS), 1)], ["m1"]),
    "floats between": ([(conv(output=FLOATS), 0), (conv(), 1)], []),
    "through a pool": ([(conv(), 0), (QuantMaxPool2d(2), 1), (conv(), 2), (conv(), 3)], ["m1", "m3"]),
    "another format": ([(conv(), 0), (conv(VnmQuantConv2d), 1), (conv(VnmQuantConv2d), 2)], ["m2"]),
    "a dense reader": ([(conv(), 0), (conv(), 1), (conv(QuantConv2d), 1), (conv(), 2, 3)], ["m2"]),
    "flattened": ([(conv(), 0), (conv(), 1), (nn.Flatten(), 1)], []),
    "a pool that another reads": ([(conv(), 0), (QuantMaxPool2d(2), 1), (conv(), 2), (conv(QuantConv2d), 2)], []),
    "no whole vectors": ([(conv(k=18), 0), (conv(c=18), 1)], []),
    # What only a residual reads lies as the output that it is added to.
    "a residual": ([(conv(), 0), (conv(), 0), (conv(), 1, 2), (conv(), 3)], ["m1", "m2", "m3"]),
    "a residual of an output in NHWC": ([(conv(), 0), (conv(), 0), (conv(output=FLOATS), 1, 2)], ["m1"]),
    "a residual of a dense layer": ([(conv(QuantConv2d), 0), (conv(), 0), (conv(), 2, 1), (conv(), 3)], ["m2", "m3"]),
    "a residual of floats": ([(conv(output=FLOATS), 0), (conv(), 0), (conv(), 2, 1), (conv(), 3)], ["m2"]),
    "its own input in floats": ([(conv(output=FLOATS), 0), (conv(), 1, 1), (conv(), 2)], []),
    "the network's input twice": ([(conv(), 0, 0), (conv(), 1)], []),
    "a pool in ceil mode": ([(conv(), 0), (QuantMaxPool2d(3, 2, 1, ceil_mode=True), 1), (conv(), 2)], ["m1"]),
    "concatenated": ([(conv(k=8), 0), (conv(k=8), 0), (ConcatChannels(), 1, 2), (conv(), 3)], []),
    "the network's input": ([(conv(), 0), (conv(), 1, 0), (conv(), 2)], ["m1"]),
}


@pytest.mark.parametrize("name", CASES)
def test_which_outputs_are_in_units(name):
    layers, expected = CASES[name]
    assert chained(network(*layers)) == expected


def test_values_are_images_while_a_network_is_planned_again_and_settled_when_it_is_read(tmp_path):
    gm = network((conv(), 0), (conv(), 1), (conv(output=FLOATS), 2))
    assert chained(gm) == ["m1", "m2"]
    assert chained(trace(gm, (torch.rand(8, 16, 2, 2),)).module) == [] and chained(gm) == ["m1", "m2"]
    serialization.save(ConvertedModel(gm, Conversion(Plan("cpu", ""), {}, [])), tmp_path / "net")
    again, _ = serialization._parse(tmp_path / "net")
    assert chained(again.network) == ["m1", "m2"]


def test_on_a_cpu_nothing_is_in_units():
    gm = network((conv(), 0), (conv(output=FLOATS), 1))
    dense = [conv(QuantConv2d, m.output) for m in (gm.m1, gm.m2)]
    for layer, other in zip(dense, (gm.m1, gm.m2), strict=True):
        layer.weight = layer._pack(other.weight_int8())
    x = torch.rand(8, 16, 3, 3)
    assert torch.equal(gm(x), dense[1](dense[0](x)))


def test_a_profile_sees_images():
    x, layer = random_8bit((8, 16, 3, 2), torch.uint8), conv(output=FLOATS)
    units = Units(vectors.to_units(x))
    copied = units.clone()
    assert torch.equal(copied.images(), x) and copied.tensor.data_ptr() != units.tensor.data_ptr()
    (floats,) = _float_call(layer, (units,))
    assert torch.equal(floats, x.float() * SPEC.scale)
    layers, calls = _record_calls(network((layer, 0)), (x,))
    assert list(layers) == ["m1"] and torch.equal(calls["m1"][0], x)
