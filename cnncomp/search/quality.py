"""How good a network is, and how far one layer's compression moves its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnncomp._batches import evaluating, inputs_of
from cnncomp.errors import ArgumentError, CalibrationError
from cnncomp.pruning.criteria import as_batches


class Judge:
    """Compares networks with the dense one on fixed batches.

    Args:
        dense: the network to compare with.
        data: batches: (images, labels), or images alone; a tensor is one batch.
        probe: samples at the start of the data that :meth:`loss` looks at.

    Raises:
        CalibrationError: no batch, or one that can't be used.
        ArgumentError: outputs that are not (N, classes).
    """

    def __init__(self, dense: nn.Module, data: Any, probe: int = 64) -> None:
        self.batches = list(as_batches(data))
        if not self.batches:
            raise CalibrationError("data: got no batches, expected at least one (was an iterator used up before?)")
        self.device = next(dense.parameters()).device
        self.dense = torch.cat(self._outputs(dense, self.batches))
        self.labels = self._labels()
        self.probe: list[Any] = []
        seen = 0
        for batch in self.batches:
            if seen < probe:
                self.probe.append(batch)
                seen += len(self._input(batch))
        self.reference = self.dense[:seen].double().log_softmax(1)

    @property
    def what(self) -> str:
        """What :meth:`quality` is."""
        return "accuracy" if self.labels is not None else "agreement with the dense network"

    def quality(self, network: nn.Module) -> float:
        """Accuracy on the data, or the fraction of images whose class is the dense network's; 0 to 1."""
        expected = self.dense.argmax(1) if self.labels is None else self.labels
        outputs = torch.cat(self._outputs(network, self.batches))
        return float((outputs.argmax(1) == expected).double().mean())

    def loss(self, network: nn.Module) -> float:
        """Mean Kullback-Leibler divergence of the classes' probabilities from the dense network's, in nats."""
        outputs = torch.cat(self._outputs(network, self.probe)).double().log_softmax(1)
        divergence = (self.reference.exp() * (self.reference - outputs)).sum(1).mean()
        return float(divergence) if torch.isfinite(divergence) else float("inf")

    def _input(self, batch: Any) -> Tensor:
        args, kwargs = inputs_of(batch, 0, torch.device("cpu"))
        return args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))

    def _outputs(self, network: nn.Module, batches: Sequence[Any]) -> list[Tensor]:
        found = []
        with evaluating(network), torch.no_grad():
            for index, batch in enumerate(batches):
                args, kwargs = inputs_of(batch, index, self.device)
                out = network(*args, **kwargs)
                if not isinstance(out, Tensor) or out.dim() != 2:
                    raise ArgumentError("model", "outputs that are not (N, classes)", "a classifier")
                found.append(out.cpu())
        return found

    def _labels(self) -> Tensor | None:
        """The labels of all batches; None where there are none."""
        found = [b[1] if isinstance(b, (tuple, list)) and len(b) > 1 else None for b in self.batches]
        labels = [x for x in found if isinstance(x, Tensor) and x.dim() == 1]
        if all(x is None for x in found):
            return None
        if len(labels) < len(found) or sum(map(len, labels)) != len(self.dense):
            raise ArgumentError("data", "batches whose second element is no label per image", "(images, labels)")
        return torch.cat([x.cpu() for x in labels])
