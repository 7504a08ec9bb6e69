"""torch as it is, in channels_last."""

from __future__ import annotations

import torch

from bench.peers.case import Case
from bench.peers.engines import Loaded, Unsupported
from bench.peers.engines._torch import binder, model_of, to_numpy


def load(case: Case, threads: int) -> Loaded:
    if case.int8:
        raise Unsupported("torch eager: float only here")
    torch.set_num_threads(threads)
    model = model_of(case).to(memory_format=torch.channels_last)
    return Loaded(torch.__version__, binder(model, torch.channels_last), to_numpy)
