"""PTX text to instructions, as nvcc, Triton and CUTLASS write it. Calls of functions in the same file are inlined."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

from tests.ptx.errors import EmulatorError, UnsupportedInstruction


@dataclass(frozen=True)
class Register:
    name: str
    negated: bool = False  # of a predicate


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
    """A variable; its value is its address within its space, plus an offset."""

    name: str
    offset: int = 0


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


@dataclass
class Instruction:
    """One instruction. ``opcode`` is split at its dots: ("ld", "global", "nc", "v4", "f32")."""

    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool
    line: int
    text: str
    source: tuple[int, int] | None  # file number and line of .loc
    targets: tuple[int, ...] = ()  # of a branch, as instruction numbers

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
    """A parsed entry function. Offsets are in bytes from the start of the parameter, shared and local spaces."""

    name: str
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset, size
    registers: dict[str, str] = field(default_factory=dict)  # name to type
    symbols: dict[str, tuple[str, int]] = field(default_factory=dict)  # name to space and address
    shared_bytes: int = 0  # static
    local_bytes: int = 0  # of a thread
    constants: bytearray = field(default_factory=bytearray)  # variables of the module in the global and constant spaces
    instructions: list[Instruction] = field(default_factory=list)
    files: dict[int, str] = field(default_factory=dict)


CONSTANTS_BASE = 0x7E00_0000_0000
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?[^{;]*\{")
_ENTRY_NAMES = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_FUNCTION = re.compile(r"\.func\s*(?:\(([^)]*)\))?\s*([\w$]+)\s*(?:\(([^)]*)\))?\s*(?:\.noreturn\s*)?\{")
_SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid)\.[xyz]$|%(laneid|warpid|nwarpid|smid|nsmid|gridid|clock|clock64|clock_hi|globaltimer|"
    r"dynamic_smem_size|total_smem_size|lanemask_(eq|lt|le|gt|ge)|cluster_ctarank|cluster_nctarank)$"
)
_VARIABLE = re.compile(
    r"\.(shared|local|global|const|param)\s+((?:\.(?:align\s+\d+|attribute\([^)]*\)|v[24])\s+)*)\.([busf]\d+|pred)\s+([\w$]+)\s*((?:\[\d*\])*)"
    r"(?:\s*=\s*(.*))?$",
    re.S,
)


def entry_names(ptx: str) -> list[str]:
    """Names of all kernels in a PTX file."""
    return _ENTRY_NAMES.findall(ptx)


def split_operands(text: str) -> list[str]:
    """Split at the commas that are in no bracket."""
    if not any(bracket in text for bracket in "[{("):
        return [part.strip() for part in text.split(",")] if text.strip() else []
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts


def _without_comments(ptx: str) -> str:
    """Remove comments and debug sections, keeping every line where it was; .loc becomes a statement."""
    ptx = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), ptx, flags=re.S)
    ptx = re.sub(r"//[^\n]*", "", ptx)
    ptx = re.sub(r"^[ \t]*\.loc\s+(\d+)\s+(\d+)[^\n]*", r".loc \1 \2;", ptx, flags=re.M)
    return re.sub(r"^[ \t]*\.(file|pragma)\b[^\n]*", "", ptx, flags=re.M)


def _closing(text: str, start: int) -> int:
    """Position after the brace that closes the one before ``start``."""
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.end()
    raise EmulatorError("a brace that is not closed")


@dataclass
class _Variable:
    space: str
    name: str
    align: int
    size: int
    unit: int
    value: str | None


def _variable(text: str) -> _Variable:
    match = _VARIABLE.match(text)
    if not match:
        raise UnsupportedInstruction(text)
    space, modifiers, kind, name, dimensions, value = match.groups()
    unit = int(kind[1:]) // 8 if kind != "pred" else 1
    count = 1
    for dimension in re.findall(r"\[(\d*)\]", dimensions):
        count *= int(dimension or 0)
    align = re.search(r"\.align\s+(\d+)", modifiers)
    lanes = re.search(r"\.v([24])", modifiers)
    size = unit * count * (int(lanes[1]) if lanes else 1)
    return _Variable(space, name, int(align[1]) if align else size if not dimensions else unit, size, unit, value)


@dataclass
class _Scope:
    """Names of a brace-delimited block: registers, variables and labels of its own."""

    number: int
    names: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)


@dataclass
class _Function:
    body: str
    line: int
    results: list[str]
    parameters: list[str]


class _BodyParser:
    """Parses the statements of one kernel body into ``kernel``."""

    def __init__(self, kernel: Kernel, functions: dict[str, _Function]) -> None:
        self.kernel, self.functions = kernel, functions
        self.scopes = [_Scope(0)]
        self.count = 0
        self.calls: list[str] = []
        self.returns: list[str] = []  # label after the call, innermost last
        self.source: tuple[int, int] | None = None
        self.branches: list[tuple[Instruction, list[str], list[_Scope]]] = []
        self.tables: dict[str, list[str]] = {}

    def parse(self, body: str, line: int) -> None:
        for statement in body.split(";"):
            start = line + len(statement[: len(statement) - len(statement.lstrip())].splitlines() or [""]) - 1
            self._statement(" ".join(statement.split()), start)
            line += statement.count("\n")

    def resolve(self) -> None:
        """Put instruction numbers in the place of labels."""
        for instruction, labels, scopes in self.branches:
            found = []
            for label in labels:
                at = next((s.labels[label] for s in reversed(scopes) if label in s.labels), None)
                if at is None:
                    raise EmulatorError(f"label {label} is not defined; {instruction}")
                found.append(at)
            instruction.targets = tuple(found)

    def _open(self) -> None:
        self.count += 1
        self.scopes.append(_Scope(self.count))

    def _statement(self, text: str, line: int) -> None:
        while text:
            label = re.match(r"([\w$]+):\s*(?!:)", text)
            if text[0] == "{":
                self._open()
                text = text[1:].lstrip()
            elif text[0] == "}":
                self.scopes.pop()
                text = text[1:].lstrip()
            elif label:
                self.scopes[-1].labels[label[1]] = len(self.kernel.instructions)
                text = text[label.end() :]
                if text.startswith((".branchtargets", ".calltargets")):
                    self.tables[label[1]] = split_operands(text.split(None, 1)[1])
                    return
                if text.startswith(".callprototype"):
                    return
            else:
                break
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith(".loc "):
            _, file, number = text.split()
            self.source = (int(file), int(number))
        elif text.startswith((".shared", ".local", ".param")):
            self._declare(_variable(text))
        elif text.startswith("."):
            raise UnsupportedInstruction(f"line {line}: {text}")
        elif text:
            self._instruction(text, line)

    def _own(self, name: str) -> str:
        """A name of the innermost scope, unique in the kernel."""
        scope = self.scopes[-1]
        unique = f"{name}@{scope.number}" if scope.number else name
        scope.names[name] = unique
        return unique

    def _resolve(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope.names:
                return scope.names[name]
        return name

    def _registers(self, text: str) -> None:
        match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text)
        if not match:
            raise UnsupportedInstruction(text)
        for name in split_operands(match[2]):
            many = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
            for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                self.kernel.registers[self._own(each)] = match[1]

    def _declare(self, variable: _Variable) -> None:
        """Shared variables, local ones and the parameters of calls, which are local here."""
        name, align = self._own(variable.name), variable.align
        if variable.space == "shared":
            at = -(-self.kernel.shared_bytes // align) * align
            self.kernel.shared_bytes = at + variable.size
            self.kernel.symbols[name] = ("shared", at)
        else:
            at = -(-self.kernel.local_bytes // align) * align
            self.kernel.local_bytes = at + variable.size
            self.kernel.symbols[name] = ("local", at)

    def _emit(self, instruction: Instruction, labels: list[str]) -> None:
        self.kernel.instructions.append(instruction)
        if labels:
            self.branches.append((instruction, labels, list(self.scopes)))

    def _instruction(self, text: str, line: int) -> None:
        predicate = re.match(r"@\s*(!?)\s*(%?[\w$]+)\s+(.*)", text)
        opcode, _, rest = (predicate[3] if predicate else text).partition(" ")
        parts = tuple(opcode.split("."))
        name = self._resolve(predicate[2]) if predicate else None
        negated = bool(predicate and predicate[1])
        make = lambda parts, operands: Instruction(parts, operands, name, negated, line, text, self.source)  # noqa: E731
        if parts[0] == "bra":
            self._emit(make(parts, ()), [rest])
        elif parts[0] == "ret" and self.returns:
            self._emit(make(("bra",), ()), [self.returns[-1]])
        elif parts[:2] == ("brx", "idx"):
            index, table = split_operands(rest)
            self._emit(make(parts, (self._operand(index, line),)), self.tables_later(table))
        elif parts[0] == "call":
            self._call(rest, make, line)
        else:
            try:
                operands = tuple(self._operand(o, line) for o in split_operands(rest))
            except UnsupportedInstruction as error:
                if parts[0] not in (
                    "ld",
                    "st",
                    "mov",
                    "add",
                ):  # known ones must parse: no table of operands is guessed at
                    self._emit(make(("unsupported", str(error)), ()), [])
                    return
                raise
            self._emit(make(parts, operands), [])

    def tables_later(self, table: str) -> list[str]:
        if table not in self.tables:
            raise UnsupportedInstruction(f"branch table {table} after its use")
        return self.tables[table]

    def _call(self, rest: str, make: object, line: int) -> None:
        """Inline a function of the file: its parameters are names for the caller's variables."""
        groups = split_operands(rest)
        lists = [split_operands(g[1:-1]) for g in groups if g.startswith("(")]
        name = next(g for g in groups if not g.startswith("("))
        function = self.functions.get(name)
        results = lists.pop(0) if groups[0].startswith("(") else []
        parameters = lists.pop(0) if lists else []
        if function is None or name in self.calls:
            kind = "trap" if name == "__assertfail" else "unsupported"
            self._emit(make((kind, f"call of {name}"), ()), [])  # type: ignore[operator]
            return
        bound = [self._resolve(v) for v in (*results, *parameters)]
        predicated = make(("bra",), ())  # type: ignore[operator]
        self._open()
        after = f"after call {self.count}"
        if predicated.predicate:
            predicated.negated = not predicated.negated
            self._emit(predicated, [after])
        self.scopes[-1].names.update(zip((*function.results, *function.parameters), bound, strict=True))
        self.calls.append(name)
        self.returns.append(after)
        source = self.source
        self.parse(function.body, function.line)
        self.source = source
        self.returns.pop()
        self.calls.pop()
        self.scopes[-1].labels[after] = len(self.kernel.instructions)
        self.scopes.pop()

    def _operand(self, text: str, line: int) -> Operand:
        name = self._resolve(text)
        if text == "_":
            return Sink()
        if name in self.kernel.registers:
            return Register(name)
        if text[0] == "!":
            return Register(self._resolve(text[1:].strip()), negated=True)
        if text[0] == "{":
            return Vector(tuple(self._operand(o, line) for o in split_operands(text[1:-1])))
        if text[0] == "[":
            return self._address(text, line)
        if "|" in text:  # two destinations
            return Vector(tuple(self._operand(o.strip(), line) for o in text.split("|")))
        if _SPECIAL.fullmatch(text):
            return Special(text)
        symbol = re.fullmatch(r"([\w$.]+?)\s*(?:\+\s*(\d+))?", text)
        if symbol and (known := self._resolve(symbol[1])) in self.kernel.symbols:
            return Symbol(known, int(symbol[2] or 0))
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
            return Immediate(int(text[2:], 16))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Immediate(int(text.rstrip("U"), 0))
        if re.fullmatch(r"-?\d+\.\d*(e[+-]?\d+)?", text):
            return Immediate(struct.unpack("<I", struct.pack("<f", float(text)))[0])
        if text == "WARP_SZ":
            return Immediate(32)
        if text in ("true", "false"):
            return Immediate(int(text == "true"))
        raise UnsupportedInstruction(f"line {line}: operand {text}")

    def _address(self, text: str, line: int) -> Address:
        match = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)|(-\s*\d+))?\s*\]", text)
        if not match:
            raise UnsupportedInstruction(f"line {line}: address {text}")
        base = self._operand(match[1], line)
        if not isinstance(base, Register | Symbol | Immediate):
            raise UnsupportedInstruction(f"line {line}: address {text}")
        return Address(base, int((match[2] or match[3] or "0").replace(" ", ""), 0))


