"""The cases of the GPU tests through the launchers, on a device: each output against the reference, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import cnncomp
from cnncomp.ops import cuda, reference
from tests.test_cuda_kernels import CONVS, OUT_DTYPES, RESIDUALS, random_constants, random_tensor

LINEAR = ((1, 16, 1), (64, 64, 64), (63, 48, 65), (130, 192, 8), (5, 256, 100), (129, 64, 257), (7, 33, 19))
DTYPES = (torch.uint8, torch.int8)


def conv_sizes(name: str) -> dict[str, Any]:
    """A convolution of CONVS with all its sizes."""
    default = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    return default | {key: value for key, value in CONVS[name].items() if key != "kernel"}


def _differing(got: Tensor, expected: Tensor) -> int:
    return int((got.cpu() != expected).sum())


def check_conv(
    run: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, out_dtype: torch.dtype,
    residual: torch.dtype | None, n: int, c: int, h: int, w: int, k: int, r: int, s: int, stride: tuple[int, int],
    padding: tuple[int, int], dilation: tuple[int, int], groups: int,
) -> int:  # fmt: skip
    """Elements of a convolution that differ; ``run`` is a launcher with the arguments of ``cuda.conv2d_int8``."""
    torch.manual_seed(n + c + h + k)
    x, weight = random_tensor((n, c, h, w), dtype), torch.randint(-127, 128, (k, c // groups, r, s), dtype=torch.int8)
    constants, lo = random_constants(k, r * s * c // groups, out_dtype)
    geometry = (stride, padding, dilation, groups)
    shape = tuple(torch.nn.functional.conv2d(x.float(), weight.float(), None, *geometry).shape)
    res = None if residual is None else random_tensor(shape, residual)
    expected = reference.conv2d_int8(x, weight, constants, res, 0.37, lo, *geometry, out_dtype)
    packed = weight.permute(0, 2, 3, 1).contiguous()
    placed = [None if t is None else t.to(device) for t in (x, packed, constants, res)]
    return _differing(run(*placed, 0.37, lo, *geometry, out_dtype), expected)


def check_linear(
    run: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, out_dtype: torch.dtype,
    residual: torch.dtype | None, m: int, c: int, k: int,
) -> int:  # fmt: skip
    """The same of a linear layer."""
    torch.manual_seed(m + c + k)
    x, weight = random_tensor((m, c), dtype), torch.randint(-127, 128, (k, c), dtype=torch.int8)
    constants, lo = random_constants(k, c, out_dtype)
    res = None if residual is None else random_tensor((m, k), residual)
    expected = reference.linear_int8(x, weight, constants, res, -0.61, lo, out_dtype)
    placed = [None if t is None else t.to(device) for t in (x, weight, constants, res)]
    return _differing(run(*placed, -0.61, lo, out_dtype), expected)


def check_graph(device: torch.device) -> int:
    """Elements that differ between an int8 network and the same within :func:`cnncomp.cuda_graph`, on several inputs, and one
    more if it was not captured."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 32, 3, 2, 1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(576, 10),
    )
    inputs = torch.randn(4, 8, 3, 20, 20)
    quantized = cnncomp.quantize(nn.Sequential(*layers).eval(), [*inputs], progress=False)
    inputs = inputs.to(device)
    network = cnncomp.convert(quantized, inputs[0], measure=False)
    graphed = cnncomp.cuda_graph(network, inputs[0])
    return sum(_differing(graphed(x), network(x).cpu()) for x in inputs) + (graphed.num_graphs != 1)


def launchers(device: torch.device) -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]]:
    """Convolution and linear layer of each backend: the package's own choice, and Triton's where a GPU runs it."""
    found = {"chosen": (cuda.conv2d_int8, cuda.linear_int8)}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        from cnncomp.kernels import available

        if available():
            from cnncomp.kernels.conv2d_int8 import conv2d_int8
            from cnncomp.kernels.gemm_int8 import linear_int8

            found["triton"] = (conv2d_int8, linear_int8)
    return found


def cases(device: torch.device, every: bool) -> Iterator[dict[str, Any]]:
    """A record per case: what it was and how many elements differ.

    Args:
        device: Where the launchers run; the CPU within ``tests.cuda_device.emulated_device``.
        every: All dtypes of input, output and residual with all shapes; else each shape with one of them in turn.
    """
    if device.type == "cuda":
        yield {"backend": "chosen", "case": "network in a CUDA graph", "types": [], "differing": check_graph(device)}
    kinds = list(itertools.product(DTYPES, OUT_DTYPES, RESIDUALS))
    for backend, (conv, linear) in launchers(device).items():
        shapes = [("conv", name) for name in CONVS] + [("linear", sizes) for sizes in LINEAR]
        for number, (op, which) in enumerate(shapes):
            for kind in kinds if every else [kinds[7 * number % len(kinds)]]:
                if op == "conv":
                    differing = check_conv(conv, device, *kind, **conv_sizes(str(which)))
                else:
                    differing = check_linear(linear, device, *kind, *which)  # type: ignore[arg-type]
                yield {
                    "backend": backend, "case": f"{op} {which}", "types": [str(t) for t in kind], "differing": differing
                }  # fmt: skip
