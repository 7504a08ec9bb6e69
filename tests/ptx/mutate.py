"""Breaks a kernel in one place of its PTX, in the ways in which kernels are wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

#: Name: what to look for in a statement, and what to put in its place ("" drops it).
OPERATORS: dict[str, tuple[str, str]] = {
    "barrier dropped": (r"^bar\.sync\b.*$", ""),
    "wait weakened": (r"^cp\.async\.wait_group \d+$", "cp.async.wait_group 7"),
    "commit dropped": (r"^cp\.async\.commit_group$", ""),
    "copy dropped": (r"^cp\.async\.c[ag]\..*$", ""),
    "copy of what is outside": (r"^(cp\.async\.c[ag]\.\S+ \S+ \S+ \d+), %\w+$", r"\1"),
    "copy to the next chunk": (r"^(cp\.async\.c[ag]\.\S+ \[%\w+)(?:\+(\d+))?\](.*)$", r"\1+16]\3"),
    "copy to where another stage is": (r"^(cp\.async\.c[ag]\.\S+ \[%\w+)(?:\+(\d+))?\](.*)$", r"\1+4096]\3"),
    "matrix from the next row": (r"^(ldmatrix\.\S+ \{.*\}, \[%\w+)(?:\+(\d+))?\]$", r"\1+64]"),
    "matrix from the next chunk": (r"^(ldmatrix\.\S+ \{.*\}, \[%\w+)(?:\+(\d+))?\]$", r"\1+16]"),
    "mask off by one": (r"^setp\.lt\.([su].*)$", r"setp.le.\1"),
    "mask off by one, greater": (r"^setp\.ge\.([su].*)$", r"setp.gt.\1"),
    "mask inverted": (r"^setp\.lt\.(.*)$", r"setp.ge.\1"),
    "mask inverted, greater": (r"^setp\.gt\.(.*)$", r"setp.le.\1"),
    "store unguarded": (r"^@!?%\w+ (st\.global\..*)$", r"\1"),
    "store elsewhere": (r"^((?:@!?%\w+ )?st\.global\.\S+ \[%\w+)(?:\+(\d+))?\](.*)$", r"\1+8]\3"),
    "swizzle forgotten": (r"^xor\.b32 (%\w+), (%\w+), (%\w+|\d+)$", r"mov.b32 \1, \2"),
    "shared store dropped": (r"^(?:@!?%\w+ )?st\.shared\..*$", ""),
    "sum too short": (r"^mma\.sync\.\S+ .*$", ""),
    "fragments exchanged": (r"^(mma\.sync\.\S+ \{[^}]*\}, ?\{)(%\w+), ?(%\w+)(.*)$", r"\1\3,\2\4"),
    "sign ignored": (r"^(mma\.sync\.\S+\.s32)\.u8\.(.*)$", r"\1.s8.\2"),
    "step too long": (r"^add\.s32 (%\w+), (%\w+), 1$", r"add.s32 \1, \2, 2"),
    "offset wrong": (r"^add\.s64 (%\w+), (%\w+), (%\w+)$", r"mov.b64 \1, \2"),
    "lane wrong": (r"^shl\.b32 (%\w+), (%\w+), (\d)$", r"shl.b32 \1, \2, 1"),
    "division forgotten": (r"^div\.[su]\d+ (%\w+), (%\w+), (%\w+)$", r"mov.b32 \1, \2"),
    "rounding cut": (r"^cvt\.rni\.(.*)$", r"cvt.rzi.\1"),
    "clamp dropped": (r"^selp\.f32 (%\w+), (%\w+), (%\w+), %\w+$", r"mov.f32 \1, \3"),
    "scale dropped": (r"^mul(?:\.rn)?\.f32 (%\w+), (%\w+), (%\w+)$", r"mov.f32 \1, \2"),
    "bias dropped": (r"^add(?:\.rn)?\.f32 (%\w+), (%\w+), (%\w+)$", r"mov.f32 \1, \2"),
}


@dataclass(frozen=True)
class Mutant:
    """``operator`` applied to the statement ``text`` of a line of the kernel's own text."""

    operator: str
    line: int
    text: str
    ptx: str

    def __str__(self) -> str:
        return f"{self.operator}, line {self.line}: {self.text}"


def single_entry(ptx: str, name: str) -> str:
    """The PTX file with one kernel only."""
    head = ptx[: re.search(r"^\.(?:visible|weak|extern|entry|func)", ptx, re.M).start()]  # type: ignore[union-attr]
    declared = "\n".join(re.findall(r"^\.extern \.shared[^;]*;", ptx, re.M))
    start = re.search(rf"^(?:\.\w+ )*\.entry {re.escape(name)}\(", ptx, re.M)
    assert start
    end = ptx.index("\n}", start.start()) + 3
    return f"{head}{declared}\n{ptx[start.start() : end]}"


def mutants(ptx: str, lines_run: set[int] | None = None) -> Iterator[Mutant]:
    """All mutants of a file of one kernel, or those of the given lines."""
    lines = ptx.split("\n")
    for number, line in enumerate(lines):
        statement = " ".join(line.strip().rstrip(";").split())
        if not line.rstrip().endswith(";") or (lines_run is not None and number + 1 not in lines_run):
            continue
        for operator, (pattern, replacement) in OPERATORS.items():
            changed, count = re.subn(pattern, replacement, statement)
            if count and changed != statement:
                text = "\n".join([*lines[:number], f"{changed};" if changed else "", *lines[number + 1 :]])
                yield Mutant(operator, number + 1, statement, text)