def _parameters(kernel: Kernel, text: str) -> None:
    offset = 0
    for declaration in split_operands(text):
        declaration = re.sub(r"\.ptr\b(\s+\.(global|shared|const|local))?(\s+\.align\s+\d+)?", "", declaration)
        match = re.fullmatch(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[busf](\d+)\s+([\w$]+)(?:\[(\d+)\])?", " ".join(declaration.split())
        )
        if not match:
            raise UnsupportedInstruction(f"parameter {declaration}")
        unit = int(match[2]) // 8
        align = int(match[1] or unit)
        offset = -(-offset // align) * align
        size = unit * int(match[4] or 1)
        kernel.parameters[match[3]] = (offset, size)
        kernel.symbols[match[3]] = ("param", offset)
        offset += size


def _module_variables(kernel: Kernel, text: str) -> None:
    """Variables outside of functions: constants with their values, and shared memory."""
    for match in re.finditer(r"(?:\.(?:visible|extern|weak|common)\s+)*(\.(global|const|shared)\s[^;]*);", text):
        variable = _variable(" ".join(match[1].split()))
        if variable.space == "shared":
            if variable.size:
                at = -(-kernel.shared_bytes // variable.align) * variable.align
                kernel.shared_bytes = at + variable.size
                kernel.symbols[variable.name] = ("shared", at)
            else:
                kernel.symbols[variable.name] = ("dynamic", 0)  # behind the static ones
            continue
        at = -(-len(kernel.constants) // variable.align) * variable.align
        values = split_operands((variable.value or "").strip().lstrip("{").rstrip("}"))
        if any(not re.fullmatch(r"-?\w+", v) for v in values):
            continue  # an address of another symbol: using it is an unknown operand
        raw = b"".join((int(v, 0) % (1 << 8 * variable.unit)).to_bytes(variable.unit, "little") for v in values)
        kernel.constants += bytes(at - len(kernel.constants)) + raw.ljust(variable.size, b"\0")
        kernel.symbols[variable.name] = ("global", CONSTANTS_BASE + at)


def _functions(ptx: str) -> dict[str, _Function]:
    found = {}
    names = lambda text: [re.sub(r"\[\d*\]$", "", p.split()[-1]) for p in split_operands(text or "")]  # noqa: E731
    for match in _FUNCTION.finditer(ptx):
        body = ptx[match.end() : _closing(ptx, match.end()) - 1]
        line = ptx.count("\n", 0, match.end()) + 1
        found[match[2]] = _Function(body, line, names(match[1]), names(match[3]))
    return found


def _outside(ptx: str) -> str:
    """The file without the bodies of its functions."""
    kept, at = [], 0
    for match in sorted([*_ENTRY.finditer(ptx), *_FUNCTION.finditer(ptx)], key=lambda m: m.start()):
        kept.append(ptx[at : match.start()])
        at = _closing(ptx, match.end())
    return "".join([*kept, ptx[at:]])


def parse(ptx: str, name: str | None = None) -> Kernel:
    """Parse the kernel ``name``, or the only one."""
    files = {int(n): path for n, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, re.M)}
    ptx = _without_comments(ptx)
    entries = [m for m in _ENTRY.finditer(ptx) if name in (None, m[1])]
    if len(entries) != 1:
        raise EmulatorError(f"{len(entries)} kernels match {name}; there are {entry_names(ptx)}")
    entry = entries[0]
    kernel = Kernel(entry[1], files=files)
    outside = _outside(ptx)
    _module_variables(kernel, re.sub(r"\.section\s.*?\{.*?\}", "", outside, flags=re.S))
    _parameters(kernel, entry[2] or "")
    body = _BodyParser(kernel, _functions(ptx))
    body.parse(ptx[entry.end() : _closing(ptx, entry.end()) - 1], ptx.count("\n", 0, entry.end()) + 1)
    body.resolve()
    end = -(-kernel.shared_bytes // 1024) * 1024
    for symbol, (space, _) in list(kernel.symbols.items()):
        if space == "dynamic":
            kernel.symbols[symbol] = ("shared", end)
    return kernel
