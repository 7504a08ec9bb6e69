"""How long each layer takes on this device with each choice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cnncomp.dispatch.choose import MARGIN
from cnncomp.errors import ArgumentError
from cnncomp.search.space import DENSE, Choice, Config

Kernels = dict[str, float]


@dataclass
class LatencyTable:
    """Seconds of each layer's kernels with each choice, and of what is no layer.

    Args:
        kernels: by layer and choice (as text), the median seconds of every kernel that can run the layer so, dense ones too;
            those of one entry were timed in turn.
        rest: seconds of the network that its layers do not account for.
        device: where it was measured.
    """

    kernels: dict[str, dict[str, Kernels]] = field(default_factory=dict)
    rest: float = 0.0
    device: str = ""

    def seconds(self, layer: str, choice: Choice = DENSE) -> float:
        """Seconds of ``layer`` with ``choice``: no more than dense, since dense kernels run anything.

        The ratio to dense is taken from within one entry, timed in turn, so that a slower moment does not count.
        """
        entries = self.kernels[layer]
        dense = [best for kernels in entries.values() if (best := _best_dense(kernels)) > 0]
        if not dense:
            return 0.0
        reference = sorted(dense)[len(dense) // 2]
        kernels = entries.get(str(choice), {})
        compressed = min((s for name, s in kernels.items() if not name.startswith("dense.")), default=float("inf"))
        if choice == DENSE or not kernels or compressed > MARGIN * _best_dense(kernels):
            return reference
        return reference * compressed / _best_dense(kernels)

    def predict(self, config: Config) -> float:
        """Seconds of the network, as the sum of its parts."""
        return self.rest + sum(self.seconds(layer, config.get(layer, DENSE)) for layer in self.kernels)

    def times(self, config: Config) -> dict[str, Kernels]:
        """By layer, the kernels' seconds with what ``config`` does to it."""
        return {
            layer: entries.get(str(config.get(layer, DENSE)), entries[str(DENSE)])
            for layer, entries in self.kernels.items()
        }

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """Parse what :meth:`to_json` wrote.

        Raises:
            ArgumentError: something else.
        """
        try:
            raw: Mapping[str, Any] = json.loads(text)
            kernels = {
                str(layer): {str(c): {str(k): float(s) for k, s in ks.items()} for c, ks in entries.items()}
                for layer, entries in raw["kernels"].items()
            }
            return cls(kernels, float(raw["rest"]), str(raw["device"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArgumentError("table", f"text that does not parse ({error})", "JSON from to_json()") from error


def _best_dense(kernels: Kernels) -> float:
    return min((s for name, s in kernels.items() if name.startswith("dense.")), default=0.0)
