"""Channel pruning: whole channels go, with all that depends on them, and a smaller dense model is left."""

from __future__ import annotations

from cnncomp.structured.criteria import CRITERIA, score_groups
from cnncomp.structured.discover import channels_of
from cnncomp.structured.graph import ChannelGraph, Dependency, Group
from cnncomp.structured.layers import Node
from cnncomp.structured.prune import prune_channels, remove

__all__ = [
    "CRITERIA",
    "ChannelGraph",
    "Dependency",
    "Group",
    "Node",
    "channels_of",
    "prune_channels",
    "remove",
    "score_groups",
]
