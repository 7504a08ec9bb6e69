"""Search: what to do to each layer so that the network is fast enough and good enough, on this device."""

from __future__ import annotations

from cnncomp.search.ladder import hull, ladder
from cnncomp.search.quality import Judge
from cnncomp.search.result import Point, SearchResult, pareto_front
from cnncomp.search.run import Settings, search
from cnncomp.search.space import DENSE, Choice, Config, Space, Target
from cnncomp.search.table import LatencyTable

__all__ = [
    "DENSE",
    "Choice",
    "Config",
    "Judge",
    "LatencyTable",
    "Point",
    "SearchResult",
    "Settings",
    "Space",
    "Target",
    "hull",
    "ladder",
    "pareto_front",
    "search",
]
