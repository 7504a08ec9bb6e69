"""Which channels must go together: every channel of every tensor gets a number, and numbers are joined (union-find)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Channels:
    """The channels of one tensor: the dimension that they lie along, and the unit that each belongs to."""

    dim: int
    ids: tuple[int, ...]


class Units:
    """Sets of channels that stay or go together, and those that stay, with the reason."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._fixed: dict[int, str] = {}

    def new(self, count: int, fixed: str = "") -> tuple[int, ...]:
        """Numbers for ``count`` channels, each its own unit; with a reason, units that stay."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        ids = tuple(range(first, first + count))
        if fixed:
            self.fix(ids, fixed)
        return ids

    def find(self, i: int) -> int:
        """The number that stands for the unit of channel ``i``: the least in it."""
        root = i
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[i] != root:
            self._parent[i], i = root, self._parent[i]
        return root

    def join(self, a: Sequence[int], b: Sequence[int]) -> None:
        """Make one unit of the channels at each position of ``a`` and ``b``."""
        for x, y in zip(a, b, strict=True):
            x, y = sorted((self.find(x), self.find(y)))
            if x != y:
                self._parent[y] = x
                if (reason := self._fixed.pop(y, "")) and x not in self._fixed:
                    self._fixed[x] = reason

    def join_all(self, ids: Sequence[int]) -> None:
        """Make one unit of all ``ids``."""
        self.join(ids[:-1], ids[1:])

    def fix(self, ids: Iterable[int], reason: str) -> None:
        """These channels stay; the first reason counts."""
        for i in ids:
            self._fixed.setdefault(self.find(i), reason)

    def why_fixed(self, i: int) -> str:
        """Why the unit of channel ``i`` stays; "" if it may go."""
        return self._fixed.get(self.find(i), "")
