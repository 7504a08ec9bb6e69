"""From training to launches on a GPU that is not here: bench/gpu_network.py on scikit-learn's digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import cuda_emulated as emulated

pytest.importorskip("cnncomp._cuda", reason="built without CUDA")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")
from bench import gpu_network

pytestmark = pytest.mark.skipif(emulated.NVCC is None, reason="nvcc is not installed")
SPARSE = ["conv2.0", "conv3.0", "conv4.0"]  # not the first and the last layer


@pytest.fixture(scope="module")
def outcomes():
    split = gpu_network.load("digits")
    return {o.pattern: o for o in gpu_network.run(split, list(gpu_network.PATTERNS), epochs=3, finetune=2)}


@pytest.mark.parametrize("pattern, zeros", [("2:4", 0.5), ("32x4", 0.75), ("64:2:8", 0.75)])
def test_networks_by_their_launches(outcomes, pattern, zeros):
    """The bits that the CPU's kernels give; beside the float network int8's error alone; and the task is still done."""
    outcome, format = outcomes[pattern], gpu_network.PATTERNS[pattern]
    assert torch.equal(outcome.launched, outcome.on_cpu)
    off = (outcome.launched - outcome.float_).norm() / outcome.float_.norm()
    assert 0 < off < 0.05
    assert outcome.accuracy > 0.7 and outcome.zeros == pytest.approx(zeros, abs=0.01)
    kernels = outcome.kernels
    assert [name for name, kernel in kernels.items() if kernel == f"conv2d_{format}_int8"] == SPARSE
    assert kernels["conv1.0"] == "conv2d_int8" and kernels["fc"] == "linear_int8"
    # Through the max-pool, and as a residual; the last convolution gives floats.
    assert outcome.in_units == ([] if pattern == "2:4" else SPARSE[:2])


def test_table(outcomes):
    head, *lines = gpu_network.table(list(outcomes.values())).splitlines()
    assert [line.split()[0] for line in lines] == list(gpu_network.PATTERNS)
    assert "off CPU" in head and all(line[: head.index("  kernels")].split()[-1] == "0" for line in lines)


def test_fashion_mnist_is_read(tmp_path):
    for kind, count in (("train", 5010), ("t10k", 3)):
        for suffix, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            sizes = b"".join(n.to_bytes(4, "big") for n in shape)
            values = np.full(shape, 51 if len(shape) == 3 else 7, np.uint8).tobytes()
            (tmp_path / f"{kind}-{suffix}-ubyte").write_bytes(bytes([0, 0, 8, len(shape)]) + sizes + values)
    split = gpu_network.load("fashion-mnist", tmp_path, 4)
    assert split.train_images.shape == (4, 1, 28, 28) and split.test_images.shape == (3, 1, 28, 28)
    assert split.train_images.unique().item() == pytest.approx(0.2) and split.test_labels.tolist() == [7, 7, 7]
