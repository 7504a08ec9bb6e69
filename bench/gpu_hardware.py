"""Facts of GPU architectures: limits that decide occupancy, and rates for the model of bench/gpu_model.py.

Sources: NVIDIA's whitepapers (Turing TU102 2018, A100 2020, GA102 2020, Ada 2022, H100 2022, RTX Blackwell 2025) for SMs,
clocks, tensor rates, memory; CUDA C++ programming guide 13, table "Technical Specifications per Compute Capability", for
limits of an SM. Boost clocks. Of the L2 bandwidths only A100's is published (5,120 bytes a clock); the others are assumed.

The numbers are frozen: whoever changes one reports every table again that was made with it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: As sold.
        arch: "sm_80".
        sms: Streaming multiprocessors.
        clock: Boost clock, GHz.
        int8_ops: Dense int8 tensor operations (2 per multiply-add) of an SM per clock.
        fp16_ops: The same of fp16 with fp32 sums.
        dram: Bytes per second.
        l2: Bytes of cache.
        l2_bytes_per_clock: Of the whole chip.
        shared: Bytes of shared memory of an SM that blocks may use.
        threads, blocks: Most of an SM.
    """

    name: str
    arch: str
    sms: int
    clock: float
    int8_ops: int
    fp16_ops: int
    dram: float
    l2: int
    l2_bytes_per_clock: int
    shared: int
    threads: int
    blocks: int

    @property
    def code(self) -> str:
        """The architecture whose code of the package's kernels runs on it, "75", "80" or "90a": one for each main loop."""
        return {"sm_75": "75", "sm_90": "90a"}.get(self.arch, "80")

    @property
    def int8_peak(self) -> float:
        """Dense int8 operations per second."""
        return self.sms * self.int8_ops * self.clock * 1e9


MB = 1 << 20
GPUS = (
    Gpu("T4", "sm_75", 40, 1.59, 2048, 1024, 320e9, 4 * MB, 1024, 64 << 10, 1024, 16),
    Gpu("A100", "sm_80", 108, 1.41, 4096, 2048, 1555e9, 40 * MB, 5120, 164 << 10, 2048, 32),
    Gpu("RTX 3090", "sm_86", 82, 1.695, 2048, 512, 936e9, 6 * MB, 3072, 100 << 10, 1536, 16),
    Gpu("RTX 4090", "sm_89", 128, 2.52, 2048, 512, 1008e9, 72 * MB, 5120, 100 << 10, 1536, 24),
    Gpu("H100", "sm_90", 132, 1.83, 8192, 4096, 3350e9, 50 * MB, 5632, 228 << 10, 2048, 32),
    Gpu("RTX 5090", "sm_120", 170, 2.407, 2048, 512, 1792e9, 96 * MB, 6144, 100 << 10, 1536, 24),
)
#: Not a target: there are published times of it (bench/gpu_validation.py).
RTX_3070 = Gpu(
    "RTX 3070", "sm_86", 46, 1.725, 2048, 512, 448e9, 4 * MB, 2048, 100 << 10, 1536, 16
)  # fmt: skip
REGISTERS = 65536  # of an SM, all of these architectures
WARP = 32


def gpu_of(arch: str) -> Gpu:
    """The GPU of "80", "90a", "sm_80", ..."""
    wanted = "sm_" + arch.removeprefix("sm_").rstrip("af")
    return next(gpu for gpu in GPUS if gpu.arch == wanted)


def blocks_per_sm(gpu: Gpu, threads: int, registers: int, shared: int) -> int:
    """Blocks that fit on an SM at once.

    Args:
        gpu: Where.
        threads: Of a block.
        registers: Of a thread; a warp gets them in units of 256.
        shared: Bytes of a block; the runtime adds 1 KB from sm_80 on.
    """
    warps = -(-threads // WARP)
    per_warp = -(-registers * WARP // 256) * 256
    reserved = 1024 if gpu.arch != "sm_75" else 0
    by_shared = gpu.shared // (shared + reserved) if shared + reserved else gpu.blocks
    return min(gpu.blocks, gpu.threads // (warps * WARP), REGISTERS // (per_warp * warps), by_shared)
