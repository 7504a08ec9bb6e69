"""CUDA kernels without a GPU: the extension module plans the launch, the emulator runs nvcc's PTX, the reference decides."""

from __future__ import annotations

import math
import os
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.layers import gpu_shapes
from cnncomp.ops import reference
from tests import cuda_emulated as emulated
from tests.ptx import MemoryFault, RaceError

_cuda = pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
pytestmark = pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")

ARCHS = (
    ("75", "80", "86", "89", "90a", "120a") if os.environ.get("CNNCOMP_GPU_FULL") else ("75", "80", "90a")
)  # one per code path
SMS = 108  # multiprocessors of an A100
TILES = {f"{m}x{n}": (m, n) for m, n in [(256, 128), (128, 128), (256, 64), (128, 64), (64, 64), (32, 128)]}
WORKSPACE = 2 << 20
INT_RANGE = {torch.uint8: (0, 256), torch.int8: (-128, 128)}
OUT_DTYPES = [torch.uint8, torch.int8, torch.float32]
RESIDUALS = [None, torch.uint8, torch.int8, torch.float32]


def random_tensor(shape, dtype):
    return (
        (torch.randn(shape) * 20).to(dtype)
        if dtype.is_floating_point
        else torch.randint(*INT_RANGE[dtype], shape, dtype=dtype)
    )


def random_constants(k, products, out_dtype, activation=""):
    """(3, k) constants that spread the outputs over the 8-bit range and past its ends, and lo; with an activation, its
    inputs over where it is curved and past that."""
    lo, top = {torch.uint8: (0.0, 255.0), torch.int8: (-128.0, 127.0)}.get(out_dtype, (-1e4, 1e4))
    scale = (torch.rand(k) + 0.5) * 100 / (7000 * products**0.5)
    hi = torch.where(torch.rand(k) < 0.3, torch.rand(k) * top, torch.tensor(top))
    bias = torch.randn(k) * 30 + 30
    return torch.stack([scale / 16, bias / 16, hi] if activation else [scale, bias, hi]), lo


def assert_same(got, expected, what):
    if not torch.equal(got, expected):
        at = (got != expected).nonzero()
        i = tuple(at[0].tolist())
        raise AssertionError(f"{what}: {len(at)} of {got.numel()} differ, first {i}: {got[i]}, expected {expected[i]}")


