"""What a converted network takes: read from a file and run, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cnncomp

SCRIPT = """
import json, re, sys
from pathlib import Path
import torch
import cnncomp

def megabytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

torch.set_num_threads(1)
torch.nn.functional.conv2d(torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3))  # loads what torch itself needs
before, modules = megabytes("VmRSS"), set(sys.modules)
model = cnncomp.load(sys.argv[1], replan=False)
x = torch.randn(1, 3, 224, 224)
with torch.inference_mode():
    for _ in range(4):
        model(x)
print(json.dumps({"peak": megabytes("VmHWM") - before, "modules": sorted(set(sys.modules) - modules)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pruned_resnet50_takes_less_than_its_dense_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = cnncomp.models.resnet50().eval()
    cnncomp.remove_masks(cnncomp.prune(model, sparsity=0.9, scope="layer", progress=False))
    fast = cnncomp.convert(model, torch.randn(1, 3, 224, 224), measure=False, cache=False)
    cnncomp.save(fast, tmp_path / "resnet50.cnncomp")
    command = [sys.executable, "-c", SCRIPT, tmp_path / "resnet50.cnncomp"]
    # From another folder than the source's, which holds no compiled modules.
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # 23 MB of weights, 7 MB of activations, and what reading the file takes at most; the dense weights are 102 MB.
    assert found["peak"] < 60
    # The second call is recorded, and recording must not import torch's compiler, which takes 150 MB.
    assert not [name for name in found["modules"] if name.startswith("torch._dynamo")]
