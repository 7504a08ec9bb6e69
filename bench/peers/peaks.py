"""The limits of a core: peaks.cpp, compiled for this machine and run on the cores of the race."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from bench.peers.race import cores, pinned

SOURCE = Path(__file__).with_suffix(".cpp")


def measure(folder: Path) -> dict[str, float] | str:
    """GMAC/s of "fma_fp32", "vpmaddwd" and "vpdpbusd" (``…_gmacs``, those that the CPU has), GB/s read from "l1", "l2",
    "l3" and "dram" and written to "l2" and "l3" (``…_gbs``, ``…_write_gbs``) of one core; or one line why there are none."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return "no C++ compiler: the core's limits are not measured"
    program = folder / "peaks"
    try:
        command = [*compiler.split(), "-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", SOURCE, "-o", program]
        subprocess.run(command, check=True, capture_output=True, text=True)
        with pinned(cores(1)):
            return json.loads(subprocess.run([program], check=True, capture_output=True, text=True, timeout=120).stdout)
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [""]
        return f"the core's limits are not measured: {lines[0]}"


def texts(found: dict[str, float]) -> list[str]:
    """What :func:`measure` found, in words."""
    units = {"gmacs": "GMAC/s", "gbs": "GB/s"}
    return [
        f"{name} {value:.0f} {units[unit]}" for key, value in found.items() for name, _, unit in [key.rpartition("_")]
    ]
