"""Random int8 convolutions and what they must give, for the tests that call the CPU kernels directly."""

from __future__ import annotations

import ctypes
import math
import mmap
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cnncomp.ops.conv2d_int8 import ACTIVATION_CODE
from cnncomp.ops.reference import ACTIVATIONS

U8, S8, F32 = torch.uint8, torch.int8, torch.float32
CODE = {U8: 0, S8: 1, F32: 2}
PROT_NONE = 0
#: What comes behind an activation.
OUT_FACTOR = 1.37
RANGE = {U8: (0.0, 255.0), S8: (-128.0, 127.0), F32: (-3.0, 6.0)}


@dataclass(frozen=True)
class Conv:
    """One call of the kernel. ``residual`` and ``out`` are dtypes."""

    c: int
    k: int
    n: int = 1
    h: int = 1
    w: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)
    dil: tuple[int, int] = (1, 1)
    groups: int = 1
    x: torch.dtype = U8
    residual: torch.dtype | None = None
    out: torch.dtype = U8
    threads: int = 1
    shift: bool = False
    activation: str = ""  # before the clamp; OUT_FACTOR comes behind it

    @property
    def depthwise(self) -> bool:
        return 1 < self.groups == self.c == self.k

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        size = [
            (s + 2 * p - d * (r - 1) - 1) // t + 1
            for s, p, d, r, t in zip((self.h, self.w), self.pad, self.dil, self.kernel, self.stride, strict=True)
        ]
        return self.n, self.k, size[0], size[1]


@dataclass
class Operands:
    x: Tensor  # (n, c, h, w)
    weight: Tensor  # (k, c / groups, r, s)
    constants: Tensor  # (3, k), (4, k) with a shift
    residual: Tensor | None  # (n, k, p, q)
    residual_scale: float
    lo: float


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype == F32:
        return torch.randn(shape)
    return torch.randint(0, 256, shape, dtype=U8) if dtype == U8 else torch.randint(-128, 128, shape, dtype=S8)


def random_operands(conv: Conv) -> Operands:
    taps = conv.c // conv.groups * math.prod(conv.kernel)
    lo, hi = RANGE[conv.out]
    # Most outputs inside the range, and enough of them at half-way points and beyond both ends.
    scale = (0.25 + torch.rand(conv.k)) * (hi - lo) / (180 * 73 * math.sqrt(taps))
    bias = (torch.rand(conv.k) - 0.2) * (hi - lo) / 2
    bias[::3] = bias[::3].round() + 0.5
    scale[::5] = 0.0
    constants = torch.stack([scale, bias, torch.full((conv.k,), hi)])
    constants[2, ::4] -= 0.25 * (hi - lo)
    if conv.shift:  # of the size of the other term
        shift = torch.randn(conv.k) * (hi - lo) / (200 * taps)
        constants = torch.cat([constants, shift[None]])
    residual = None if conv.residual is None else random_tensor(conv.out_shape, conv.residual)
    weight = torch.randint(-127, 128, (conv.k, conv.c // conv.groups, *conv.kernel), dtype=S8)
    return Operands(random_tensor((conv.n, conv.c, conv.h, conv.w), conv.x), weight, constants, residual, 0.37, lo)


def bounded(o: Operands) -> Operands:
    """The same with weights of which few are large: two products of bytes seldom leave 16 bits, or just not."""
    few = torch.rand(o.weight.shape) < 0.02
    weight = torch.where(few, o.weight, o.weight // 8)
    weight[::7, ::4], weight[::7, 1::4] = 64, 64  # with inputs of 255 the largest sums that fit
    weight[1::7, 2::4], weight[1::7, 3::4] = -64, -64
    return replace(o, weight=weight)


def ending(conv: Conv) -> tuple[int, float]:
    """The kernels' last arguments."""
    return ACTIVATION_CODE[conv.activation], OUT_FACTOR if conv.activation else 1.0


def reference(conv: Conv, o: Operands) -> Tensor:
    """The convolution in float64, where it is exact, then the epilogue's steps one by one."""
    where = (None, conv.stride, conv.pad, conv.dil, conv.groups)
    acc = F.conv2d(o.x.double(), o.weight.double(), *where)
    scale, bias, hi, *shift = (row.reshape(1, -1, 1, 1) for row in o.constants)
    t = acc.to(torch.int32).float() * scale
    t = t + bias
    if shift:
        t = t + shift[0] * F.conv2d(o.x.double(), torch.ones_like(o.weight).double(), *where).float()
    if o.residual is not None:
        t = t + o.residual.float() * torch.tensor(o.residual_scale)
    if conv.activation:
        t = ACTIVATIONS[conv.activation](t) * torch.tensor(OUT_FACTOR)
    t = torch.minimum(torch.maximum(t, torch.tensor(o.lo)), hi)
    return t if conv.out == F32 else torch.round(t).to(conv.out)


#: Strides, dilations, paddings and groups that are not the usual ones.
GEOMETRIES = (
    Conv(3, 64, 1, 33, 31, (7, 7), (2, 2), (3, 3)),
    Conv(8, 20, 2, 11, 9, (3, 3), (3, 3), (2, 2), (2, 2)),
    Conv(6, 17, 1, 8, 13, (1, 5), (1, 2), (0, 4), (1, 3)),
    Conv(5, 8, 3, 6, 6, (5, 2), (1, 1), (4, 1), (1, 2), x=S8),
    Conv(4, 16, 1, 2, 2, (3, 3), (1, 1), (5, 5)),  # whole tiles of padding
    Conv(12, 24, 2, 5, 5, (3, 3), (1, 1), (1, 1), groups=3),
    Conv(15, 60, 1, 7, 7, (3, 3), (2, 1), (1, 0), groups=5, x=S8),
    # Windows of one row that leave columns out
    Conv(1, 16, 1, 1, 400, (1, 3), (1, 8)),
    Conv(3, 20, 2, 3, 83, (1, 2), (1, 4), x=S8),
    Conv(3, 16, 1, 2, 200, (1, 2), (1, 9), (0, 1)),
)


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


class Guarded:
    """Copies of tensors that end where a page ends that must not be touched."""

    def __init__(self) -> None:
        self.kept: list[tuple[mmap.mmap, object]] = []

    def __call__(self, x: Tensor) -> Tensor:
        size = x.numel() * x.element_size()
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
        buffer = (ctypes.c_char * len(memory)).from_buffer(memory)
        end = ctypes.addressof(buffer) + pages
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, PROT_NONE) == 0
        self.kept.append((memory, buffer))
        if size == 0:
            return x
        copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=pages - size).reshape(x.shape)
        return copy.copy_(x)
