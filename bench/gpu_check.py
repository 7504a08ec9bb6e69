"""The int8 CUDA kernels on this machine's GPU, in one command: exact or not, how fast beside others, and the model's guess.

    python -m bench.gpu_check              # needs an NVIDIA GPU
    python -m bench.gpu_check --emulate    # a dry run: the launches go to the emulator, nothing is timed

Writes ``build/bench/gpu_check.json``: device, versions, the small cases of the GPU tests in all their types, one record per
layer with the times of cuDNN, inductor and CUTLASS and what bench/gpu_model.py says of each, what compute-sanitizer said where
it is there. The exit status is 1 if an output differs from the reference in any bit, or compute-sanitizer found an error.
``pytest bench/bench_gpu.py`` times the same calls one after the other, in a warm cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.layers import NETWORKS, ConvShape, conv_shapes
from cnncomp import __version__
from cnncomp.ops import cuda, reference

OUT = Path("build/bench/gpu_check.json")
WARM_UP, REPEATS = 5, 50
COLD = 256 << 20  # bytes written between two timed launches, more than any L2


def tensors(shape: ConvShape, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random input (uint8, channels last), weight (int8) and constants of a layer."""
    torch.manual_seed(0)
    g = shape.geometry
    x = torch.randint(0, 256, (batch, shape.c, shape.h, shape.w), dtype=torch.uint8).contiguous(
        memory_format=torch.channels_last
    )
    weight = torch.randint(-127, 128, (shape.k, shape.c // shape.groups, shape.r, shape.s), dtype=torch.int8)
    scale = (torch.rand(shape.k) + 0.5) * 100 / (7000 * g.reduction**0.5)
    return x, weight, torch.stack([scale, torch.randn(shape.k) * 30 + 30, torch.full((shape.k,), 255.0)])


def milliseconds(call: Any) -> list[float]:
    """Times of single launches with a cold L2, ascending."""
    flush = torch.empty(COLD, dtype=torch.uint8, device="cuda")
    found = []
    for repeat in range(WARM_UP + REPEATS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if repeat >= WARM_UP:
            found.append(start.elapsed_time(end))
    return sorted(found)


def own_call(shape: ConvShape, batch: int, device: torch.device) -> tuple[Callable[[], Tensor], Tensor]:
    """The package's int8 kernel on a layer, and what it must give."""
    x, weight, constants = tensors(shape, batch)
    g = shape.geometry
    geometry = (g.stride, g.padding, g.dilation, g.groups)
    expected = reference.conv2d_int8(x, weight, constants, None, 0.0, 0.0, *geometry, torch.uint8)
    placed = [t.to(device) for t in (x, weight.permute(0, 2, 3, 1).contiguous(), constants)]
    return lambda: cuda.conv2d_int8(*placed, None, 0.0, 0.0, *geometry, torch.uint8), expected


def peer_calls(
    shape: ConvShape, batch: int, device: torch.device
) -> dict[str, Callable[[], list[Callable[[], object]]]]:
    """What makes each peer's calls on a layer, of which the fastest counts: cuDNN in fp16, inductor's tuned fp16 convolution,
    and each tile of CUTLASS's in int8 and fp16, built on the spot."""
    g = shape.geometry
    geometry = (g.stride, g.padding, g.dilation, g.groups)
    x, weight, _ = tensors(shape, batch)
    half = [t.to(device, torch.float16).contiguous(memory_format=torch.channels_last) for t in (x, weight)]

    def inductor() -> list[Callable[[], object]]:
        tuned = torch.compile(
            lambda x, weight: torch.nn.functional.conv2d(x, weight, None, *geometry).relu(),
            options={"max_autotune": True, "max_autotune_conv_backends": "TRITON"}, dynamic=False,
        )  # fmt: skip
        return [lambda: tuned(*half)]

    def cutlass(dtype: str) -> list[Callable[[], object]]:
        from bench import cutlass_device, gpu_peers

        arch = "75" if torch.cuda.get_device_capability(device) < (8, 0) else "80"
        return [cutlass_device.conv(*found) for found in gpu_peers.conv_variants(shape, batch, arch, dtype)]

    found: dict[str, Callable[[], list[Callable[[], object]]]] = {
        "cudnn_fp16": lambda: [lambda: torch.nn.functional.conv2d(*half, None, *geometry)],
        "inductor_fp16": inductor,
    }
    if shape.groups == 1:
        found |= {f"cutlass_{dtype}": lambda dtype=dtype: cutlass(dtype) for dtype in ("int8", "fp16")}  # type: ignore[misc]
    return found


def check_layer(shape: ConvShape, batch: int, device: torch.device) -> dict[str, Any]:
    """Run a layer on the device and compare it with the reference, bit for bit; on a GPU time it and its peers."""
    call, expected = own_call(shape, batch, device)
    differing = int((call().cpu() != expected).sum())
    record: dict[str, Any] = {"network": shape.network, "layer": shape.name, "batch": batch, "differing": differing}
    if device.type == "cuda":
        record["us"] = middle(milliseconds(call))
        record["peers"] = {
            name: attempt(lambda make=make: min(middle(milliseconds(c)) for c in make()))  # type: ignore[misc]
            for name, make in peer_calls(shape, batch, device).items()
        }
        record["modelled_us"] = modelled(shape, batch, device)
    return record


def middle(values: list[float]) -> float:
    """Median of ascending milliseconds, in microseconds."""
    return 1e3 * values[len(values) // 2]


def attempt(call: Callable[[], float]) -> float | str:
    """A time in microseconds, or why there is none: what fails in a peer is no failure of this project's."""
    try:
        return call()
    except Exception as error:  # of another project's compiler, loader or launch
        return f"{type(error).__name__}: {str(error)[:300]}"


def modelled(shape: ConvShape, batch: int, device: torch.device) -> dict[str, float | str]:
    """What bench/gpu_model.py says of this layer: of the package's kernel ("cnncomp"), and of the peers that it has kernels of.

    Nothing for a GPU that it has no facts of, or without nvcc.
    """
    from bench.gpu_hardware import GPUS
    from bench.gpu_model import model
    from tests import cuda_emulated

    capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    gpu = next((gpu for gpu in GPUS if gpu.arch == capability), None)
    if gpu is None or cuda_emulated.NVCC is None:
        return {}
    from bench import gpu_peers
    from bench.gpu_layers import run_layer

    arch = "75" if capability == "sm_75" else "80"
    best = lambda candidates: min(model(*c.counted, gpu)["us"] for c in candidates)  # noqa: E731
    found = {"cnncomp": attempt(lambda: float(model(*run_layer(shape, batch, arch, gpu)[0], gpu)["us"]))}
    if shape.groups == 1:
        for dtype in ("int8", "fp16"):
            made = lambda dtype=dtype: gpu_peers.conv_candidates(shape, batch, arch, dtype)  # noqa: E731
            found[f"cutlass_{dtype}"] = attempt(lambda made=made: best(made()))  # type: ignore[misc]
        if arch != "75" and shape.dilation == 1:
            found["inductor_fp16"] = attempt(lambda: best(gpu_peers.inductor_candidates(shape, batch, "fp16")))
    return found


def sanitize() -> dict[str, Any] | None:
    """Two small layers under compute-sanitizer's memcheck and racecheck; None where it isn't installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return None
    command = [
        sys.executable,
        "-m",
        "bench.gpu_check",
        "--layers",
        "2",
        "--no-sanitizer",
        "--out",
        str(OUT.with_suffix(".tmp.json")),
    ]
    found = {}
    for kind in ("memcheck", "racecheck", "synccheck"):
        run = subprocess.run([tool, "--tool", kind, "--error-exitcode", "9", *command], capture_output=True, text=True)
        found[kind] = {"ok": run.returncode == 0, "tail": run.stdout[-2000:]}
    return found


def device_facts(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {"cnncomp": __version__, "torch": torch.__version__, "device": "emulator"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name, "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(), "backend": cuda.backend(device),
        }  # fmt: skip
    return facts


def run(emulate: bool, networks: list[str], batches: list[int], layers: int | None, sanitizer: bool) -> dict[str, Any]:
    """The whole report. With ``emulate`` only small batches make sense."""
    context: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    device = torch.device("cpu" if emulate else "cuda:0")
    if emulate:
        from tests.cuda_device import emulated_device

        context = emulated_device()
    elif not torch.cuda.is_available():
        raise SystemExit("gpu_check: torch sees no GPU; --emulate makes a dry run in the emulator")
    with context:
        records = [
            check_layer(shape, batch, device)
            for network in networks
            for batch in batches
            for shape in conv_shapes(network)[:layers]
        ]
        from bench.gpu_exact import cases

        return {
            **device_facts(device),
            "cases": list(cases(device, every=not emulate)),
            "sanitizer": sanitize() if sanitizer and not emulate else None,
            "layers": records,
        }


def report(found: dict[str, Any]) -> str:
    lines = [f"{found['device']}, cnncomp {found['cnncomp']}, torch {found['torch']}"]
    wrong = [case for case in found["cases"] if case["differing"]]
    lines.append(f"{len(found['cases']) - len(wrong)} of {len(found['cases'])} small cases exact")
    lines += [f"  {c['backend']} {c['case']} {' '.join(c['types'])}: {c['differing']} DIFFER" for c in wrong]
    for r in found["layers"]:
        text = f"{r['network']:14} {r['layer']:28} batch {r['batch']:3d} " + (
            "exact" if not r["differing"] else f"{r['differing']} DIFFER"
        )
        if "us" in r:
            times = {"cnncomp": r["us"], **r["peers"]}
            text += "  us (modelled): " + ", ".join(
                f"{name} {us:.1f}"
                + (f" ({guess:.1f})" if isinstance(guess := r["modelled_us"].get(name), float) else "")
                for name, us in times.items()
                if isinstance(us, float)
            )
        lines.append(text)
    return "\n".join(lines)


def failed(found: dict[str, Any]) -> bool:
    sanitizer = found["sanitizer"] or {}
    return any(r["differing"] for r in (*found["layers"], *found["cases"])) or not all(
        kind["ok"] for kind in sanitizer.values()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--emulate", action="store_true", help="a dry run in the emulator")
    parser.add_argument("--network", action="append", choices=NETWORKS, help="all by default")
    parser.add_argument("--batch", action="append", type=int, help="1, 8 and 64 by default; 1 in the emulator")
    parser.add_argument("--layers", type=int, help="the first so many distinct layers of each network")
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    a = parser.parse_args()
    batches = a.batch or ([1] if a.emulate else [1, 8, 64])
    found = run(a.emulate, a.network or list(NETWORKS), batches, a.layers, not a.no_sanitizer)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(found, indent=1))
    print(report(found))
    print(a.out)
    sys.exit(failed(found))


if __name__ == "__main__":
    main()
