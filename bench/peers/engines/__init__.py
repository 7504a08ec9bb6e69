"""One module per engine, imported only in its own process. Each has ``load(case, threads)``, which gives a :class:`Loaded`.

Raise :class:`Unsupported` for a case that the engine has no form for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Unsupported(Exception):
    """The engine has no such model: skipped, with this line."""


@dataclass
class Loaded:
    """A model ready to run: ``bind(x)`` gives a function without arguments that runs it on the numpy array ``x``
    (N, 3, H, W) and returns something, of which ``numpy`` makes an array (N, classes)."""

    version: str
    bind: Callable[[Any], Callable[[], Any]]
    numpy: Callable[[Any], Any]
    note: str = ""
