"""The int8 convolution built for 64-bit ARM with Zig's Clang, and run by the Unicorn emulator, which has FEAT_DotProd."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from pathlib import Path

import torch
import unicorn
from torch import Tensor
from unicorn import arm64_const as arm

from tests.cpp.build import CHECKS, CORE, ROOT

#: As in csrc/cpu/cpuid.h.
ISA = {"baseline": 0, "dotprod": 5}
#: What Zig calls the instruction sets of setup.py's ISA_FLAGS.
CPU = {"dotprod": "-mcpu=generic+v8_2a+dotprod", "i8mm": "-mcpu=generic+v8_2a+dotprod+i8mm"}
FLAGS = [
    "-O3",
    "-std=c++20",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-threadsafe-statics",
]
STACK, DATA, DATA_SIZE, END = 0x7000_0000, 0x8000_0000, 16 << 20, 0x9000_0000


def zig(*arguments: str) -> None:
    cache = {"ZIG_GLOBAL_CACHE_DIR": str(ROOT / "build" / "zig"), "ZIG_LOCAL_CACHE_DIR": str(ROOT / "build" / "zig")}
    command = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl", *arguments]
    subprocess.run(command, check=True, env={**os.environ, **cache})


def compile_source(source: Path, folder: Path) -> Path:
    """Object file of a source, in its instruction set. Zig's own cache knows what has changed."""
    isa = CPU.get(source.stem.rsplit("_", 1)[-1])
    # One thread, and no system that would give it storage of its own.
    flags = [*FLAGS, "-Dthread_local=static", f"-I{ROOT / 'csrc'}", *([isa] if isa else [])]
    if source.parent == CHECKS:
        flags += ["-fno-builtin", "-x", "c++"]
    out = folder / f"{source.stem}.o"
    zig(*flags, "-c", str(source), "-o", str(out))
    return out


def build() -> Path:
    """The program for the emulator; its object files lie beside it."""
    folder = ROOT / "build" / "checks" / "arm"
    folder.mkdir(parents=True, exist_ok=True)
    names = ("conv2d_int8", "depthwise_int8", "int8_baseline", "int8_dotprod", "int8_i8mm")
    sources = [*(CORE / f"{name}.cpp" for name in names), CHECKS / "arm_calls.cc"]
    objects = [str(compile_source(source, folder)) for source in sources]
    zig("-nostdlib", "-static", "-Wl,-e,entry", *objects, "-o", str(folder / "arm.elf"))
    return folder / "arm.elf"


class Machine:
    """A fresh 64-bit ARM processor with a program of `build`."""

    def __init__(self, program: Path) -> None:
        elf = program.read_bytes()
        self.entry, table = struct.unpack_from("<QQ", elf, 24)
        self.uc = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self.uc.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX)
        segments = [
            struct.unpack_from("<IIQQQQQQ", elf, table + 56 * i) for i in range(struct.unpack_from("<H", elf, 56)[0])
        ]
        loads = [s for s in segments if s[0] == 1]
        low, high = min(s[3] for s in loads) & ~0xFFFF, max(s[3] + s[6] for s in loads)
        self.uc.mem_map(low, (high - low + 0xFFFF) & ~0xFFFF)
        for _, _, offset, address, _, size, _, _ in loads:
            self.uc.mem_write(address, elf[offset : offset + size])
        for address, size in ((STACK, 1 << 20), (DATA, DATA_SIZE), (END, 0x1000)):
            self.uc.mem_map(address, size)
        self.uc.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # vector instructions allowed
        self.free = DATA

    def put(self, x: Tensor) -> int:
        """Copy a tensor there; its address."""
        address, x = self.free, x.contiguous()
        data = ctypes.string_at(x.data_ptr(), x.numel() * x.element_size())
        self.free += -(-len(data) // 64) * 64 + 64
        assert self.free <= DATA + DATA_SIZE
        self.uc.mem_write(address, data)
        return address

    def call(self, isa: str, arguments: bytes) -> None:
        at = self.put(torch.frombuffer(bytearray(arguments), dtype=torch.uint8))
        self.uc.reg_write(arm.UC_ARM64_REG_X0, ISA[isa])
        self.uc.reg_write(arm.UC_ARM64_REG_X1, at)
        self.uc.reg_write(arm.UC_ARM64_REG_LR, END)
        self.uc.reg_write(arm.UC_ARM64_REG_SP, STACK + (1 << 20))
        self.uc.emu_start(self.entry, END)

    def read(self, address: int, like: Tensor) -> Tensor:
        data = self.uc.mem_read(address, like.numel() * like.element_size())
        return torch.frombuffer(data, dtype=like.dtype).reshape(like.shape)
