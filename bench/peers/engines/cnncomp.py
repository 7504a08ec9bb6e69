"""cnncomp: quantised with its defaults where the case is int8, each kernel chosen by measurement."""

from __future__ import annotations

import torch

import cnncomp
from bench.peers.case import Case
from bench.peers.engines import Loaded
from bench.peers.engines._torch import binder, images, model_of, to_numpy
from cnncomp.demo.common import kernels


def load(case: Case, threads: int) -> Loaded:
    torch.set_num_threads(threads)
    model = model_of(case)
    if case.int8:
        cnncomp.quantize(model, images(case), progress=False)
    fast = cnncomp.convert(model, torch.from_numpy(case.array("input")), cache=False, progress=False)
    return Loaded(cnncomp.__version__, binder(fast), to_numpy, fast.plan.reason or kernels(fast))
