"""From how many zeros on int8 kernels with sparse weights pay on a GPU: ``python -m bench.gpu_crossover``.

Modelled, not measured (bench/gpu_model.py). Writes the table by which dispatch chooses where nothing can be measured
(cnncomp/dispatch/modelled.py): for convolutions of a grid of sizes, the time of the dense int8 kernel over that of each sparse
one, with the copy of its input. ``--check NETWORK`` models the layers of a network instead, and says which of those that the
table takes the model puts behind dense.
"""

from __future__ import annotations

import argparse
import itertools
import json

import torch

from bench.gpu_hardware import GPUS, Gpu
from bench.gpu_layers import out_size, run_layer
from bench.gpu_model import model
from bench.gpu_sparse import GATHERED, Mask, image_of, run_sparse, units_pass
from bench.layers import GPU_NETWORKS, ConvShape, gpu_shapes
from cnncomp.dispatch import modelled
from cnncomp.dispatch.modelled import CHANNELS, IMAGES, KERNELS, SIZES, TABLE, Size

MASKS = (
    Mask("sparse24", 0.5),
    *(Mask("blocks", zeros) for zeros in (0.5, 0.75, 0.9)),
    *(Mask("vectors", zeros) for zeros in (0.5, 0.75, 0.9)),
    *(Mask("vnm", zeros) for zeros in (0.75, 0.9)),
)
#: One GPU of each architecture that the table knows.
MODELLED = tuple(gpu for gpu in GPUS if gpu.arch in ("sm_80", "sm_90"))


def ratio(shape: ConvShape, batch: int, gpu: Gpu, mask: Mask) -> float | None:
    """Modelled time of the dense int8 kernel over that of a sparse one, its copy included; None where it can't run."""
    run = run_sparse(shape, batch, "80", gpu, "int8", mask)
    if run is None:
        return None
    dense, _ = run_layer(shape, batch, gpu.code, gpu)
    us = float(model(*run[0], gpu)["us"])
    if mask.format in GATHERED:
        us += units_pass(image_of(shape, batch, mask, torch.uint8), gpu, torch.uint8, mask.format)
    return float(model(*dense, gpu)["us"]) / us


def crossovers() -> dict[str, dict[str, dict[str, dict[str, list[list[list[float]]]]]]]:
    """Ratios by architecture, format, kernel size, zeros, and then channels, images and size of the output."""
    found: dict[str, dict[str, dict[str, dict[str, list[list[list[float]]]]]]] = {}
    for gpu, mask, (name, kernel) in itertools.product(MODELLED, MASKS, KERNELS.items()):

        def at(c: int, n: int, size: int, kernel: int = kernel, gpu: Gpu = gpu, mask: Mask = mask) -> float:
            shape = ConvShape("grid", "", 1, c, size, size, c, kernel, kernel, 1, kernel // 2, 1, 1)
            found = ratio(shape, n, gpu, mask)
            assert found is not None, shape
            return round(found, 2)

        ratios = [[[at(c, n, size) for size in SIZES] for n in IMAGES] for c in CHANNELS]
        found.setdefault(gpu.arch, {}).setdefault(mask.format, {}).setdefault(name, {})[f"{mask.sparsity:g}"] = ratios
        print(gpu.name, mask, name, flush=True)
    return found


def check(network: str, batches: tuple[int, ...] = (1, 8, 64)) -> list[str]:
    """A line for each layer and kernel that the table takes; "behind" in those that the model puts behind dense."""
    lines = []
    for gpu, batch, mask, shape in itertools.product(MODELLED, batches, MASKS, gpu_shapes(network)):
        p, q = out_size(shape)
        size = Size((shape.r, shape.s), min(shape.c, shape.k), batch, p * q)
        expected = (
            modelled.gain(gpu.arch, mask.format, mask.sparsity, size) if shape.groups == shape.stride == 1 else None
        )
        if expected is None or expected * modelled.MARGIN < 1 or (found := ratio(shape, batch, gpu, mask)) is None:
            continue
        verdict = "behind" if found < 1 else "ahead"
        case = f"{gpu.name} {batch} {mask.pattern('int8')} {mask.sparsity:.0%} {shape}"
        lines.append(f"{case}: {expected:.2f}, {found:.2f} {verdict}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", choices=GPU_NETWORKS)
    arguments = parser.parse_args()
    if arguments.check:
        lines = check(arguments.check)
        print("\n".join(lines))
        print(f"{sum('behind' in line for line in lines)} of {len(lines)} behind dense")
        return
    TABLE.write_text(json.dumps(crossovers(), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
