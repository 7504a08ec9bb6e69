"""Optimal brain surgeon on one layer: which weights go, and what the others become so that the outputs stay.

Everything is in terms of second moments of the layer's inputs, for each of G groups: weights (G, R, D), R outputs of a
group, D columns in the order of taps, then input channels; moments (G, D, D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cnncomp.pruning.patterns import NM, Blocks, Pattern


@dataclass(frozen=True)
class Piece:
    """Columns that are chosen from together: taps t0..t1 of channels c0..c1, all channels if there are several taps."""

    t0: int
    t1: int
    c0: int
    c1: int
    channels: int

    @property
    def columns(self) -> slice:
        start = self.t0 * self.channels + self.c0
        return slice(start, start + (self.t1 - self.t0) * (self.c1 - self.c0))

    def grouped(self, x: Tensor) -> Tensor:
        """(G, R, columns) as patterns see it, (G, R, channels, taps)."""
        return x.unflatten(2, (self.t1 - self.t0, self.c1 - self.c0)).transpose(2, 3)

    def flat(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`grouped`."""
        return x.transpose(2, 3).flatten(2)


def pieces_of(pattern: Pattern, channels: int, taps: int, block: int) -> list[list[Piece]]:
    """The columns in blocks of about ``block``, each a list of pieces that cut none of the pattern's units."""
    unit = pattern.m if isinstance(pattern, NM) else pattern.cols
    if isinstance(pattern, Blocks) and channels <= block:
        step = max(1, block // channels)
        return [[Piece(t, min(t + step, taps), 0, channels, channels)] for t in range(0, taps, step)]
    step = unit if isinstance(pattern, NM) else max(1, block // unit) * unit
    pieces = [
        Piece(t, t + 1, c, min(c + step, channels), channels) for t in range(taps) for c in range(0, channels, step)
    ]
    per_block = max(1, block // step)
    return [pieces[i : i + per_block] for i in range(0, len(pieces), per_block)]


@dataclass(frozen=True)
class Problem:
    """Minimise tr(V·H·Vᵀ) − 2·tr(B·Vᵀ) over V (G, R, D): ``hessian`` H, ``linear`` B; damped, so that H is definite.

    ``free`` is False where weights are masked already.
    """

    hessian: Tensor
    linear: Tensor
    free: Tensor

    @classmethod
    def of(cls, weight: Tensor, hessian: Tensor, cross: Tensor, free: Tensor, damping: float) -> Problem:
        """Outputs of ``weight`` (G, R, D) on the dense inputs x, to be given on the inputs x̂ of the pruned network.

        Args:
            hessian: Σ x̂·x̂ᵀ.
            cross: Σ x·x̂ᵀ.
            damping: what is added to H's diagonal, as a fraction of its mean; it pulls towards ``weight``.
        """
        mean = hessian.diagonal(dim1=1, dim2=2).mean(1)
        extra = damping * torch.where(mean > 0, mean, 1.0)[:, None, None]
        eye = torch.eye(hessian.shape[1], dtype=hessian.dtype, device=hessian.device)
        return cls(hessian + extra * eye, weight @ cross + extra * weight, free)

    def solve(
        self, pattern: Pattern, channels: int, zeros: int, block: int = 128, refine: int = 50
    ) -> tuple[Tensor, Tensor]:
        """Weights (G, R, D) and the mask (bool) that ``pattern`` allows, with at most ``zeros`` zeros.

        Two ways to choose are tried, and the one whose least-squares solution is better is taken: SparseGPT's sweep, and
        alternating directions, which finds the mask and the weights together and more often wins in layers with many
        samples per column.
        """
        factor = torch.linalg.cholesky(self.hessian)
        minimum = torch.cholesky_solve(self.linear.transpose(1, 2), factor).transpose(1, 2)
        weight, keep = self._sweep(minimum, torch.cholesky_inverse(factor), pattern, channels, zeros, block)
        other = self._alternate(minimum, pattern, channels, zeros)
        first = self.refine(weight, keep, refine)
        second = self.refine(torch.where(other, first, 0.0), other, refine)
        return (first, keep) if self.loss(first) <= self.loss(second) else (second, other)

    def _alternate(
        self, weight: Tensor, pattern: Pattern, channels: int, zeros: int, rho: float = 0.3, rounds: int = 30
    ) -> Tensor:
        """A mask by ADMM: weights that minimise, and their nearest that the pattern allows, drawn towards each other
        (Boža, "Fast and Effective Weight Update for Pruned Large Language Models", 2024), in units in which H's diagonal is
        1 and ``rho`` is the pull."""
        scale = self.hessian.diagonal(dim1=1, dim2=2).sqrt()
        hessian = self.hessian / (scale[:, :, None] * scale[:, None, :])
        linear, weight = self.linear / scale[:, None, :], weight * scale[:, None, :]
        eye = torch.eye(hessian.shape[1], dtype=hessian.dtype, device=hessian.device)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian + rho * eye))
        excess = torch.zeros_like(weight)
        whole = Piece(0, weight.shape[2] // channels, 0, channels, channels)
        for _ in range(rounds):
            both = weight + excess
            score = whole.grouped(self._marked(whole, both.square()))
            kept = pattern.keep(score) if isinstance(pattern, NM) else pattern.keep([score], zeros)[0]
            keep = whole.flat(kept)
            allowed = torch.where(keep, both, 0.0)
            excess = both - allowed
            weight = (linear + rho * (allowed - excess)) @ inverse
        return keep

    def _sweep(
        self, weight: Tensor, inverse: Tensor, pattern: Pattern, channels: int, zeros: int, block: int
    ) -> tuple[Tensor, Tensor]:
        """From the first column to the last: choose, make zero, and let the columns behind take over what was lost
        (Frantar and Alistarh, "SparseGPT", 2023, algorithm 1)."""
        # Rows j.. of the inverse of H with the columns before j gone: one factor holds them all.
        upper = torch.linalg.cholesky(inverse, upper=True)
        scale = upper.diagonal(dim1=1, dim2=2)[:, None, :]
        blocks = pieces_of(pattern, channels, weight.shape[2] // channels, block)
        choose = self._chooser(weight, scale, pattern, blocks, zeros)
        weight = torch.where(self.free, weight, 0.0)
        keep = torch.empty_like(self.free)
        for pieces in blocks:
            start, stop = pieces[0].columns.start, pieces[-1].columns.stop
            errors = torch.zeros_like(weight[:, :, start:stop])
            for piece in pieces:
                at = piece.columns
                keep[:, :, at] = choose(piece, weight[:, :, at].square() / scale[:, :, at].square())
                for j in range(at.start, at.stop):
                    lost = torch.where(keep[:, :, j], 0.0, weight[:, :, j]) / scale[:, :, j]
                    errors[:, :, j - start] = lost
                    weight[:, :, j:stop] -= lost[:, :, None] * upper[:, None, j, j:stop]
            weight[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
        return torch.where(keep, weight, 0.0), keep

    def _chooser(
        self, weight: Tensor, scale: Tensor, pattern: Pattern, blocks: list[list[Piece]], zeros: int
    ) -> Callable[[Piece, Tensor], Tensor]:
        """A function of a piece and its current scores that gives its mask. How many weights each piece loses is settled
        beforehand, by ranking all of the layer's."""
        if isinstance(pattern, NM):
            return lambda piece, score: piece.flat(pattern.keep(piece.grouped(self._marked(piece, score))))
        pieces = [piece for block in blocks for piece in block]
        score = weight.square() / scale.square()
        grouped = [piece.grouped(self._marked(piece, score[:, :, piece.columns])) for piece in pieces]
        first = pattern.keep(grouped, zeros)
        quota = {piece: k.numel() - int(k.sum()) for piece, k in zip(pieces, first, strict=True)}
        return lambda piece, score: piece.flat(
            pattern.keep([piece.grouped(self._marked(piece, score))], quota[piece])[0]
        )

    def _marked(self, piece: Piece, score: Tensor) -> Tensor:
        return score.masked_fill(~self.free[:, :, piece.columns], -1.0)

    def refine(self, weight: Tensor, keep: Tensor, steps: int = 50) -> Tensor:
        """Least squares on what is kept: conjugate gradients, all rows at once, preconditioned by H's diagonal."""
        precondition = keep / self.hessian.diagonal(dim1=1, dim2=2)[:, None, :]
        residual = (self.linear - weight @ self.hessian) * keep
        z = residual * precondition
        direction, rz = z, (residual * z).sum(2, keepdim=True)
        tolerance = 1e-8 * rz.clamp(min=1e-300)
        for _ in range(steps):
            if bool((rz <= tolerance).all()):
                break
            h = direction @ self.hessian * keep
            curvature = (direction * h).sum(2, keepdim=True)
            step = torch.where(rz > tolerance, rz / curvature.clamp(min=1e-300), 0.0)
            weight, residual = weight + step * direction, residual - step * h
            z = residual * precondition
            after = (residual * z).sum(2, keepdim=True)
            direction = z + torch.where(rz > tolerance, after / rz.clamp(min=1e-300), 0.0) * direction
            rz = after
        return weight

    def loss(self, weight: Tensor) -> float:
        """tr(V·H·Vᵀ) − 2·tr(B·Vᵀ)."""
        return float((weight @ self.hessian * weight).sum() - 2 * (self.linear * weight).sum())
