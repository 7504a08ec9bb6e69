"""Integer and float arithmetic, logic, comparison, selection."""

from __future__ import annotations

from tests.ptx.errors import UnsupportedInstruction
from tests.ptx.lower.registry import Lowered, Lowering, flags_of, immediate, lowers, only
from tests.ptx.parser import Instruction, Register, Vector

_ROUNDING = ("rn", "full", "approx")
_BOOLEAN = {"and": 1, "or": 2, "xor": 3}
_CARRY_OUT, _CARRY_IN = 8, 16
_PERMUTE = {"f4e": 1, "b4e": 2, "rc8": 3, "ecl": 4, "ecr": 5, "rc16": 6}
_TESTS = ("finite", "infinite", "number", "notanumber", "normal", "subnormal")


def width_of(kind: str) -> int:
    """Bits of a register of a type."""
    if kind == "pred":
        return 1
    if kind.endswith("x2"):
        return 2 * width_of(kind[:-2])
    return 32 if kind == "tf32" else int(kind.lstrip("busf"))


def is_float(kind: str) -> bool:
    return kind[0] == "f" or kind.startswith("bf")


def plain(low: Lowering, ins: Instruction, handler: str, ints: list[int], width: int | None = None) -> Lowered:
    """All operands as wide as the type."""
    width = width or width_of(ins.type)
    return Lowered(handler, [low.register(o, width) for o in ins.operands], ints)


@lowers("add", "sub", "addc", "subc", "min", "max", "div", "rem", "neg", "abs")
def basic(low: Lowering, ins: Instruction) -> Lowered:
    modifiers, kind = ins.opcode[1:-1], ins.type
    if is_float(kind):
        only(ins, modifiers, *_ROUNDING, "sat", "ftz", "NaN")
        return plain(low, ins, f"{ins.base}.{kind}", [flags_of(modifiers)])
    carry = _CARRY_OUT * ("cc" in modifiers) + _CARRY_IN * (ins.base in ("addc", "subc"))
    if carry:
        only(ins, modifiers, "cc")
        return plain(low, ins, f"{ins.base[:3]}.cc.{kind.replace('b', 'u')}", [carry])
    only(ins, modifiers, "sat")
    return plain(low, ins, ".".join(ins.opcode), [])


@lowers("mul", "mad", "madc", "fma", "sad")
def multiply(low: Lowering, ins: Instruction) -> Lowered:
    modifiers, kind = ins.opcode[1:-1], ins.type
    if is_float(kind):
        only(ins, modifiers, "rn", "sat", "ftz", "relu")
        base = "fma" if ins.base == "mad" else ins.base
        return plain(low, ins, f"{base}.{kind}", [flags_of(modifiers)])
    only(ins, modifiers, "lo", "hi", "wide", "cc")
    part = next((p for p in modifiers if p != "cc"), None)
    if "cc" in modifiers or ins.base == "madc":
        return plain(
            low, ins, f"mad.cc.{part}.{kind}", [_CARRY_OUT * ("cc" in modifiers) + _CARRY_IN * (ins.base == "madc")]
        )
    operands = [low.register(o, width_of(kind)) for o in ins.operands]
    if part == "wide" and ins.base == "mad":
        operands[3] = low.register(ins.operands[3], 2 * width_of(kind))
    return Lowered(".".join(p for p in (ins.base, part, kind) if p), operands, [])


@lowers("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def function(low: Lowering, ins: Instruction) -> Lowered:
    only(ins, ins.opcode[1:-1], *_ROUNDING, "ftz")
    return plain(low, ins, f"{ins.base}.{ins.type}", [flags_of(ins.opcode)])


@lowers("copysign")
def copysign(low: Lowering, ins: Instruction) -> Lowered:
    return plain(low, ins, ".".join(ins.opcode), [])


@lowers("testp")
def test(low: Lowering, ins: Instruction) -> Lowered:
    return plain(low, ins, f"testp.{ins.type}", [_TESTS.index(ins.opcode[1])])


@lowers("and", "or", "xor", "not", "cnot", "brev")
def logic(low: Lowering, ins: Instruction) -> Lowered:
    if len(ins.opcode) != 2:
        raise UnsupportedInstruction("modifiers of a logic instruction")
    operands = [low.register(o, width_of(ins.type)) for o in ins.operands]
    return Lowered(".".join(ins.opcode), operands, [])


@lowers("popc", "clz")
def count_bits(low: Lowering, ins: Instruction) -> Lowered:
    return plain(low, ins, ".".join(ins.opcode), [])


@lowers("bfind")
def find_leading(low: Lowering, ins: Instruction) -> Lowered:
    return plain(low, ins, f"bfind.{ins.type}", [int("shiftamt" in ins.opcode)])


@lowers("shl", "shr")
def shift(low: Lowering, ins: Instruction) -> Lowered:
    d, a, b = ins.operands
    width = width_of(ins.type)
    return Lowered(".".join(ins.opcode), [low.register(d, width), low.register(a, width), low.register(b, 32)], [])


@lowers("shf")
def funnel(low: Lowering, ins: Instruction) -> Lowered:
    _, side, mode, kind = ins.opcode
    return plain(low, ins, f"shf.{side}.{kind}", [int(mode == "clamp")])


@lowers("bfe", "bfi")
def field(low: Lowering, ins: Instruction) -> Lowered:
    width = width_of(ins.type)
    operands = [low.register(o, width) for o in ins.operands[:-2]]
    return Lowered(".".join(ins.opcode), operands + [low.register(o, 32) for o in ins.operands[-2:]], [])


@lowers("lop3")
def logic3(low: Lowering, ins: Instruction) -> Lowered:
    return Lowered("lop3.b32", [low.register(o, 32) for o in ins.operands[:4]], [immediate(ins.operands[4])])


@lowers("prmt")
def permute(low: Lowering, ins: Instruction) -> Lowered:
    mode = _PERMUTE[ins.opcode[2]] if len(ins.opcode) == 3 else 0
    return plain(low, ins, "prmt.b32", [mode], 32)


@lowers("dp4a", "dp2a")
def dot(low: Lowering, ins: Instruction) -> Lowered:
    kinds = ".".join(ins.opcode[-2:])
    return plain(low, ins, f"{ins.base}.{kinds}", [int("hi" in ins.opcode)], 32)


@lowers("setp")
def compare(low: Lowering, ins: Instruction) -> Lowered:
    """setp.cmp{.bool}{.ftz}.type p{|q}, a, b{, {!}c}. Flushing is left out: it could only matter for subnormals."""
    test, *rest = ins.opcode[1:-1]
    only(ins, rest, *_BOOLEAN)
    boolean = next((_BOOLEAN[p] for p in rest if p in _BOOLEAN), 0)
    d, a, b, *c = ins.operands
    pair = d.items if isinstance(d, Vector) else (d,)
    width = width_of(ins.type)
    sink = low._allocate(1)
    operands = [low.register(pair[0], 1), low.register(pair[1], 1) if len(pair) > 1 else (sink, 1, 0)]
    operands += [low.register(a, width), low.register(b, width)]
    negated = 0
    if c:
        operands.append(low.register(c[0], 1))
        negated = int(isinstance(c[0], Register) and c[0].negated)
    return Lowered(f"setp.{test}.{ins.type}", operands, [boolean, negated])


@lowers("selp")
def select(low: Lowering, ins: Instruction) -> Lowered:
    width = width_of(ins.type)
    operands = [low.register(o, width) for o in ins.operands[:3]]
    return Lowered(f"selp.{width}", [*operands, low.register(ins.operands[3], 1)], [])
