"""int8 CUDA kernels on raw device pointers (integers, 0 for none). dtype codes: 0 uint8, 1 int8, 2 float32, 3 float16,
4 bfloat16; activations: 0 none, 1 SiLU, 2 hardswish."""

from typing import Any

WORKSPACE_BYTES: int

class CudaError(RuntimeError): ...

def conv2d_int8(
    device: int,
    stream: int,
    multiprocessors: int,
    x: int,
    x_dtype: int,
    n: int,
    h: int,
    w: int,
    c: int,
    weight: int,
    k: int,
    r: int,
    s: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dil_h: int,
    dil_w: int,
    groups: int,
    constants: int,
    residual: int,
    residual_dtype: int,
    residual_scale: float,
    lo: float,
    out: int,
    out_dtype: int,
    workspace: int,
    workspace_bytes: int,
    tile: str,
    parts: int,
    activation: int,
    out_factor: float,
    /,
) -> None: ...
def linear_int8(
    device: int,
    stream: int,
    multiprocessors: int,
    x: int,
    x_dtype: int,
    m: int,
    c: int,
    weight: int,
    k: int,
    constants: int,
    residual: int,
    residual_dtype: int,
    residual_scale: float,
    lo: float,
    out: int,
    out_dtype: int,
    workspace: int,
    workspace_bytes: int,
    tile: str,
    parts: int,
    activation: int,
    out_factor: float,
    /,
) -> None: ...
def quantize(
    device: int,
    stream: int,
    x: int,
    x_dtype: int,
    n: int,
    pixels: int,
    c: int,
    channels_last: bool,
    inv_scale: float,
    out: int,
    out_dtype: int,
    /,
) -> None: ...
def max_pool2d_int8(device: int, stream: int, p: int, q: int, x: int, x_dtype: int, /, *sizes_and_out: int) -> None: ...
def mean_pool2d(
    device: int, stream: int, x: int, x_dtype: int, n: int, h: int, w: int, c: int, out: int, /
) -> None: ...
def plan_quantize(*arguments: Any) -> dict[str, Any]: ...
def plan_max_pool2d_int8(*arguments: Any) -> dict[str, Any]: ...
def plan_mean_pool2d(*arguments: Any) -> dict[str, Any]: ...
def plan_conv2d_int8(multiprocessors: int, /, *arguments: Any) -> dict[str, Any]: ...
def plan_linear_int8(multiprocessors: int, /, *arguments: Any) -> dict[str, Any]: ...
def capture_id(device: int, stream: int) -> int: ...
def supports(device: int) -> bool: ...
def device_count() -> int: ...
def device_info(device: int) -> dict[str, Any]: ...
