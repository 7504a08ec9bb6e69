"""Builds the C++ engine once, cached by content, and calls it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.ptx.errors import EmulatorError
from tests.ptx.lower import Program

SOURCES = Path(__file__).parent / "engine"
CACHE = Path(__file__).parent.parent.parent / "build" / "ptx_engine"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra"]
COUNTER = np.dtype(
    [
        (name, np.uint64)
        for name in [
            "warps",
            "lanes",
            "requests",
            "sectors",
            "bytes",
            "l2_sectors",
            "dram_sectors",
            "wavefronts",
            "ideal",
            "tensor_ops",
        ]
    ]
)


class Config(ctypes.Structure):
    """Config of machine.h."""

    _fields_ = [
        ("grid", ctypes.c_int32 * 3),
        ("block", ctypes.c_int32 * 3),
        *((name, ctypes.c_int32) for name in (
            "shared_bytes", "local_bytes", "parameter_bytes", "check_shared", "check_initialised", "check_blocks",
            "count", "fine", "registers",
        )),
        *((name, ctypes.c_int64) for name in ("max_instructions", "l1_bytes", "l2_bytes")),
    ]  # fmt: skip


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise EmulatorError(f"{' '.join(command)}:\n{result.stderr}")
    return result.stdout + result.stderr


def _build() -> Path:
    """Compile the engine, or take it from the cache, which goes by sources, compiler and this machine's instructions."""
    if COMPILER is None:
        raise EmulatorError("the emulator needs a C++ compiler")
    machine = _run([COMPILER, "-march=native", "-Q", "--help=target", "--version"])
    digest = hashlib.sha256(" ".join([*FLAGS, machine]).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    out = CACHE / f"engine.{digest.hexdigest()[:16]}.so"
    if not out.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        work = CACHE / f"work.{os.getpid()}"
        work.mkdir(exist_ok=True)
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [str(work / f"{s.stem}.o") for s in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(
                pool.map(
                    _run, [[COMPILER, *FLAGS, "-c", str(s), "-o", o] for s, o in zip(sources, objects, strict=True)]
                )
            )
        partial = work / out.name
        _run([COMPILER, "-shared", *objects, "-o", str(partial)])
        partial.rename(out)
        shutil.rmtree(work)
    return out


@cache
def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(_build()))
    lib.ptx_new.restype = ctypes.c_void_p
    lib.ptx_delete.argtypes = [ctypes.c_void_p]
    lib.ptx_knows.argtypes = [ctypes.c_char_p]
    lib.ptx_program.restype = ctypes.c_int64
    lib.ptx_program.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p, *[ctypes.c_void_p] * 3]
    lib.ptx_registers.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    lib.ptx_region.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p]
    lib.ptx_run.argtypes = [
        ctypes.c_void_p, ctypes.POINTER(Config), ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p,
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p,
    ]  # fmt: skip
    return lib


def knows(handler: str) -> bool:
    """Whether the engine has a handler of this name."""
    return bool(library().ptx_knows(handler.encode()))


def _pointer(array: np.ndarray[Any, Any] | None) -> int | None:
    return None if array is None else array.ctypes.data


class Engine:
    """A machine with a program in it."""

    def __init__(self, program: Program) -> None:
        self.lib = library()
        self.machine = self.lib.ptx_new()
        self.count = len(program.lowered)
        names, *arrays = program.flat
        added = self.lib.ptx_program(self.machine, self.count, names, *map(_pointer, arrays))
        assert added == self.count, program.lowered[added].handler
        self.lib.ptx_registers(
            self.machine, _pointer(program.initial), program.initial.size, _pointer(program.special_slots)
        )

    def __del__(self) -> None:
        self.lib.ptx_delete(self.machine)

    def add_region(self, base: int, host: np.ndarray[Any, Any], written: np.ndarray[Any, Any] | None) -> None:
        """Map ``host``'s bytes at address ``base``; ``written`` tells which hold data (None: all)."""
        self.lib.ptx_region(self.machine, base, host.nbytes, _pointer(host), _pointer(written))

    def run(
        self, config: Config, parameters: bytes, blocks: np.ndarray[Any, Any]
    ) -> tuple[int, str, tuple[int, ...], np.ndarray[Any, Any], int]:
        """Run blocks.

        Returns:
            The fault's code (0: none), message and place (instruction, block, warp, lane), the counters, and the most bytes
            that asynchronous copies of a block had under way.
        """
        counters = np.zeros(self.count, COUNTER)
        summary, place = np.zeros(2, np.int64), np.full(4, -1, np.int32)
        message = ctypes.create_string_buffer(512)
        code = self.lib.ptx_run(
            self.machine, ctypes.byref(config), parameters, _pointer(blocks), blocks.size, _pointer(counters),
            _pointer(summary), message, len(message), _pointer(place),
        )  # fmt: skip
        return code, message.value.decode(), tuple(place.tolist()), counters, int(summary[0])
