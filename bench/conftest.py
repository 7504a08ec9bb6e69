"""Benches: cnncomp's kernels and torch's timed in turn, in one process. ``pytest bench --benchmark-json=FILE``.

``--quick`` runs the two smallest layers of each network, and networks on small images. One thread, unless
CNNCOMP_BENCH_THREADS says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import cnncomp
from bench import Compare
from bench.layers import NETWORKS, ConvShape, calls, conv_shapes
from bench.options import threads
from cnncomp import _cpu
from cnncomp.dispatch import cpu_name, interleaved
from cnncomp.dispatch.candidates import options_for
from cnncomp.nn import DenseConv2d


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="few and small layers and networks")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    torch.set_num_threads(threads())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``shape``: every layer of every network; ``candidate``: the module's CANDIDATES, entries of dispatch's table."""
    if "candidate" in metafunc.fixturenames:
        metafunc.parametrize("candidate", metafunc.module.CANDIDATES, ids=lambda c: c.kernel)
    if "shape" in metafunc.fixturenames:
        by_network = [conv_shapes(network) for network in NETWORKS]
        if metafunc.config.getoption("--quick"):
            by_network = [sorted(shapes, key=lambda s: s.macs)[:2] for shapes in by_network]
        metafunc.parametrize("shape", [s for shapes in by_network for s in shapes], ids=str)


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


def _machine() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "isa": _cpu.isa(),
        "threads": torch.get_num_threads(),
        "versions": {"cnncomp": cnncomp.__version__, "torch": torch.__version__},
    }


@pytest.fixture
def compare(benchmark: Any, quick: bool) -> Compare:
    """``compare(fns, ours, macs, **labels)``: time all ``fns`` alternately and note the result of the one named so.

    Into the benchmark's ``extra_info`` go, besides the labels, ``ms``: median milliseconds of each; ``rival``: the
    fastest of the others; ``ratio``: its time over ours, above 1 where we are faster; ``gmac_per_s``: our rate, weights
    that are zero counted too; and the machine.
    """

    def run(fns: dict[str, Callable[[], object]], ours: str, macs: int, **labels: Any) -> None:
        with torch.inference_mode():
            seconds = interleaved(fns, min_rounds=3 if quick else 15, budget_s=0.02 if quick else 0.5)
            benchmark.pedantic(fns[ours], rounds=3 if quick else 10)
        rival = min((name for name in fns if name != ours), key=lambda name: seconds[name])
        benchmark.group = labels["network"]
        benchmark.extra_info.update(
            labels,
            kernel=ours,
            ms={name: s * 1e3 for name, s in seconds.items()},
            rival=rival,
            ratio=seconds[rival] / seconds[ours],
            gmac_per_s=macs / seconds[ours] / 1e9,
            **_machine(),
        )

    return run


@pytest.fixture
def compare_layer(compare: Compare) -> Compare:
    """``compare_layer(kernel, layer, x, shape, also=())``: a kernel of dispatch's table against all dense ones and those of
    ``also``, each on the image ``x`` in the format that it takes."""

    def run(kernel: str, layer: DenseConv2d, x: torch.Tensor, shape: ConvShape, also: tuple[str, ...] = ()) -> None:
        options, why_not = options_for(layer, "cpu")
        wanted = [o.candidate for o in options if o.candidate.dense or o.candidate.kernel in (kernel, *also)]
        if kernel not in (candidate.kernel for candidate in wanted):
            pytest.skip(why_not)
        fns = calls(layer, x, wanted)
        labels = {"network": shape.network, "layer": shape.name, "count": shape.count, "shape": str(layer.geometry)}
        compare(fns, kernel, shape.macs, pattern=layer.info.pattern, **labels)

    return run
