"""Choosing kernels from times that are given, not measured: what wins, and why."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import cnncomp
from cnncomp.dispatch.choose import MARGIN, NEAR, NEAR_IN_PAIRS, Chooser
from cnncomp.dispatch.network import NetworkPlanner
from cnncomp.graph import trace
from tests.helpers import mask_weights

X = torch.randn(1, 8, 8, 8)
DENSE = {"dense.nchw": 1.0, "dense.channels_last": 1.1, "dense.fused": 1.2, "dense.direct": 1.3}


def chooser(*layers: nn.Module, zeros: float = 0.0) -> Chooser:
    net = mask_weights(nn.Sequential(*layers), zeros).eval()
    planner = NetworkPlanner(trace(net, (X,)), (X,), torch.device("cpu"))
    return planner.choosers[0]


def convs(count: int) -> list[nn.Module]:
    return [nn.Conv2d(8, 8, 3, padding=1) for _ in range(count)]


def settle(
    found: Chooser,
    times: list[dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
    conversion: float = 0.0,
    pool: dict[str, float] | None = None,
) -> list[str]:
    """The cheapest network's kernels, layer by layer, if every change of layout takes ``conversion``."""
    for options, seconds in zip(found.options.values(), times, strict=True):
        for option in options:
            option.seconds = seconds[option.candidate.kernel]
    monkeypatch.setattr(found, "_conversion", lambda node, src, dst, spec: 0.0 if src == dst else conversion)

    def passing(node: fx.Node, fmt: str) -> float:
        return (pool or {}).get(fmt, 0.0) if node.name == "_1" else 0.0

    monkeypatch.setattr(found, "_passing", passing)
    return [option.candidate.kernel for option in found.cheapest().values()]


def test_the_fastest_dense_kernel_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [DENSE, {**DENSE, "dense.fused": 0.5}]
    assert settle(chooser(*convs(2)), times, monkeypatch) == ["dense.nchw", "dense.fused"]


def test_layouts_are_changed_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [DENSE, {**DENSE, "dense.fused": 0.8}, DENSE]
    assert settle(chooser(*convs(3)), times, monkeypatch, 0.05)[1] == "dense.fused"
    assert settle(chooser(*convs(3)), times, monkeypatch, 0.5) == ["dense.nchw"] * 3


def test_a_pool_that_is_slow_in_one_layout_decides_the_layout_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [convs(1)[0], nn.MaxPool2d(2), convs(1)[0]]
    times = [{**DENSE, "dense.fused": 1.05}, DENSE]
    assert settle(chooser(*layers), times, monkeypatch, 0.1, {"nchw": 5.0, "nhwc": 0.5}) == [
        "dense.fused",
        "dense.nchw",
    ]
    assert settle(chooser(*layers), times, monkeypatch, 0.1, {"nchw": 0.5, "nhwc": 0.5}) == ["dense.nchw"] * 2


