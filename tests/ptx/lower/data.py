"""Moves, conversions, loads, stores, atomics, asynchronous copies."""

from __future__ import annotations

from tests.ptx.errors import UnsupportedInstruction
from tests.ptx.lower.arithmetic import width_of
from tests.ptx.lower.registry import WINDOWS, Lowered, Lowering, flags_of, immediate, lowers, only
from tests.ptx.parser import Immediate, Instruction, Operand, Register, Special, Symbol, Vector

_SPACES = {"global": 0, "shared": 1, "local": 2, "param": 3, "generic": 4, "const": 5}
_ROUNDINGS = {"rn": 1, "rz": 2, "rm": 3, "rp": 4, "rni": 5, "rzi": 6, "rmi": 7, "rpi": 8, "rna": 9}
_VECTORS = {"v2", "v4", "v8"}
_SCOPES = {"cta", "cluster", "gpu", "sys"}
_HINTS = {
    "nc",
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "volatile",
    "weak",
    "relaxed",
    "acquire",
    "release",
    "mmio",
    "acq_rel",
}
_ATOMICS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
_CLOCKS = ("%clock", "%clock64", "%globaltimer")


@lowers("mov")
def move(low: Lowering, ins: Instruction) -> Lowered:
    """Also splits a register into a vector of narrower ones (low bits first) and joins them."""
    d, a = ins.operands
    width = width_of(ins.type)
    if isinstance(a, Special) and a.name in _CLOCKS:
        return Lowered("mov.clock", [low.register(d, width)], [])
    if isinstance(d, Vector):
        part = width // len(d.items)
        return Lowered("mov.split", [*low.registers(d, part), low.register(a, width)], [part])
    if isinstance(a, Vector):
        part = width // len(a.items)
        return Lowered("mov.gather", [low.register(d, width), *low.registers(a, part)], [part, width])
    name = "mov.pred" if width == 1 else f"mov.{width}"
    return Lowered(name, [low.register(d, width), low.register(a, width)], [])


@lowers("cvt")
def convert(low: Lowering, ins: Instruction) -> Lowered:
    if ins.opcode[1] == "pack":
        kind = ins.opcode[3]
        third = [low.register(o, 32) for o in ins.operands[3:]] or [low.constant(0, 32)]
        return Lowered(
            "cvt.pack", [low.register(o, 32) for o in ins.operands[:3]] + third, [int(kind[1:]), int(kind[0] == "s")]
        )
    modifiers, target, source = ins.opcode[1:-2], ins.opcode[-2], ins.opcode[-1]
    only(ins, modifiers, *_ROUNDINGS, "sat", "ftz", "relu")
    rounding = next((_ROUNDINGS[p] for p in modifiers if p in _ROUNDINGS), 0)
    operands = [low.register(ins.operands[0], 32), *(low.register(o, width_of(source)) for o in ins.operands[1:])]
    return Lowered(f"cvt.{target}.{source}", operands, [flags_of(modifiers), rounding])


@lowers("cvta")
def convert_address(low: Lowering, ins: Instruction) -> Lowered:
    space = ins.opcode[-2].split("::")[0]
    d, a = ins.operands
    if isinstance(a, Symbol):
        space = low.kernel.symbols[a.name][0]
    return Lowered("cvta", [low.register(d, 64), low.register(a, 64)], [WINDOWS[space], int("to" in ins.opcode)])


@lowers("isspacep")
def is_space(low: Lowering, ins: Instruction) -> Lowered:
    window = WINDOWS[ins.opcode[1].split("::")[0]]
    return Lowered("isspacep", [low.register(ins.operands[0], 1), low.register(ins.operands[1], 64)], [window])


def _space(low: Lowering, ins: Instruction, address: Operand) -> int:
    named = next(
        (p.split("::")[0] for p in ins.opcode[1:-1] if p.split("::")[0] in _SPACES and not p.startswith("L")), "generic"
    )
    space = low.space(address, named)
    return _SPACES[space if named in ("param", "generic") else named]


def _check_access(ins: Instruction) -> None:
    for part in ins.opcode[1:-1]:
        known = part in _VECTORS | _SCOPES | _HINTS or part.split("::")[0] in {*_SPACES, "L1", "L2", "entry", "func"}
        if not known:
            raise UnsupportedInstruction(f"modifier .{part} of {ins.base}")


