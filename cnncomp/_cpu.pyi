"""The compiled CPU kernels (csrc/cpu). Tensors are addresses, 0 for None; whoever calls has checked shapes and dtypes.

Dtype codes: 0 uint8, 1 int8, 2 float32. Layouts, packed weights and the epilogue: docs/design.md. All release the GIL.
"""

def isa_available() -> list[str]:
    """Instruction sets that this machine can run, from the plainest on: of baseline, avx2, avxvnni, avx512, avx512vnni."""

def isa() -> str:
    """The instruction set in use."""

def set_isa(name: str) -> None:
    """Use another of :func:`isa_available`, process-wide. ValueError for any other name."""

def int8_saturates() -> bool:
    """Whether products of bytes, with the instruction set in use, are added in pairs that saturate at 16 bits."""

def set_openmp(gomp_parallel: int, omp_in_parallel: int, omp_get_thread_num: int) -> None:
    """Run on the OpenMP runtime with these entry points. Until then the kernels use the calling thread alone."""

def activate(
    x: int,
    rows: int,
    length: int,
    activation: int,
    out: int,
    num_threads: int,
    x_pitch: int = ...,
    out_pitch: int = ...,
) -> None:
    """Activation number ``activation`` of ``x`` (rows, length) to ``out``."""

def affine_rows(
    x: int,
    rows: int,
    length: int,
    scale: int,
    shift: int,
    channels: int,
    lo: float,
    hi: float,
    out: int,
    num_threads: int,
    x_pitch: int = ...,
    out_pitch: int = ...,
) -> None:
    """``x`` (rows, length) times ``scale`` (channels) plus ``shift``, between ``lo`` and ``hi``, to ``out``.

    Row i is of channel i % channels."""

def conv2d_int8(
    x: int,
    x_signed: bool,
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
    depthwise: bool,
    constants: int,
    residual: int,
    residual_dtype: int,
    residual_scale: float,
    lo: float,
    out: int,
    out_dtype: int,
    num_threads: int,
    shifted: bool = False,
    activation: int = 0,
    out_factor: float = 1.0,
) -> None:
    """8-bit convolution. ``x`` (n, h, w, c), ``residual`` and ``out`` (n, p, q, k), ``constants`` (3, k) float32, or (4, k)
    if ``shifted``. ``activation``: 0 none but the clamp, 1 SiLU, 2 hardswish, with ``out_factor`` behind it.

    A linear layer of m rows is n=m, h=w=r=s=1.
    """

def quantize(
    x: int,
    n: int,
    c: int,
    h: int,
    w: int,
    channels_last: bool,
    out: int,
    out_signed: bool,
    inv_scale: float,
    num_threads: int,
) -> None:
    """float32 ``x``, (n, c, h, w) or with ``channels_last`` (n, h, w, c), to 8-bit ``out`` (n, h, w, c)."""

def max_pool2d_int8(
    x: int,
    x_signed: bool,
    n: int,
    h: int,
    w: int,
    c: int,
    r: int,
    s: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dil_h: int,
    dil_w: int,
    out: int,
    num_threads: int,
    ceil_mode: bool = False,
) -> None:
    """Max-pool of 8-bit ``x`` (n, h, w, c) to ``out`` (n, p, q, c); padding is the lowest value."""

def conv2d_depthwise(
    x: int,
    n: int,
    c: int,
    h: int,
    w: int,
    weight: int,
    r: int,
    s: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dil_h: int,
    dil_w: int,
    bias: int,
    residual: int,
    lo: float,
    hi: float,
    out: int,
    num_threads: int,
    x_pitch: int = ...,
    residual_pitch: int = ...,
    out_pitch: int = ...,
) -> None: ...
def conv2d_dense(
    x: int,
    n: int,
    c: int,
    h: int,
    w: int,
    values: int,
    block: int,
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
    bias: int,
    residual: int,
    lo: float,
    hi: float,
    out: int,
    num_threads: int,
    x_pitch: int = ...,
    residual_pitch: int = ...,
    out_pitch: int = ...,
) -> None:
    """float32 convolution. ``x`` (n, c, h, w), ``residual`` and ``out`` (n, k, p, q), ``values`` by
    :func:`cnncomp.ops.packing.pack_dense`."""

