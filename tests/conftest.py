"""Shared by all tests: deterministic random numbers, one plan cache per run, hypothesis without its database."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

os.environ["CNNCOMP_CACHE_DIR"] = tempfile.mkdtemp(prefix="cnncomp-test-")
torch.set_num_threads(1)  # small shapes; the tests of threading set their own
settings.register_profile("cnncomp", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("cnncomp")


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