@pytest.mark.parametrize(("seconds", "kernel"), [(MARGIN - 0.01, "conv2d_sparse"), (MARGIN + 0.01, "dense.nchw")])
def test_a_compressed_kernel_needs_a_margin(seconds: float, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = chooser(*convs(1), zeros=0.9)
    assert settle(found, [{**DENSE, "conv2d_sparse": seconds}], monkeypatch) == [kernel]


def test_no_compressed_layer_loses_to_dense_with_its_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone it wins, and the whole network would; but in this layer's place dense would be faster."""
    found = chooser(*convs(2), zeros=0.9)
    fast_last = {**DENSE, "dense.nchw": 3.0, "dense.direct": 3.0, "dense.channels_last": 3.0, "dense.fused": 1.0}
    fast_last["conv2d_sparse"] = 9.0
    times = [fast_last, {**DENSE, "conv2d_sparse": 0.85}]
    assert settle(found, times, monkeypatch, 0.1) == ["dense.fused", "conv2d_sparse"]
    assert settle(chooser(*convs(2), zeros=0.9), times, monkeypatch, 0.3)[1].startswith("dense.")


@pytest.mark.parametrize(("seconds", "kernel"), [(NEAR - 0.01, "dense.direct"), (NEAR + 0.01, "dense.nchw")])
def test_own_dense_kernels_are_tried_where_torchs_are_hardly_faster(
    seconds: float, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = chooser(*convs(3), zeros=0.8)
    times = [{**DENSE, "dense.direct": seconds, "conv2d_sparse": s} for s in (2.0, 0.1, 2.0)]
    times[2]["dense.fused"] = 0.4  # in another layout: stays
    assert settle(found, times, monkeypatch) == ["dense.nchw", "conv2d_sparse", "dense.fused"]
    tried = found.with_own_kernels(found.cheapest())
    assert [o.candidate.kernel for o in tried.values()] == [kernel, "conv2d_sparse", "dense.fused"]


def test_the_network_decides_between_own_kernels_and_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    for own, kernel in ((0.9, "dense.direct"), (1.1, "dense.nchw")):
        net = mask_weights(nn.Sequential(*convs(2)), 0.8).eval()
        planner = NetworkPlanner(trace(net, (X,)), (X,), torch.device("cpu"))
        monkeypatch.setattr(
            planner, "_race", lambda rivals, own=own: {"dense": 2.0, "converted": 1.0, "own kernels": own}
        )
        names = list(planner.names)
        times = {**DENSE, "dense.direct": 1.05, "dense.channels_last": 9.0, "dense.fused": 9.0}
        plan = planner.settle_by({names[0]: {**times, "conv2d_sparse": 3.0}, names[1]: {**times, "conv2d_sparse": 0.1}})
        kernels = {p.kernel for p in plan.layers.values()}
        assert kernels == {kernel, "conv2d_sparse"} and plan.network_ms["converted"] == 1e3 * min(own, 1.0)
        assert {getattr(m, "kernel", kernel) for m in planner.module.children()} == kernels


@pytest.mark.parametrize(("network", "kernel"), [(0.96, "conv2d_sparse"), (0.98, "dense.fused")])
@pytest.mark.parametrize("seconds", [MARGIN + 0.01, NEAR - 0.01, NEAR + 0.01])
def test_the_network_decides_where_dense_hardly_wins_and_needs_conversions(
    seconds: float, network: float, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = mask_weights(nn.Sequential(*convs(3)), 0.8).eval()
    planner = NetworkPlanner(trace(net, (X,)), (X,), torch.device("cpu"))
    raced: list[str] = []

    def race(rivals: dict[str, object]) -> dict[str, float]:
        raced.extend(rivals)
        return {"dense": 2.0, "converted": 1.0} | ({"near": network} if "near" in rivals else {})

    monkeypatch.setattr(planner, "_race", race)
    monkeypatch.setattr(planner.choosers[0], "_conversion", lambda node, src, dst, spec: 0.0 if src == dst else 0.1)
    dense = {**DENSE, "dense.nchw": 3.0, "dense.direct": 3.0, "dense.channels_last": 3.0, "dense.fused": 1.0}
    times = dict(zip(sorted(planner.names), ({**dense, "conv2d_sparse": s} for s in (0.1, seconds, 0.1)), strict=True))
    plan = planner.settle_by(times)
    middle = list(plan.layers.values())[1]
    if seconds > NEAR:
        assert middle.kernel == "dense.fused" and "near" not in raced
        return
    assert middle.kernel == kernel and plan.network_ms["converted"] == 1e3 * (network if network < 0.97 else 1.0)
    assert ("dense alone, but the network is faster with it" in middle.reason) == (kernel == "conv2d_sparse")


class Sum(nn.Module):
    """Two convolutions that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = convs(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.b(x) + self.c(x)


@pytest.mark.parametrize(("seconds", "joined"), [(NEAR_IN_PAIRS - 0.01, True), (NEAR_IN_PAIRS + 0.01, False)])
def test_layers_that_run_in_one_are_tried_on_the_kernel_for_it(seconds: float, joined: bool) -> None:
    net = mask_weights(Sum(), 0.8).eval()
    net = cnncomp.quantize(net, [X], progress=False)
    found = NetworkPlanner(trace(net, (X,)), (X,), torch.device("cpu")).choosers[0]
    for layer, options in zip(found.layers.values(), found.options.values(), strict=True):
        known = {"conv2d_scattered_int8": 1.0, "conv2d_sparse_int8": 1.01 if layer.info.name == "b" else seconds}
        for option in options:
            option.seconds = known.get(option.candidate.kernel, 9.0)
    alone = {node: min(options, key=lambda o: o.seconds) for node, options in found.options.items()}
    assert {o.candidate.kernel for o in alone.values()} == {"conv2d_scattered_int8"}
    tried = {found.layers[n].info.name: o.candidate.kernel for n, o in found.with_own_kernels(alone).items()}
    both = "conv2d_sparse_int8" if joined else "conv2d_scattered_int8"
    assert tried == {"a": "conv2d_scattered_int8", "b": both, "c": both}


def test_measured_time_of_a_pool() -> None:
    found = chooser(convs(1)[0], nn.MaxPool2d(2), nn.ReLU())
    pool = next(n for n in found.gm.graph.nodes if n.name == "_1")
    assert {fmt for fmt in ("nchw", "nhwc", "q8") if found._passing(pool, fmt) > 0} == {"nchw", "nhwc", "q8"}
    assert found._passing(next(n for n in found.gm.graph.nodes if n.op == "output"), "nchw") == 0.0