def conv2d_sparse(
    x: int,
    n: int,
    c: int,
    h: int,
    w: int,
    values: int,
    index: int,
    row_ptr: int,
    block: int,
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
    bias: int,
    residual: int,
    lo: float,
    hi: float,
    out: int,
    num_threads: int,
    x_pitch: int = ...,
    residual_pitch: int = ...,
    out_pitch: int = ...,
) -> None:
    """float32 convolution with packed sparse weights. ``x`` (n, c, h, w), ``residual`` and ``out`` (n, k, p, q)."""

def conv2d_sparse_int8(
    x: int,
    x_signed: bool,
    n: int,
    h: int,
    w: int,
    c: int,
    values: int,
    index: int,
    row_ptr: int,
    block: int,
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
    num_threads: int,
    scattered: bool = ...,
    activation: int = 0,
    out_factor: float = 1.0,
) -> None:
    """8-bit convolution with packed sparse weights, otherwise as :func:`conv2d_int8`; ``constants`` (3, k). ValueError for
    sizes that give no convolution."""

def copy_rows(x: int, rows: int, length: int, out: int, out_pitch: int, num_threads: int) -> None:
    """``x`` (rows, length) to ``out``, where rows are ``out_pitch`` floats apart."""

def copy_byte_rows(x: int, rows: int, length: int, out: int, out_pitch: int, num_threads: int) -> None:
    """The same of bytes. ValueError where rows would overlap."""

def linear_sparse(
    x: int,
    m: int,
    c: int,
    values: int,
    index: int,
    row_ptr: int,
    block: int,
    k: int,
    bias: int,
    residual: int,
    lo: float,
    hi: float,
    out: int,
    num_threads: int,
) -> None:
    """float32 linear with packed sparse weights. ``x`` (m, c), ``residual`` and ``out`` (m, k)."""

def linear_dense(
    x: int,
    m: int,
    c: int,
    weight: int,
    k: int,
    bias: int,
    residual: int,
    lo: float,
    hi: float,
    out: int,
    num_threads: int,
) -> None:
    """float32 linear. ``x`` (m, c), ``weight`` (k, c), ``residual`` and ``out`` (m, k)."""

def max_pool2d(
    x: int,
    n: int,
    c: int,
    h: int,
    w: int,
    r: int,
    s: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dil_h: int,
    dil_w: int,
    out: int,
    num_threads: int,
    ceil_mode: bool = ...,
    x_pitch: int = ...,
    out_pitch: int = ...,
) -> None:
    """Max-pool of float32 ``x`` (n, c, h, w) to ``out`` (n, c, p, q)."""

def mean_pool2d(
    x: int, n: int, c: int, pixels: int, channels_last: bool, out: int, num_threads: int, x_pitch: int = ...
) -> None:
    """Means of float32 ``x`` (n, c, pixels), or (n, pixels, c), to ``out`` (n, c)."""

class Program:
    """Kernel calls that are noted once and repeated without Python."""

    def __len__(self) -> int:
        """Steps."""

    def record(self, on: bool) -> None:
        """From now on, note every kernel that is called on this thread, or stop it."""

    def truncate(self, size: int) -> None:
        """Forget the steps from ``size`` on."""

    def addresses(self, step: int) -> list[int]:
        """The operands of a step, in the kernel's order; 0 for None."""

    def bind(self, step: int, which: int, slot: int, offset: int) -> None:
        """Let an operand lie ``offset`` bytes into a slot."""

    def takes_pitch(self, step: int, which: int) -> bool:
        """Whether the channels of an operand may have gaps between them."""

    def set_pitch(self, step: int, which: int, floats: int) -> None:
        """Let each channel of an operand lie so many floats behind the one before it; 0: no gaps."""

    def leave(self, step: int) -> None:
        """Let a call of ``conv2d_sparse_int8`` be done by the next step, another one whose residual it gives, and which alone
        reads it: where it can, that keeps the residual in the caches and writes it nowhere."""

    def run(self, first: int, last: int, slots: list[int]) -> None:
        """Repeat steps [first, last) with these addresses as slots. Releases the GIL."""
