"""torchao's static int8, compiled by inductor with frozen weights."""

from __future__ import annotations

import importlib.metadata

import torch

from bench.peers.case import Case
from bench.peers.engines import Loaded, Unsupported
from bench.peers.engines._torch import binder, images, model_of, to_numpy
from bench.torchao_int8 import torchao_int8
from cnncomp.demo.common import compile_float


def load(case: Case, threads: int) -> Loaded:
    torch.set_num_threads(threads)
    try:
        model = torchao_int8(model_of(case), images(case))
    except ImportError:
        raise Unsupported("not installed: torchao, beside cnncomp") from None
    fast = compile_float(model, torch.from_numpy(case.array("input")))
    if isinstance(fast, str):
        raise Unsupported(fast)
    version = f"{importlib.metadata.version('torchao')}, torch {torch.__version__}"
    return Loaded(version, binder(fast, torch.channels_last), to_numpy)
