"""What cnncomp should reach, as ratios of medians in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: (network, variant, engine) -> median ms.
Medians = Mapping[tuple[str, str, str], float]

OURS, ANY_PEER = "cnncomp", "the best peer"


@dataclass(frozen=True)
class Bar:
    """cnncomp on ``variant`` should be ``target`` times as fast as ``rival`` on ``rival_variant``.

    ``avx2``: the target on a CPU without AVX-512, where that is another one.
    """

    network: str
    variant: str
    rival: str
    rival_variant: str
    target: float
    avx2: float | None = None

    def ratio(self, medians: Medians) -> tuple[float, str] | None:
        """The rival's time over ours, and which rival; None where either is missing."""
        ours = medians.get((self.network, self.variant, OURS))
        times = {
            engine: ms
            for (network, variant, engine), ms in medians.items()
            if network == self.network and variant == self.rival_variant
            and (engine != OURS if self.rival == ANY_PEER else engine == self.rival)
        }  # fmt: skip
        if ours is None or not times:
            return None
        engine = min(times, key=lambda name: times[name])
        return times[engine] / ours, engine


BARS: Sequence[Bar] = (
    Bar("resnet50", "sparse-80", "DeepSparse", "sparse-80", 1.4),
    Bar("resnet50", "sparse-90", "DeepSparse", "sparse-90", 1.6, avx2=3.0),
    Bar("resnet50", "sparse-95", "DeepSparse", "sparse-95", 2.0),
    Bar("resnet50", "sparse-80", "ONNX Runtime", "dense", 2.5),
    Bar("resnet50", "sparse-90", "ONNX Runtime", "dense", 4.2),
    Bar("resnet50", "sparse-95", "ONNX Runtime", "dense", 6.5),
    Bar("mobilenet_v2", "sparse-85", ANY_PEER, "dense", 2.2),
    Bar("mobilenet_v2", "sparse-85", "DeepSparse", "sparse-90", 1.8),
    Bar("resnet50", "int8", ANY_PEER, "int8", 0.97),
    Bar("mobilenet_v2", "int8", ANY_PEER, "int8", 1.2),
    Bar("resnet50", "int8-sparse-75-1x4", OURS, "int8", 1.7),
    Bar("resnet50", "int8-sparse-90-1x4", OURS, "int8", 3.0),
    Bar("resnet50", "int8-sparse-90-1x4", "DeepSparse", "int8-sparse-90", 2.0),
    Bar("resnet50", "int8-sparse-90", "DeepSparse", "int8-sparse-90", 1.0),
)

#: Two threads over one; images/s at a batch size over those at any smaller one.
THREADS_TARGET, BATCH_TARGET = 1.8, 0.97
