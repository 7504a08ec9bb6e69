"""What stands in the machine code that Triton makes of every shipped kernel: the static gate and its table.

``python -m tests.triton_gate`` writes the table that test_triton_gate.py compares with, for review.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton

from bench.gpu_hardware import blocks_per_sm, gpu_of
from tests.cuda_gate import Row, main_loop
from tests.triton_aot import compile_kernel, inspect

ARCHS = (80, 86, 89, 90, 120)
SNAPSHOT = Path(__file__).parent / "triton_gate.txt"
COLUMNS = ("IMMA", "IGMMA", "HMMA", "HGMMA", "FFMA", "LDSM", "LDGSTS", "LDG", "STG", "PRMT", "LDL", "STL")
PRODUCTS = ("IMMA", "IGMMA", "HMMA", "HGMMA")
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes that a block may have; 99 KB elsewhere
CONV_INTEGERS = (
    "m", "h", "w", "c", "k", "p", "q", "k_group", "stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w",
)  # fmt: skip
ALIGNED = {"c", "k", "c_group", "k_group"}


@dataclass(frozen=True)
class Variant:
    """A kernel as it is launched: its name in the table, and what ``compile_kernel`` takes.

    ``copies``: tiles come by asynchronous copies. ``products``: tensor cores multiply.
    """

    name: str
    kernel: Any
    pointers: dict[str, str | None]
    integers: dict[str, bool]
    floats: tuple[str, ...]
    meta: dict[str, Any]
    options: dict[str, Any]
    copies: bool = True
    products: bool = True

    def compiled(self, arch: int) -> Any:
        return compile_kernel(
            self.kernel, self.pointers, self.integers, self.floats, self.meta, arch, self.options
        )  # fmt: skip


def int8_variant(
    name: str, kernel: Any, integers: tuple[str, ...], tile: Any, meta: dict[str, Any], dtype: str = "u8",
    residual: str | None = "u8", out: str = "u8", aligned: bool = True, **about: bool,
) -> Variant:  # fmt: skip
    """A kernel with the int8 epilogue.

    Args:
        name: In the table.
        kernel: A ``triton.jit`` function.
        integers: Its integer arguments.
        tile: A Tile.
        meta: Compile-time arguments beside the tile's.
        dtype, residual, out: Element types, "u8", "i8", "fp32"; no residual is None.
        aligned: Channels are multiples of 16.
        about: ``copies``, ``products`` of Variant.
    """
    pointers = {"x_ptr": dtype, "weight_ptr": "i8", "constants_ptr": "fp32", "residual_ptr": residual, "out_ptr": out}
    multiples = {i: aligned and i in ALIGNED for i in integers}
    sizes = {key: value for key, value in tile.meta().items() if key in kernel.arg_names}
    return Variant(
        name, kernel, pointers, multiples, ("residual_scale", "lo", "out_factor"), sizes | {"ACTIVATION": ""} | meta,
        tile.options(), **about,
    )  # fmt: skip


def steps_variant(name: str, dtype: str, block: tuple[int, int], meta: dict[str, Any], aligned: bool = True) -> Variant:
    """The kernel with block sparse weights.

    Args:
        name: In the table.
        dtype: Of the activations, "u8", "i8", "fp16" or "bf16".
        block: Outputs and inputs of a block.
        meta: R, S, WHOLE.
        aligned: Channels are multiples of 16.
    """
    from cnncomp.kernels.conv2d_steps import conv2d_steps_kernel, tile_for
    from cnncomp.sparsity.vectors import UNIT

    element = "i8" if dtype == "u8" else dtype
    pointers: dict[str, str | None] = {"x_ptr": dtype, "values_ptr": element, "constants_ptr": "fp32", "out_ptr": dtype}
    pointers |= dict.fromkeys(("places_ptr", "first_ptr", "sums_ptr"), "i32") | {"residual_ptr": None}
    integers = [i for i in (*CONV_INTEGERS, "n", "c_group", "blocks") if i != "m"]
    tile = tile_for(block[0], 1 if element == "i8" else 2)
    sizes = {"ROWS": block[0], "COLS": block[1], "UNIT": UNIT if block[1] == 1 else 1}
    return Variant(
        name, conv2d_steps_kernel, pointers, {i: aligned and i in ALIGNED for i in integers},
        ("residual_scale", "lo", "out_factor"), sizes | meta | {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k},
        tile.options(),
    )  # fmt: skip


@cache
def variants() -> tuple[Variant, ...]:
    """Every shipped kernel with every tile."""
    return tuple(_variants())


def _variants() -> Iterator[Variant]:
    from cnncomp.kernels import conv2d_int8 as conv
    from cnncomp.kernels import launch
    from cnncomp.kernels.conv2d_sparse import conv2d_sparse_kernel
    from cnncomp.kernels.gemm_int8 import gemm_int8_kernel

    taps = {"R": 3, "S": 3}
    with_group = (*CONV_INTEGERS, "c_group")
    for tile in launch.TILES:
        size = "{}x{}x{}_{}".format(*tile[:3], tile.num_stages)
        for dtype in ("u8", "i8"):
            meta = {"WORDS": True}
            yield int8_variant(f"gemm_int8_{size}_{dtype}", gemm_int8_kernel, ("m", "c", "k"), tile, meta, dtype)
            yield int8_variant(
                f"conv2d_int8_{size}_{dtype}", conv.conv2d_int8_kernel, with_group, tile,
                taps | meta | {"FLAT": False}, dtype,
            )  # fmt: skip
    flat = {"FLAT": True, "WORDS": False}
    yield int8_variant(
        "conv2d_int8_flat_u8",
        conv.conv2d_int8_kernel,
        with_group,
        conv.FLAT_TILE,
        taps | flat,
        aligned=False,
        copies=False,
    )
    yield int8_variant(
        "depthwise_int8_u8",
        conv.depthwise_int8_kernel,
        CONV_INTEGERS,
        conv.DEPTHWISE_TILE,
        taps,
        copies=False,
        products=False,
    )
    for name, blocks in (("blocks", ((64, 16), (64, 8))), ("vectors", ((32, 4), (32, 1)))):
        for dtype in ("u8", "i8", "fp16", "bf16"):
            kind, block = ("int8", blocks[0]) if dtype[1:] == "8" else ("f16", blocks[1])
            yield steps_variant(f"conv2d_{name}_{kind}_{dtype}", dtype, block, taps | {"WHOLE": True})
    for dtype in ("fp16", "fp32"):
        data = dict.fromkeys(["x_ptr", "values_ptr", "bias_ptr", "residual_ptr", "out_ptr"], dtype)
        yield Variant(
            f"conv2d_sparse_32_{dtype}", conv2d_sparse_kernel, data | {"positions_ptr": "i32", "block_ptr_ptr": "i32"},
            dict.fromkeys([*with_group, "blocks"], False), ("lo", "hi"),
            taps | {"V": 32, "BLOCK_M": 64, "BLOCK_K": 32, "PRECISION": "ieee"},
            {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}, copies=False, products=dtype == "fp16",
        )  # fmt: skip


@cache
def row(variant_name: str, arch: int) -> Row:
    """A variant, compiled for sm_<arch>."""
    variant = next(v for v in variants() if v.name == variant_name)
    report = inspect(variant.compiled(arch))
    threads = 32 * variant.options["num_warps"]
    blocks = blocks_per_sm(gpu_of(str(arch)), threads, report.registers, report.shared)
    loop = main_loop(report.sass) if variant.products else Counter()
    return Row(
        variant.name, str(arch), report.registers, report.stack, report.shared, threads, blocks, report.opcodes, loop
    )


def problems(variant: Variant, arch: int, found: Row) -> list[str]:
    """What is wrong with a kernel's machine code; nothing if all is well."""
    wrong = []
    spills = found.stack + found.opcodes["LDL"] + found.opcodes["STL"]
    if spills:
        wrong.append(f"spills: {found.stack} bytes of stack, {found.opcodes['LDL']} LDL, {found.opcodes['STL']} STL")
    if found.shared > SHARED.get(arch, 99 << 10):
        wrong.append(f"{found.shared} bytes of shared memory")
    if found.blocks * found.threads < 256:
        wrong.append(f"{found.blocks * found.threads} threads on a multiprocessor")
    products = sum(found.loop[o] for o in PRODUCTS)
    if variant.products and products < 2:
        wrong.append(f"the main loop has {products} products of tensor cores")
    if variant.copies and (found.loop["LDGSTS"] < 2 or found.loop["LDG"]):
        wrong.append(
            f"the main loop has {found.loop['LDGSTS']} asynchronous copies and {found.loop['LDG']} plain loads"
        )
    if "int8" in variant.name and found.opcodes["FFMA"]:
        wrong.append(f"{found.opcodes['FFMA']} FFMA: a multiply and an add of the epilogue were contracted")
    if variant.copies and found.loop["PRMT"]:
        wrong.append(f"the main loop has {found.loop['PRMT']} PRMT")
    return wrong


HEADER = " ".join(
    [f"{'kernel':32} {'arch':>4}"]
    + [f"{c:>7}" for c in ("regs", "stack", "shared", "threads", "blocks", "instr")]
    + [f"{c:>6}" for c in COLUMNS]
)


def line(found: Row) -> str:
    """Of the table: counts of the main loop where tensor cores multiply, else of the kernel."""
    shown = found.loop or found.opcodes
    sizes = (found.registers, found.stack, found.shared, found.threads, found.blocks, shown.total())
    counts = [f"{n:7d}" for n in sizes] + [f"{shown[c]:6d}" for c in COLUMNS]
    return " ".join([f"{found.kernel:32} {found.arch:>4}", *counts])


def compiler() -> str:
    """Other versions of Triton make other code."""
    return f"Triton {triton.__version__}"


def table() -> str:
    """The whole table."""
    lines = [line(row(variant.name, arch)) for variant in variants() for arch in ARCHS]
    return "\n".join([compiler(), HEADER, *lines]) + "\n"


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"
    SNAPSHOT.write_text(table())
