"""PTX text to instructions, for the subset that nvcc and Triton emit."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tests.ptx.errors import EmulatorError, UnsupportedInstruction


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Special:
    """A read-only register of the machine: %tid.x and the like."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """Bits of a constant; integers are kept signed, floats as the bits that PTX writes."""

    bits: int


@dataclass(frozen=True)
class Symbol:
    """A parameter or shared variable; its value is its address."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Sink:
    """The destination _ that throws its value away."""


Operand = Register | Special | Immediate | Symbol | Address | Vector | Sink


@dataclass(frozen=True)
class Instruction:
    """One instruction. ``opcode`` is split at its dots: ("ld", "global", "nc", "v4", "f32")."""

    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool
    target: str | None  # label of a branch
    line: int
    text: str

    @property
    def base(self) -> str:
        return self.opcode[0]

    @property
    def type(self) -> str:
        """The last part of the opcode: the type of the sources."""
        return self.opcode[-1]

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass
class Kernel:
    """A parsed entry function. Offsets are in bytes from the start of the parameter and shared spaces."""

    name: str
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset, size
    registers: dict[str, str] = field(default_factory=dict)  # name to type
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0  # static
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{;]*\{")
_ENTRY_NAMES = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]$|%(laneid|warpid)$")


def entry_names(ptx: str) -> list[str]:
    """Names of all kernels in a PTX file."""
    return _ENTRY_NAMES.findall(ptx)


def split_operands(text: str) -> list[str]:
    """Split at the commas that are in no bracket."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts


def _blank_comments(ptx: str) -> str:
    """Remove comments and debug directives, keeping every line where it was."""
    ptx = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), ptx, flags=re.S)
    ptx = re.sub(r"//[^\n]*", "", ptx)
    return re.sub(r"^[ \t]*\.(loc|file|pragma)\b[^\n]*", "", ptx, flags=re.M)


class _BodyParser:
    """Parses the statements of one kernel body into ``kernel``."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes: list[dict[str, str]] = []  # of inline assembly: local register to its unique name
        self.scope_count = 0

    def parse(self, body: str, line: int) -> None:
        for statement in body.split(";"):
            start = line + len(statement[: len(statement) - len(statement.lstrip())].splitlines() or [""]) - 1
            self._statement(" ".join(statement.split()), start)
            line += statement.count("\n")

    def _statement(self, text: str, line: int) -> None:
        while text:
            label = re.match(r"([\w$]+):\s*", text)
            if text[0] == "{":
                self.scopes.append({})
                self.scope_count += 1
                text = text[1:].lstrip()
            elif text[0] == "}":
                self.scopes.pop()
                text = text[1:].lstrip()
            elif label:
                self.kernel.labels[label[1]] = len(self.kernel.instructions)
                text = text[label.end() :]
            else:
                break
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith(".shared"):
            self._shared(text)
        elif text.startswith("."):
            raise UnsupportedInstruction(f"line {line}: {text}")
        elif text:
            self._instruction(text, line)

    def _registers(self, text: str) -> None:
        kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()  # type: ignore[union-attr]
        for name in split_operands(names):
            many = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
            for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                unique = f"{each}@{self.scope_count}" if self.scopes else each
                if self.scopes:
                    self.scopes[-1][each] = unique
                self.kernel.registers[unique] = kind

    def _shared(self, text: str) -> None:
        match = re.fullmatch(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", text)
        if not match:
            raise UnsupportedInstruction(text)
        align = int(match[1])
        offset = -(-self.kernel.shared_bytes // align) * align
        self.kernel.shared[match[2]] = offset
        self.kernel.shared_bytes = offset + int(match[3])

    def _instruction(self, text: str, line: int) -> None:
        predicate = re.match(r"@(!?)(%?[\w$]+)\s+(.*)", text)
        opcode, _, rest = (predicate[3] if predicate else text).partition(" ")
        parts = tuple(opcode.split("."))
        target = rest if parts[0] == "bra" else None
        operands = () if target else tuple(self._operand(o, line) for o in split_operands(rest))
        name = self._register(predicate[2]) if predicate else None
        negated = bool(predicate and predicate[1])
        self.kernel.instructions.append(Instruction(parts, operands, name, negated, target, line, text))

    def _register(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def _operand(self, text: str, line: int) -> Operand:
        name = self._register(text)
        if text == "_":
            return Sink()
        if text[0] == "{":
            return Vector(tuple(self._operand(o, line) for o in split_operands(text[1:-1])))
        if text[0] == "[":
            match = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
            if not match:
                raise UnsupportedInstruction(f"line {line}: {text}")
            base = self._operand(match[1], line)
            assert isinstance(base, Register | Symbol | Immediate)
            return Address(base, int(match[2] or "0", 0))
        if "|" in text:  # two destinations
            return Vector(tuple(self._operand(o.strip(), line) for o in text.split("|")))
        if name in self.kernel.registers:
            return Register(name)
        if _SPECIAL.fullmatch(text):
            return Special(text)
        if text in self.kernel.parameters or text in self.kernel.shared:
            return Symbol(text)
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
            return Immediate(int(text[2:], 16))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Immediate(int(text.rstrip("U"), 0))
        raise UnsupportedInstruction(f"line {line}: operand {text}")


def _parameters(kernel: Kernel, text: str) -> None:
    offset = 0
    for declaration in split_operands(text):
        name = declaration.split()[-1]
        array = re.fullmatch(r"([\w$]+)\[(\d+)\]", name)
        size = SIZES[re.search(r"\.[usbf](8|16|32|64)\b", declaration)[1]]  # type: ignore[index]
        align = re.search(r"\.align\s+(\d+)\s+\.b8", declaration)
        unit = int(align[1]) if align else size
        offset = -(-offset // unit) * unit
        total = int(array[2]) * size if array else size
        kernel.parameters[array[1] if array else name] = (offset, total)
        offset += total


def parse(ptx: str, name: str | None = None) -> Kernel:
    """Parse the kernel ``name``, or the only one."""
    ptx = _blank_comments(ptx)
    entries = [m for m in _ENTRY.finditer(ptx) if name in (None, m[1])]
    if len(entries) != 1:
        raise EmulatorError(f"{len(entries)} kernels match {name}; there are {entry_names(ptx)}")
    entry = entries[0]
    kernel = Kernel(entry[1])
    _parameters(kernel, entry[2])
    dynamic = re.findall(r"\.extern\s+\.shared[^;]*?([\w$]+)\[\]", ptx)
    kernel.shared |= dict.fromkeys(dynamic, 0)
    end, depth = entry.end(), 1
    while depth:
        depth += (ptx[end] == "{") - (ptx[end] == "}")
        end += 1
    _BodyParser(kernel).parse(ptx[entry.end() : end - 1], ptx.count("\n", 0, entry.end()) + 1)
    kernel.shared |= dict.fromkeys(dynamic, -(-kernel.shared_bytes // 1024) * 1024)
    return kernel
