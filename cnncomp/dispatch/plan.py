"""A plan: which kernel each layer runs, with the times that decided it. JSON in, JSON out, cached on disk."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import platformdirs

from cnncomp.errors import ArgumentError

PLAN_VERSION = 1
FLOAT_DTYPES = ("float32", "float16", "bfloat16")


@dataclass
class LayerPlan:
    """One layer: the kernel that runs it, the median ms of each candidate, and one line why."""

    kernel: str
    ms: dict[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass
class Plan:
    """The kernels of a converted network on one device.

    ``layers`` by name in the user's model; ``network_ms``: median of the whole network, "dense" and "converted", on a GPU also
    all of it in half precision, "dense.fp16" and "dense.bf16" (empty if nothing was measured); ``float_dtype``: "float32", or
    the half precision that layers were also allowed to compute in.
    """

    device: str
    key: str
    layers: dict[str, LayerPlan] = field(default_factory=dict)
    network_ms: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    measured: bool = False
    float_dtype: str = "float32"
    version: int = PLAN_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Parse what :meth:`to_json` wrote.

        Raises:
            ArgumentError: text that is not a plan of this version.
        """
        try:
            raw: dict[str, Any] = json.loads(text)
            if raw["version"] != PLAN_VERSION:
                raise ArgumentError("plan", f"version {raw['version']}", f"version {PLAN_VERSION}")
            layers = {
                str(name): LayerPlan(
                    str(v["kernel"]), {str(k): float(ms) for k, ms in v["ms"].items()}, str(v["reason"])
                )
                for name, v in raw["layers"].items()
            }
            network = {str(k): float(v) for k, v in raw["network_ms"].items()}
            if raw.get("float_dtype", "float32") not in FLOAT_DTYPES:
                raise ArgumentError("float_dtype", raw["float_dtype"], " or ".join(FLOAT_DTYPES))
            rest = (str(raw["reason"]), bool(raw["measured"]), str(raw.get("float_dtype", "float32")))
            return cls(str(raw["device"]), str(raw["key"]), layers, network, *rest)
        except ArgumentError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArgumentError("plan", f"text that does not parse ({error})", "JSON from Plan.to_json()") from error


def plan_key(description: dict[str, Any]) -> str:
    """Hash of everything that a measured choice depends on."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]


def cache_dir() -> Path:
    """Where plans are kept: ``$CNNCOMP_CACHE_DIR``, or the user's cache folder."""
    root = os.environ.get("CNNCOMP_CACHE_DIR")
    return Path(root) / "plans" if root else Path(platformdirs.user_cache_dir("cnncomp")) / "plans"


def load_cached(key: str) -> Plan | None:
    """The plan cached under ``key``; None if there is none, or none that parses."""
    try:
        plan = Plan.from_json((cache_dir() / f"{key}.json").read_text())
    except (OSError, ArgumentError):
        return None
    return plan if plan.key == key else None


def store_cached(plan: Plan) -> None:
    """Cache a plan, atomically. A folder that can't be written is no error: the plan is measured again next time."""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
        with os.fdopen(fd, "w") as f:
            f.write(plan.to_json())
        Path(name).replace(folder / f"{plan.key}.json")
    except OSError:
        return
