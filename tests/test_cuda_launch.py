"""The GPU launch glue, cnncomp.ops.cuda, from torch tensors to the output, with the emulator in the place of the device."""

from __future__ import annotations

from math import prod

import pytest
import torch

from cnncomp.errors import ArgumentError, DeviceError
from cnncomp.ops import conv2d_int8, cuda, reference
from tests import cuda_emulated as emulated
from tests.cuda_device import EmulatedModule

_cuda = pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
pytestmark = pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "backend", lambda device: "cuda")
    monkeypatch.setattr(cuda, "_cuda", EmulatedModule())
    monkeypatch.setattr(cuda, "_launch_arguments", lambda x: (0, 0, 108))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    "groups, out_dtype, residual", [(1, torch.uint8, torch.int8), (16, torch.float32, torch.float32)]
)
def test_conv(layout, groups, out_dtype, residual):
    """Every argument differs from its neighbours, so none can change places unnoticed."""
    x = torch.randint(0, 256, (2, 16, 9, 11), dtype=torch.uint8).contiguous(memory_format=layout)
    weight = torch.randint(-127, 128, (16, 16 // groups, 3, 2), dtype=torch.int8)
    geometry = ((2, 1), (1, 0), (1, 2), groups)
    constants = torch.stack([torch.rand(16) * 2e-3, torch.randn(16) * 20 + 60, torch.full((16,), 240.0)])
    shape = torch.nn.functional.conv2d(x.float(), weight.float(), None, *geometry).shape
    res = torch.randint(-128, 128, shape).to(residual).contiguous(memory_format=layout)
    expected = reference.conv2d_int8(x, weight, constants, res, 0.25, 3.0, *geometry, out_dtype)
    packed = weight.permute(0, 2, 3, 1).contiguous()
    got = cuda.conv2d_int8(x, packed, constants, res, 0.25, 3.0, *geometry, out_dtype)
    assert got.is_contiguous(memory_format=torch.channels_last) and torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (48,)])
def test_linear(shape):
    x, weight = torch.randint(-128, 128, shape, dtype=torch.int8), torch.randint(-127, 128, (24, 48), dtype=torch.int8)
    constants = torch.stack([torch.rand(24) * 1e-3, torch.randn(24) * 20, torch.full((24,), 100.0)])
    args = (x, weight, constants, None, 0.0, -128.0, torch.int8)
    got = cuda.linear_int8(*args)
    assert got.shape == (*shape[:-1], 24)
    flat = (x.reshape(-1, 48), *args[1:])
    assert torch.equal(got.reshape(-1, 24), reference.linear_int8(*flat))


def test_blocks_share_a_reduction_and_leave_the_workspace_as_it_was():
    """One image's last layers have too few pixels for all multiprocessors: the plan splits them."""
    x, weight = (
        torch.randint(0, 256, (4, 1024), dtype=torch.uint8),
        torch.randint(-127, 128, (40, 1024), dtype=torch.int8),
    )
    constants = torch.stack([torch.rand(40) * 1e-4, torch.randn(40) * 20 + 60, torch.full((40,), 255.0)])
    args = (x, weight, constants, None, 0.0, 0.0, torch.uint8)
    expected = reference.linear_int8(*args)
    for _ in range(2):  # the second finds the zeros of the first
        assert torch.equal(cuda.linear_int8(*args), expected)
    plan = _cuda.plan_linear_int8(108, 0, False, 4, 1024, 0, 40, 0, 0, 0, 0.0, 0.0, 0, 0, 128, 1 << 20, "", 0, 0, 1.0)
    assert plan["parts"] > 1


def test_workspaces_of_streams_and_graphs(monkeypatch):
    """One for each stream, kept; another while a graph is captured."""
    ids = iter([0, 0, 7, 7, 8, 0])
    monkeypatch.setattr(cuda._cuda, "capture_id", lambda device, stream: next(ids))
    spaces = [cuda._workspace_arguments(torch.device("cpu"), 0, stream)[0] for stream in (1, 2, 2, 2, 2, 1)]
    assert len(set(spaces)) == 4 and spaces[2] == spaces[3] and spaces[0] == spaces[5]
    cuda._workspace.cache_clear()


@pytest.mark.parametrize(
    "shape, c, groups, match",
    [
        ((8, 3, 3, 8), 16, 1, "8, 3, 3, 16"),
        ((7, 3, 3, 16), 16, 1, "8, 3, 3, 16"),
        ((8, 1, 3, 16), 16, 1, "8, 3, 3, 16"),
        ((8, 3, 3, 5), 15, 3, "multiples of groups=3"),
    ],
)
def test_weights_of_other_sizes_are_refused_before_a_launch(shape, c, groups, match):
    """Kernels trust the sizes that they are told."""
    x, constants = torch.zeros(1, c, 5, 5, dtype=torch.uint8), torch.zeros(3, 8)
    rest = (constants, None, 0.0, 0.0)
    geometry = ((3, 3), (1, 1), (0, 0), (1, 1), groups)
    with pytest.raises(ArgumentError, match=match):
        conv2d_int8._conv_cuda(x, torch.zeros(shape, dtype=torch.int8), *rest, *geometry, torch.uint8)
    with pytest.raises(ArgumentError, match=r"expected \(8, 5\)"):
        conv2d_int8._linear_cuda(x, torch.zeros(8, 4, dtype=torch.int8), *rest, torch.uint8)


def test_empty_batches():
    constants = torch.zeros(3, 8)
    x, weight = torch.zeros(0, 16, 4, 4, dtype=torch.uint8), torch.zeros(8, 1, 1, 16, dtype=torch.int8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_cuda", _cuda)  # the real one must not launch anything
        out = cuda.conv2d_int8(x, weight, constants, None, 0.0, 0.0, (1, 1), (0, 0), (1, 1), 1, torch.uint8)
        linear = cuda.linear_int8(
            torch.zeros(0, 16, dtype=torch.uint8), weight.flatten(1), constants, None, 0.0, 0.0, torch.uint8
        )
    assert out.shape == (0, 8, 4, 4) and linear.shape == (0, 8) and prod(out.shape) == 0


@pytest.mark.parametrize("supported, capability, expected", [(True, (7, 5), "cuda"), (False, (9, 0), "triton")])
def test_backend(supported, capability, expected, monkeypatch):
    assert choose_backend(monkeypatch, supported, capability) == expected


def test_no_backend_is_an_error_that_names_the_device(monkeypatch):
    with pytest.raises(DeviceError, match="cuda:3"):
        choose_backend(monkeypatch, False, (7, 5))


def choose_backend(monkeypatch: pytest.MonkeyPatch, supported: bool, capability: tuple[int, int]) -> str:
    monkeypatch.undo()  # back to the real function
    monkeypatch.setattr(cuda, "_cuda", type("Module", (), {"supports": staticmethod(lambda index: supported)}))
    monkeypatch.setattr(cuda, "available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return cuda.backend.__wrapped__(torch.device("cuda", 3))