def check_conv(
    arch, n, c, h, w, k, r, s, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, dtype=torch.uint8,
    out_dtype=torch.int8, residual=None, tile="", parts=1, sms=SMS, kernel="", misalign=0, ptx=None, activation="",
):  # fmt: skip
    """One convolution against the reference; gives back what the emulator counted."""
    what = {name: value for name, value in locals().items() if name != "ptx"}
    torch.manual_seed(n + c + h + k)
    x, weight = random_tensor((n, c, h, w), dtype), torch.randint(-127, 128, (k, c // groups, r, s), dtype=torch.int8)
    constants, lo = random_constants(k, r * s * c // groups, out_dtype, activation)
    factor = 16.0 if activation and not out_dtype.is_floating_point else 1.0
    geometry = (stride, padding, dilation, groups)
    shape = tuple(torch.nn.functional.conv2d(x.float(), weight.float(), None, *geometry).shape)
    res = None if residual is None else random_tensor(shape, residual)
    expected = reference.conv2d_int8(
        x, weight, constants, res, 0.37 / factor, lo, *geometry, out_dtype, activation, factor
    )
    case = emulated.Case(x, weight, constants, res, shape, out_dtype, misalign, 0 if parts == 1 else WORKSPACE)
    plan = _cuda.plan_conv2d_int8(
        sms, case.x, dtype == torch.int8, n, h, w, c, case.weight, k, r, s,
        *stride, *padding, *dilation, groups, *case.epilogue(0.37 / factor, lo),
        *case.schedule(tile, parts, activation, factor),
    )  # fmt: skip
    assert re.match(kernel, plan["kernel"]), plan["kernel"]
    result = emulated.run_planned(plan, arch, case.memory, ptx)
    assert_same(case.output(), expected, what | {"plan": plan["kernel"]})
    assert case.workspace_is_zero()
    return result


def check_linear(
    arch, m, c, k, dtype=torch.uint8, out_dtype=torch.int8, residual=None, tile="", parts=1, kernel="", activation=""
):
    what = dict(locals())
    torch.manual_seed(m + c + k)
    x, weight = random_tensor((m, c), dtype), torch.randint(-127, 128, (k, c), dtype=torch.int8)
    constants, lo = random_constants(k, c, out_dtype, activation)
    factor = 16.0 if activation and not out_dtype.is_floating_point else 1.0
    res = None if residual is None else random_tensor((m, k), residual)
    expected = reference.linear_int8(x, weight, constants, res, -0.61 / factor, lo, out_dtype, activation, factor)
    case = emulated.Case(x, weight, constants, res, (m, k), out_dtype, 0, 0 if parts == 1 else WORKSPACE)
    plan = _cuda.plan_linear_int8(
        SMS, case.x, dtype == torch.int8, m, c, case.weight, k, *case.epilogue(-0.61 / factor, lo),
        *case.schedule(tile, parts, activation, factor),
    )  # fmt: skip
    assert re.match(kernel, plan["kernel"]), plan["kernel"]
    result = emulated.run_planned(plan, arch, case.memory)
    assert_same(case.output(), expected, what | {"plan": plan["kernel"]})
    assert case.workspace_is_zero()
    return result


def linear_edges(m, n):
    """Rows, reductions and channels at the edges of a tile: of the tile, of a slice (64), of the ring of steps (of 4 or 8)."""
    return [(m, 64, n), (m - 1, 16, n + 1), (m + 1, 80, n - 1), (1, 48, 1), (5, 576, n + 24), (m + 9, 512, 8)]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tile", TILES)
def test_linear_at_tile_edges(arch, tile):
    for i, (m, c, k) in enumerate(linear_edges(*TILES[tile])):
        check_linear(arch, m, c, k, list(INT_RANGE)[i % 2], tile=tile, kernel=f"gemm_int8_{tile}")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tile", TILES)
def test_linear_in_parts(arch, tile):
    """Blocks share a reduction: two of them, the last with less than the others, and more than there are slices."""
    m, n = TILES[tile]
    for rows, c, k, parts in [(m, 128, n, 2), (3, 464, n + 9, 3), (m + 1, 80, 8, 7)]:
        check_linear(arch, rows, c, k, torch.int8, tile=tile, parts=parts)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tile", TILES)
def test_last_tiles_are_shared(arch, tile):
    """Four tiles for three multiprocessors, and five with the last rows and channels missing: those past three are shared."""
    m, n = TILES[tile]
    for pixels, k, c, r in [(2 * m, 2 * n, 1024, 1), (5 * m - 7, n - 3, 512, 3)]:
        sizes = dict(n=1, c=c, h=1, w=pixels, k=k, r=1, s=r, padding=(0, r // 2), tile=tile, sms=3, parts=0)
        tiles = math.ceil(pixels / m) * math.ceil(k / n)
        assert check_conv(arch, **sizes, dtype=torch.int8).blocks > tiles
        assert check_conv(arch, **sizes | dict(parts=1)).blocks == tiles


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("k", [24, 21])  # whole vectors of 8 channels, and not
def test_linear_outputs_and_residuals(out_dtype, residual, k):
    check_linear("80", 19, 32, k, torch.int8, out_dtype, residual)


CONVS = {
    "pointwise": dict(n=2, c=32, h=6, w=7, k=16, r=1, s=1, kernel="gemm_int8_"),
    "3x3": dict(n=2, c=32, h=6, w=7, k=24, r=3, s=3, padding=(1, 1), kernel="conv2d_int8_"),
    "channels across steps": dict(n=1, c=80, h=4, w=5, k=65, r=3, s=3, padding=(1, 1)),
    "16 channels": dict(n=1, c=16, h=9, w=9, k=16, r=5, s=5, padding=(2, 2), stride=(2, 2)),
    "stem": dict(n=1, c=3, h=14, w=15, k=40, r=7, s=7, stride=(2, 2), padding=(3, 3), kernel="conv2d_int8_"),
    "odd channels": dict(n=1, c=33, h=4, w=4, k=5, r=2, s=3, padding=(1, 2)),
    "odd linear": dict(n=3, c=50, h=1, w=1, k=9, r=1, s=1),
    "uneven strides": dict(n=2, c=16, h=9, w=8, k=9, r=3, s=2, stride=(3, 2), padding=(0, 1)),
    "dilation": dict(n=1, c=32, h=8, w=9, k=8, r=3, s=3, padding=(2, 4), dilation=(2, 3)),
    "padding alone": dict(n=1, c=16, h=1, w=1, k=4, r=3, s=3, padding=(1, 1)),
    "groups": dict(n=1, c=32, h=5, w=5, k=12, r=3, s=3, padding=(1, 1), groups=2),
    "odd groups": dict(n=1, c=12, h=5, w=5, k=9, r=3, s=3, padding=(1, 1), groups=3),
    "depthwise": dict(n=2, c=20, h=9, w=7, k=20, r=3, s=3, stride=(2, 1), padding=(1, 1), groups=20,
                      kernel="depthwise_int8_4"),
    "odd depthwise": dict(n=1, c=7, h=5, w=6, k=7, r=3, s=3, padding=(1, 1), groups=7, kernel="depthwise_int8_1"),
    "depth multiplier": dict(n=1, c=4, h=6, w=5, k=8, r=3, s=3, padding=(1, 1), dilation=(1, 2), groups=4),
    "one group of one": dict(n=1, c=1, h=6, w=5, k=8, r=3, s=3, padding=(1, 1), kernel="conv2d_int8_"),
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CONVS)
def test_conv(name, arch):
    check_conv(arch, **CONVS[name])
    if arch == "80":
        check_conv(arch, **CONVS[name], dtype=torch.int8)


@pytest.mark.parametrize("name", ["3x3", "depthwise"])
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_conv_outputs_and_residuals(name, out_dtype, residual):
    check_conv("80", **CONVS[name], out_dtype=out_dtype, residual=residual)


def conv_edges(m, n):
    """Convolutions of a multiple of 64 channels, pixels and channels at the edges of a tile, taps and slices of all kinds."""
    return [
        dict(n=1, c=64, h=1, w=m, k=n, r=1, s=3, padding=(0, 1)),
        dict(n=m - 1, c=64, h=2, w=2, k=n + 1, r=2, s=2),
        dict(n=1, c=128, h=3, w=m + 1, k=n - 1, r=3, s=1),
        dict(n=1, c=64, h=1, w=1, k=1, r=3, s=3, padding=(1, 1)),
        dict(n=2, c=192, h=5, w=6, k=n + 24, r=3, s=3, stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
        dict(n=1, c=128, h=6, w=5, k=24, r=4, s=5, padding=(3, 2), groups=2),
    ]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tile", TILES)
def test_conv_at_tile_edges(arch, tile):
    m, n = TILES[tile]
    for i, sizes in enumerate(conv_edges(m, n)):
        check_conv(arch, **sizes, dtype=list(INT_RANGE)[i % 2], tile=tile, kernel=f"conv2d_int8_{tile}_.*_64_")
    check_conv(arch, **sizes, tile=tile, parts=3)
    check_conv(arch, 1, 64, 4, 4, n + 1, 3, 3, padding=(1, 1), dtype=torch.int8, tile=tile, parts=4)


def piece_edges(channels, m, n):
    """The same of convolutions whose channels are a multiple of so many bytes only."""
    c = channels
    return [
        dict(n=1, c=c, h=3, w=m, k=n, r=3, s=3, padding=(1, 1)),
        dict(n=m + 1, c=3 * c, h=2, w=2, k=n + 1, r=2, s=2),
        dict(n=1, c=5 * c, h=7, w=9, k=n - 1, r=5, s=3, stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
        dict(n=1, c=c, h=7, w=7, k=8, r=7, s=7, padding=(3, 3)),
        dict(n=2, c=6 * c, h=4, w=3, k=26, r=3, s=2, padding=(1, 0), groups=2),
    ]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "piece, channels, tile",
    [(16, 16, "64x64"), (16, 16, "128x64"), (8, 8, "128x64"), (4, 4, "128x64"), (1, 3, "128x64")],
)
def test_conv_of_pieces_at_tile_edges(arch, piece, channels, tile):
    for i, sizes in enumerate(piece_edges(channels, *TILES[tile])):
        kernel = f"conv2d_int8_{tile}_.*_{piece}_[us]8$"
        more = dict(tile=tile, parts=i % 3 + 1, misalign=int(piece == 1))
        check_conv(arch, **sizes, dtype=list(INT_RANGE)[i % 2], kernel=kernel, **more)


RUNS = [
    dict(n=2, c=3, h=14, w=16, k=40, r=7, s=7, stride=(2, 2), padding=(3, 3)),
    dict(n=1, c=3, h=12, w=11, k=64, r=3, s=3, padding=(1, 1)),
    dict(n=4, c=1, h=6, w=7, k=68, r=5, s=5, padding=(2, 2)),
    dict(n=1, c=5, h=8, w=9, k=12, r=2, s=7, dilation=(3, 1), padding=(3, 5)),
    dict(n=1, c=50, h=8, w=17, k=66, r=1, s=1),
    dict(n=3, c=2, h=3, w=6, k=8, r=3, s=11, padding=(2, 6), stride=(1, 3)),
]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("sizes", RUNS)
def test_conv_of_few_channels(arch, sizes):
    """Runs of one chunk and of many, inside the image and over all of its edges."""
    for dtype, parts in zip(INT_RANGE, (1, 2), strict=True):
        check_conv(arch, **sizes, dtype=dtype, parts=parts, kernel="conv2d_runs_int8_128x64")


DEPTHWISE = [
    dict(n=2, c=20, h=9, w=7, padding=(1, 1)),
    dict(n=1, c=4, h=3, w=3),
    dict(n=1, c=132, h=5, w=6, padding=(2, 2)),
    dict(n=3, c=8, h=1, w=1, padding=(1, 1)),
    dict(n=1, c=36, h=6, w=14, padding=(0, 1)),
]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("rows, multiprocessors", [(1, 10**6), (4, 0)])
def test_depthwise_3x3(arch, stride, rows, multiprocessors):
    for i, sizes in enumerate(DEPTHWISE):
        kernel = f"depthwise3x3_int8_{stride}_{rows}_"
        more = dict(k=sizes["c"], groups=sizes["c"], r=3, s=3, stride=(stride, stride), residual=RESIDUALS[i % 4])
        check_conv(arch, **sizes, **more, dtype=list(INT_RANGE)[i % 2], sms=multiprocessors, kernel=kernel)


def test_misaligned_input_is_read_byte_by_byte():
    check_conv("80", **CONVS["3x3"] | {"kernel": "conv2d_int8_.*_1_u8$"}, misalign=1)
    check_conv("80", **CONVS["3x3"] | {"kernel": "conv2d_int8_.*_8_u8$"}, misalign=8)
    check_conv("80", **CONVS["depthwise"] | {"kernel": "depthwise_int8_1"}, misalign=2)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_conv_random(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    groups, r, s, dilation = draw(1, 2), draw(1, 4), draw(1, 4), (draw(1, 2), draw(1, 2))
    check_conv(
        data.draw(st.sampled_from(ARCHS)), draw(1, 2), groups * data.draw(st.sampled_from([5, 16, 48, 64])),
        draw(dilation[0] * (r - 1) + 1, 9), draw(dilation[1] * (s - 1) + 1, 9), groups * draw(1, 70), r, s,
        (draw(1, 3), draw(1, 3)), (draw(0, 2), draw(0, 2)), dilation, groups,
        data.draw(st.sampled_from(list(INT_RANGE))), data.draw(st.sampled_from(OUT_DTYPES)),
        data.draw(st.sampled_from(RESIDUALS)),
    )  # fmt: skip


def test_extremes_and_ties():
    """255 * -127 throughout, and halves that must go to the even neighbour."""
    x, weight = torch.full((3, 512), 255, dtype=torch.uint8), torch.full((8, 512), -127, dtype=torch.int8)
    constants = torch.tensor([[1.0], [0.0], [float("inf")]]).expand(3, 8).contiguous()
    case = emulated.Case(x, weight, constants, None, (3, 8), torch.float32)
    plan = _cuda.plan_linear_int8(
        1, case.x, False, 3, 512, case.weight, 8, *case.epilogue(0.0, -float("inf")), *case.schedule()
    )
    emulated.run_planned(plan, "80", case.memory)
    assert_same(case.output(), torch.full((3, 8), -255.0 * 127 * 512), "extremes")

    x, weight = torch.zeros(11, 16, dtype=torch.int8), torch.zeros(8, 16, dtype=torch.int8)
    x[:, 0], weight[:, 0] = torch.arange(-5, 6), 1
    constants = torch.tensor([[0.5], [0.0], [127.0]]).expand(3, 8).contiguous()
    case = emulated.Case(x, weight, constants, None, (11, 8), torch.int8)
    plan = _cuda.plan_linear_int8(
        1, case.x, True, 11, 16, case.weight, 8, *case.epilogue(0.0, -128.0), *case.schedule()
    )
    emulated.run_planned(plan, "80", case.memory)
    assert case.output()[:, 3].tolist() == [-2, -2, -2, -1, 0, 0, 0, 1, 2, 2, 2]


@pytest.mark.parametrize("tile", TILES)
def test_shared_memory_has_no_bank_conflicts(tile):
    result = check_linear("80", 64, 256, 64, torch.int8, tile=tile)
    assert result.wavefronts == result.ideal_wavefronts > 0
    result = check_conv("80", n=1, c=64, h=8, w=8, k=64, r=3, s=3, padding=(1, 1), tile=tile)
    assert result.wavefronts == result.ideal_wavefronts > 0


@pytest.mark.parametrize("kernel", ["gemm_int8", "conv2d_int8", "conv2d_runs_int8"])
def test_warpgroups_are_fenced(kernel):
    """What the emulator does not see: copies are shown to the tensor cores before a barrier, sums fenced before products."""
    order = r"fence\.proxy\.async|bar\.sync|wgmma\.(?:fence|mma_async|commit_group|wait_group)"
    entries = emulated.ptx_of(kernel, "90a").split(".entry ")[1:]
    found = ["".join(f"{name} " for name in re.findall(order, entry)) for entry in entries]
    group = [text for text in found if "wgmma" in text]
    assert len(group) >= len(entries) - 2 * (kernel != "conv2d_runs_int8")  # but tiles of 32 rows, signed and not
    products = r"(wgmma\.fence (wgmma\.mma_async )+)+wgmma\.commit_group wgmma\.wait_group "
    for text in group:
        assert re.fullmatch(rf"(fence\.proxy\.async bar\.sync {products})+(bar\.sync )*", text), text


MUTANTS = {
    "barrier removed": (RaceError, r"bar\.sync[^;]*;", ""),
    "wait too weak": (RaceError, r"cp\.async\.wait_group 1;", "cp.async.wait_group 2;"),
    "copy of what is outside": (MemoryFault, r"(cp\.async\.c[ag]\.\S+ \[[^]]+\], \[[^]]+\], 16), %\w+;", r"\1, 16;"),
    "sum of a part lost": (AssertionError, r"(red\.global\.add\.s32 \[%\w+\]), %\w+;", r"\1, 0;"),
    "ticket before the sums": (RaceError, r"(membar\.gl|fence\.\S+);", ""),
}


def check_that_broken_is_caught(arch, error, pattern, replacement):
    ptx, count = re.subn(pattern, replacement, emulated.ptx_of("conv2d_int8", arch))
    assert count > 0
    sizes = dict(n=1, c=64, h=5, w=5, k=16, r=3, s=3, padding=(1, 1), tile="64x64", parts=2)
    check_conv(arch, **sizes)
    with pytest.raises(error):
        check_conv(arch, **sizes, ptx=ptx)


@pytest.mark.parametrize("name", MUTANTS)
def test_broken_kernel_is_caught(name):
    check_that_broken_is_caught("80", *MUTANTS[name])


WARPGROUP_MUTANTS = {
    "products not waited for": (RaceError, r"wgmma\.wait_group[^;]*;", ""),
    "products not committed": (RaceError, r"wgmma\.commit_group[^;]*;", ""),
    "products of other rows": (AssertionError, r"(wgmma\.mma_async.*), (%\w+), (%\w+), add;", r"\1, \3, \2, add;"),
    "barrier removed": (RaceError, r"bar\.sync[^;]*;", ""),
    "wait too weak": (RaceError, r"cp\.async\.wait_group \d;", "cp.async.wait_group 7;"),
}


@pytest.mark.parametrize("name", WARPGROUP_MUTANTS)
def test_broken_warpgroup_is_caught(name):
    check_that_broken_is_caught("90a", *WARPGROUP_MUTANTS[name])


def test_output_past_its_end_is_caught():
    x, weight = torch.zeros(5, 16, dtype=torch.uint8), torch.zeros(8, 16, dtype=torch.int8)
    case = emulated.Case(x, weight, torch.zeros(3, 8), None, (4, 8), torch.int8)
    plan = _cuda.plan_linear_int8(1, case.x, False, 5, 16, case.weight, 8, *case.epilogue(0.0, 0.0), *case.schedule())
    with pytest.raises(MemoryFault, match="out of bounds"):
        emulated.run_planned(plan, "80", case.memory)


def test_plan_fills_the_multiprocessors():
    """ResNet-50, one image, A100: at least 80 % have a block wherever there is much of a reduction to share."""
    for shape in gpu_shapes("resnet50"):
        g = shape.geometry
        sizes = (0, False, 1, shape.h, shape.w, shape.c, 0, shape.k, shape.r, shape.s)
        sizes = (*sizes, *g.stride, *g.padding, *g.dilation, 1)
        rest = (0, 0, 0, 0.0, 0.0, 0, 0)
        alone = _cuda.plan_conv2d_int8(SMS, *sizes, *rest, 0, 0, "", 0, 0, 1.0)
        assert alone["parts"] == 1, "there is no workspace to share sums in"
        plan = _cuda.plan_conv2d_int8(SMS, *sizes, *rest, 128, _cuda.WORKSPACE_BYTES, "", 0, 0, 1.0)
        if g.reduction >= 576:
            assert math.prod(plan["grid"]) >= 0.8 * SMS, (shape, plan)


def test_module_without_a_driver():
    if _cuda.device_count():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="cuda"):
        _cuda.device_info(0)


def test_bad_sizes_are_refused():
    rest = (0, 0, "", 0, 0, 1.0)
    with pytest.raises(ValueError, match="multiples of groups=3"):
        _cuda.plan_conv2d_int8(1, 0, False, 1, 4, 4, 4, 0, 6, 1, 1, 1, 1, 0, 0, 1, 1, 3, 0, 0, 0, 0.0, 0.0, 0, 0, *rest)
    with pytest.raises(ValueError, match="dtype code"):
        _cuda.plan_linear_int8(1, 0, False, 1, 4, 0, 6, 0, 0, 7, 0.0, 0.0, 0, 0, *rest)
    with pytest.raises(ValueError, match="tile: got 48x48"):
        _cuda.plan_linear_int8(1, 0, False, 1, 4, 0, 6, 0, 0, 0, 0.0, 0.0, 0, 0, 0, 0, "48x48", 0, 0, 1.0)
    with pytest.raises(ValueError, match="65535 groups"):
        _cuda.plan_conv2d_int8(
            1, 0, False, 1, 4, 4, 140000, 0, 140000, 1, 1, 1, 1, 0, 0, 1, 1, 70000, 0, 0, 0, 0.0, 0.0, 0, 0, *rest
        )
