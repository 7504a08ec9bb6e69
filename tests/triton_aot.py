"""Ahead-of-time compilation of the Triton kernels, with no driver, and what the resulting machine code contains."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Report(NamedTuple):
    """Resources of a compiled kernel and how often each SASS opcode (with its first modifiers cut) stands in it."""

    registers: int
    stack: int
    shared: int
    opcodes: Counter[str]
    ptx: str
    sass: str


def compile_kernel(
    kernel: Any,
    pointers: dict[str, str | None],
    integers: dict[str, bool],
    floats: tuple[str, ...],
    constexprs: dict[str, Any],
    arch: int,
    options: dict[str, Any],
) -> Any:
    """Compile for sm_<arch>.

    Args:
        kernel: A ``triton.jit`` function.
        pointers: Argument name to element type, None for a pointer that is None.
        integers: Argument name to whether it is a multiple of 16. Pointers always are.
        floats: Names of fp32 arguments.
        constexprs: Compile-time arguments.
        arch: 80, 90, ...
        options: num_warps and so on.
    """
    kinds: dict[str, str] = {name: "constexpr" if t is None else f"*{t}" for name, t in pointers.items()}
    kinds |= dict.fromkeys(integers, "i32") | dict.fromkeys(floats, "fp32") | dict.fromkeys(constexprs, "constexpr")
    signature = {name: kinds[name] for name in kernel.arg_names}
    aligned = {name for name, t in pointers.items() if t} | {name for name, multiple in integers.items() if multiple}
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned}
    values = constexprs | {name: None for name, t in pointers.items() if t is None}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _tool(name: str, option: str, compiled: Any) -> str:
    """What one of the CUDA binary utilities says of a compiled kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([TOOLS / name, option, file.name], capture_output=True, text=True, check=True).stdout


def registers_and_stack(compiled: Any) -> tuple[int, int]:
    """Registers of a thread of a compiled kernel, and bytes of its stack."""
    usage = _tool("cuobjdump", "--dump-resource-usage", compiled)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    return int(match[1]), int(match[2])


def inspect(compiled: Any) -> Report:
    """Disassemble a compiled kernel."""
    sass = _tool("nvdisasm", "-c", compiled)
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", sass, re.M))
    return Report(*registers_and_stack(compiled), compiled.metadata.shared, opcodes, compiled.asm["ptx"], sass)
