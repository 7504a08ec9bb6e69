"""Control flow, barriers, mbarriers, shuffles, votes."""

from __future__ import annotations

from tests.ptx.errors import UnsupportedInstruction
from tests.ptx.lower.registry import Lowered, Lowering, lowers, only
from tests.ptx.parser import Immediate, Instruction, Operand, Register, Vector

_SHUFFLES = ("idx", "up", "down", "bfly")
_VOTES = ("all", "any", "uni", "ballot")
_REDUCTIONS = ("add", "min", "max", "and", "or", "xor")


@lowers("bra")
def branch(low: Lowering, ins: Instruction) -> Lowered:
    return Lowered("bra", [], list(ins.targets))


@lowers("brx")
def branch_indexed(low: Lowering, ins: Instruction) -> Lowered:
    return Lowered("brx.idx", [low.register(ins.operands[0], 32)], list(ins.targets))


@lowers("ret", "exit")
def leave(low: Lowering, ins: Instruction) -> Lowered:
    return Lowered("exit", [], [])


@lowers("trap", "brkpt")
def trap(low: Lowering, ins: Instruction) -> Lowered:
    return Lowered("trap", [], [])


@lowers("unsupported")
def unsupported(low: Lowering, ins: Instruction) -> Lowered:
    raise UnsupportedInstruction(ins.opcode[1])


@lowers("nanosleep")
def pause(low: Lowering, ins: Instruction) -> Lowered:
    return Lowered("nanosleep", [], [])


@lowers("griddepcontrol", "setmaxnreg", "pmevent")
def nothing(low: Lowering, ins: Instruction) -> Lowered:
    return Lowered("nothing", [], [])


@lowers("fence", "membar")
def fence(low: Lowering, ins: Instruction) -> Lowered:
    """One of the whole device lets the thread's atomics publish what it knows of; one of a block orders nothing more here."""
    return Lowered("fence" if {"gl", "gpu", "sys"} & set(ins.opcode) else "nothing", [], [])


@lowers("bar", "barrier")
def barrier(low: Lowering, ins: Instruction) -> Lowered:
    parts = [p for p in ins.opcode[1:] if p != "cta"]
    if parts[0] == "warp":
        return Lowered("bar.warp", [low.register(ins.operands[0], 32)], [])
    if parts[0] not in ("sync", "arrive") or (ins.base == "barrier" and "aligned" not in parts):
        raise UnsupportedInstruction("kind of barrier")
    return Lowered("bar", [low.register(o, 32) for o in ins.operands], [int(parts[0] == "sync")])


def _pair(low: Lowering, d: Operand, widths: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Two destinations d|p, the second one optional."""
    items = d.items if isinstance(d, Vector) else (d,)
    first = low.register(items[0], widths[0])
    second = low.register(items[1], widths[1]) if len(items) > 1 else (low._allocate(widths[1]), widths[1], 0)
    return [first, second]


@lowers("shfl")
def shuffle(low: Lowering, ins: Instruction) -> Lowered:
    if ins.opcode[1] != "sync":
        raise UnsupportedInstruction("shfl without .sync")
    d, *sources = ins.operands
    operands = _pair(low, d, (32, 1)) + [low.register(o, 32) for o in sources]
    return Lowered("shfl", operands, [_SHUFFLES.index(ins.opcode[2])])


@lowers("vote")
def vote(low: Lowering, ins: Instruction) -> Lowered:
    d, p, members = ins.operands
    ballot = ins.opcode[2] == "ballot"
    negated = int(isinstance(p, Register) and p.negated)
    operands = [low.register(d, 32 if ballot else 1), low.register(p, 1), low.register(members, 32)]
    return Lowered("vote", operands, [_VOTES.index(ins.opcode[2]), negated])


@lowers("activemask")
def active_mask(low: Lowering, ins: Instruction) -> Lowered:
    return Lowered("activemask", [low.register(ins.operands[0], 32)], [])


@lowers("match")
def match(low: Lowering, ins: Instruction) -> Lowered:
    if ins.opcode[1] != "any":
        raise UnsupportedInstruction("match other than match.any")
    d, a, members = ins.operands
    return Lowered(
        f"match.any.{ins.type}",
        [low.register(d, 32), low.register(a, int(ins.type[1:])), low.register(members, 32)],
        [],
    )


@lowers("redux")
def reduce(low: Lowering, ins: Instruction) -> Lowered:
    return Lowered(f"redux.{ins.type}", [low.register(o, 32) for o in ins.operands], [_REDUCTIONS.index(ins.opcode[2])])


@lowers("elect")
def elect(low: Lowering, ins: Instruction) -> Lowered:
    return Lowered("elect", [*_pair(low, ins.operands[0], (32, 1)), low.register(ins.operands[1], 32)], [])


@lowers("mbarrier")
def mbarrier(low: Lowering, ins: Instruction) -> Lowered:
    kind = ins.opcode[1]
    only(
        ins, ins.opcode[2:], "shared", "shared::cta", "shared::cluster", "b64", "parity", "expect_tx", "noComplete", "release",
        "acquire", "relaxed", "cta", "cluster",
    )  # fmt: skip
    if kind == "init":
        return Lowered("mbarrier.init", [low.address(ins.operands[0]), low.register(ins.operands[1], 32)], [])
    if kind == "inval":
        return Lowered("mbarrier.inval", [low.address(ins.operands[0])], [])
    if kind in ("arrive", "expect_tx", "complete_tx"):
        state, address, *count = ins.operands if kind == "arrive" else (None, *ins.operands)
        d = low.register(state, 64) if state is not None else (low._allocate(64), 64, 0)
        number = low.register(count[0] if count else Immediate(1), 32)
        code = {"arrive": 1, "expect_tx": 2, "complete_tx": 4}[kind] + 2 * int(
            "expect_tx" in ins.opcode and kind == "arrive"
        )
        return Lowered("mbarrier.arrive", [d, low.address(address), number], [code])
    if kind in ("try_wait", "test_wait"):
        d, address, state = ins.operands[:3]
        return Lowered(
            "mbarrier.test",
            [low.register(d, 1), low.address(address), low.register(state, 64)],
            [int("parity" in ins.opcode)],
        )
    raise UnsupportedInstruction(f"mbarrier.{kind}")
