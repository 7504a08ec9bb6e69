"""torch.compile with frozen weights in channels_last, its fastest form on a CPU."""

from __future__ import annotations

import torch

from bench.peers.case import Case
from bench.peers.engines import Loaded, Unsupported
from bench.peers.engines._torch import binder, model_of, to_numpy
from cnncomp.demo.common import compile_float


def load(case: Case, threads: int) -> Loaded:
    if case.int8:
        raise Unsupported("torch.compile: float only here")
    torch.set_num_threads(threads)
    fast = compile_float(model_of(case), torch.from_numpy(case.array("input")))
    if isinstance(fast, str):
        raise Unsupported(fast)
    return Loaded(torch.__version__, binder(fast, torch.channels_last), to_numpy)
