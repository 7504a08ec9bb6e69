"""Reads the register layouts of tensor-core instructions from the CuTe headers of the nvidia-cutlass wheel."""

from __future__ import annotations

import importlib.util
import itertools
import re
from functools import cache
from pathlib import Path
from typing import Any

Tree = Any  # an int or a tuple of trees


@cache
def headers() -> Path | None:
    """CUTLASS's include folder, if the wheel is installed."""
    spec = importlib.util.find_spec("cutlass_library")
    folder = Path(spec.origin).parent / "source" / "include" if spec and spec.origin else None
    return folder if folder and folder.exists() else None


def _close(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "<") - (text[i] == ">")
        if depth == 0:
            return i + 1
    raise ValueError(text[start : start + 80])


def _tree(text: str) -> Tree:
    """``Shape<Shape<_4,_8>,_2>`` as ((4, 8), 2)."""
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"(?:Shape|Stride)<", "(", text).replace(">", ",)")
    return eval(re.sub(r"_(\d+)", r"\1", text), {"__builtins__": {}})  # only digits, commas and brackets are left


def flatten(tree: Tree) -> list[int]:
    return [tree] if isinstance(tree, int) else [leaf for branch in tree for leaf in flatten(branch)]


def offsets(shape: Tree, stride: Tree) -> list[int]:
    """Offsets of a mode's elements, its first part running fastest."""
    sizes, steps = flatten(shape), flatten(stride)
    ranges = [range(s) for s in reversed(sizes)]
    return [sum(i * s for i, s in zip(reversed(index), steps, strict=True)) for index in itertools.product(*ranges)]


def parse_layout(text: str) -> list[list[int]]:
    """``Layout<Shape<threads, values>, Stride<..>>`` as the offset of each value of each thread."""
    inner = text[text.index("<") + 1 : _close(text, text.index("<")) - 1]
    cut = _close(inner, inner.index("<"))
    shape, stride = _tree(inner[:cut]), _tree(inner[cut:].lstrip(" ,\n"))
    threads, values = offsets(shape[0], stride[0]), offsets(shape[1], stride[1])
    return [[t + v for v in values] for t in threads]


@cache
def layout(header: str, struct: str, name: str) -> list[list[int]]:
    """Layout ``name`` ("ALayout", ..) of ``MMA_Traits<struct>``: a list of offsets m + n * M for each thread.

    Args:
        header: "mma_traits_sm80.hpp", .. under cute/atom.
        struct: "SM80_16x8x32_S32S8S8S32_TN"; "" for an alias of the file itself.
        name: The alias that holds the layout.
    """
    folder = headers()
    assert folder
    text = (folder / "cute" / "atom" / header).read_text()
    start = text.index(f"MMA_Traits<{struct}>") if struct else 0
    found = re.compile(rf"using {name}\s*=\s*").search(text, start)
    assert found, (struct, name)
    if text[found.end() :].startswith("Layout"):
        return parse_layout(text[found.end() :])
    alias = re.match(r"[\w:]+", text[found.end() :])
    assert alias
    return layout(header, "", alias[0].split("::")[-1])


def positions(header: str, struct: str, name: str, rows: int) -> list[list[tuple[int, int]]]:
    """(row, column) of each value of each thread."""
    return [[(v % rows, v // rows) for v in thread] for thread in layout(header, struct, name)]