@lowers("ld", "ldu")
def load(low: Lowering, ins: Instruction) -> Lowered:
    _check_access(ins)
    width = width_of(ins.type) if ins.type != "pred" else 8
    cached = not {"cg", "cs", "cv", "volatile", "relaxed", "acquire"} & set(ins.opcode)
    flags = int(cached) + 2 * int(bool({"acquire", "relaxed", "volatile"} & set(ins.opcode)))
    address = ins.operands[1]
    operands = [*low.registers(ins.operands[0], max(width, 16)), low.address(address)]
    return Lowered("ld", operands, [_space(low, ins, address), width // 8, int(ins.type[0] == "s"), flags])


@lowers("st")
def store(low: Lowering, ins: Instruction) -> Lowered:
    _check_access(ins)
    width = width_of(ins.type)
    address = ins.operands[0]
    flags = 2 * int(bool({"release", "relaxed", "volatile"} & set(ins.opcode)))
    return Lowered(
        "st",
        [low.address(address), *low.registers(ins.operands[1], width)],
        [_space(low, ins, address), width // 8, flags],
    )


@lowers("atom", "red")
def atomic(low: Lowering, ins: Instruction) -> Lowered:
    known = {*_SCOPES, *_HINTS, *_ATOMICS, "noftz"}
    for part in ins.opcode[1:-1]:
        if part not in known and part.split("::")[0] not in {*_SPACES, "L2"}:
            raise UnsupportedInstruction(f"modifier .{part} of {ins.base}")
    operation = next(p for p in ins.opcode if p in _ATOMICS)
    width = width_of(ins.type)
    result = ins.base == "atom"
    address, *values = ins.operands[1:] if result else ins.operands
    if operation != "cas":
        values = values[:1]
    d = low.register(ins.operands[0], width) if result else (low._allocate(width), width, 0)
    pair = {"f16x2": 1, "bf16x2": 2}.get(ins.type, 0)
    if pair and operation != "add":
        raise UnsupportedInstruction(f"{operation} of {ins.type}")
    releases = int(bool({"release", "acq_rel"} & set(ins.opcode)))
    operands = [d, low.address(address), *(low.register(v, width) for v in values)]
    return Lowered(
        f"atom.{ins.type}",
        operands,
        [_space(low, ins, address), _ATOMICS.index(operation), int(result), pair, releases],
    )


@lowers("ldmatrix", "stmatrix")
def matrix(low: Lowering, ins: Instruction) -> Lowered:
    loading = ins.base == "ldmatrix"
    address, registers = (ins.operands[1], ins.operands[0]) if loading else ins.operands
    slots = low.registers(registers, 32)
    sizes = {"m8n8", f"x{len(slots)}"}  # CUTLASS writes .x4.m8n8, which ptxas takes too
    if ins.opcode[1:3] != ("sync", "aligned") or {*ins.opcode[3:5]} != sizes or ins.type != "b16":
        raise UnsupportedInstruction(f"kind of {ins.base}")
    at = low.address(address)
    ints = [int("trans" in ins.opcode), len(slots), _space(low, ins, address)]
    return Lowered(ins.base, [*slots, at] if loading else [at, *slots], ints)


def _bulk(low: Lowering, ins: Instruction) -> Lowered:
    parts = ins.opcode[3:]
    if parts[0] == "commit_group":
        return Lowered("cp.async.bulk.commit", [], [])
    if parts[0] == "wait_group":
        return Lowered("cp.async.bulk.wait", [], [immediate(ins.operands[0])])
    into = parts[0].startswith("shared")
    if (
        parts[0] not in ("shared::cta", "shared::cluster", "global")
        or "tensor" in parts
        or (into and parts[1] != "global")
    ):
        raise UnsupportedInstruction("kind of bulk copy")
    operands = [low.address(ins.operands[0]), low.address(ins.operands[1]), low.register(ins.operands[2], 32)]
    return Lowered("cp.async.bulk", operands + ([low.address(ins.operands[3])] if into else []), [int(into)])


@lowers("cp")
def copy_async(low: Lowering, ins: Instruction) -> Lowered:
    """cp.async in all its parts. Of fewer source bytes the rest is zero; of none, nothing is read."""
    kind = ins.opcode[2]
    if kind == "commit_group":
        return Lowered("cp.async.commit", [], [])
    if kind in ("wait_group", "wait_all"):
        return Lowered("cp.async.wait", [], [-1 if kind == "wait_all" else immediate(ins.operands[0])])
    if kind == "mbarrier":
        return Lowered("cp.async.arrive", [low.address(ins.operands[0])], [int("noinc" in ins.opcode)])
    if kind == "bulk":
        return _bulk(low, ins)
    if kind not in ("ca", "cg"):
        raise UnsupportedInstruction("kind of copy")
    to, source, size, *rest = ins.operands
    if "L2::cache_hint" in ins.opcode:
        rest = rest[:-1]
    operands = [low.address(to), low.address(source)]
    ignoring = bool(rest) and isinstance(rest[0], Register) and low.kernel.registers[rest[0].name] == "pred"
    if rest:
        operands.append(low.register(rest[0], 32))
    return Lowered("cp.async", operands, [immediate(size), int(kind == "ca"), int(ignoring)])


@lowers("prefetch", "prefetchu", "applypriority", "discard")
def hint(low: Lowering, ins: Instruction) -> Lowered:
    return Lowered("nothing", [], [])


@lowers("createpolicy")
def policy(low: Lowering, ins: Instruction) -> Lowered:
    return Lowered("mov.64", [low.register(ins.operands[0], 64), low.register(Immediate(0), 64)], [])
