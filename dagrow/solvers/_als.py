"""Neurons that are read in several slots at once, by alternating least squares.

Between convolutions a neuron adds ``sum over slots e of omega_e alpha^T p_e`` to a pre-activation. Slots overlap, so
that the exact second moment couples them, and the singular directions of the mean over slots solve a bound only. For
fixed alpha the best omega is a regression, and for fixed omega the best alpha is one; taking turns never explains less.
The scheme is this package's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dagrow.solvers._linalg import whitening

SWEEPS = 30
ENOUGH = 1e-4  #: relative gain of a sweep at which turns end


@dataclass(frozen=True, eq=False)
class Slotted:
    """A consumer's exact moments of features z in slots.

    Attributes:
        gram: ``E z_e z_f^T`` ``[q, e, q, e]``, with a ridge on its diagonal.
        cross: ``E z_e v_perp^T`` ``[q, e, o]``.
    """

    gram: Tensor
    cross: Tensor

    @classmethod
    def of(cls, gram: Tensor, cross: Tensor, slots: int, ridge: float) -> "Slotted":
        """From ``[q e, q e]`` and ``[q e, o]``; ridge relative to each feature's second moment."""
        damped = gram + torch.diag(ridge * gram.diagonal())
        q = len(gram) // slots
        return cls(damped.view(q, slots, q, slots), cross.view(q, slots, -1))

    def fan_out(self, alpha: Tensor, resolution: float) -> Tensor:
        """The best ``omega [k, e, o]`` for ``alpha [q, k]``."""
        k, slots = alpha.shape[1], self.gram.shape[1]
        gram = torch.einsum("qk, qerf, rl -> kelf", alpha, self.gram, alpha).reshape(k * slots, k * slots)
        cross = torch.einsum("qk, qeo -> keo", alpha, self.cross).flatten(0, 1)
        return whitening(gram, 0.0, resolution).solve(cross).view(k, slots, -1)

    def drop(self, alpha: Tensor, omega: Tensor) -> float:
        """``2 tr(X N) - tr(X P X^T)``."""
        written = torch.einsum("qk, keo -> qeo", alpha, omega)
        return float((written * (2 * self.cross - torch.einsum("qerf, rfo -> qeo", self.gram, written))).sum())

    def normal(self, alpha: Tensor, omega: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """The normal equations ``H alpha_k = r`` of one neuron's fan-in, the others being as they are."""
        others = torch.einsum("qk, keo -> qeo", alpha, omega) - alpha[:, at, None, None] * omega[at]
        left = self.cross - torch.einsum("qerf, rfo -> qeo", self.gram, others)
        h = torch.einsum("qerf, ef -> qr", self.gram, omega[at] @ omega[at].T)
        return h, torch.einsum("qeo, eo -> q", left, omega[at])


def alternated(parts: Sequence[Slotted], alpha: Tensor, resolution: float) -> Tensor:
    """Fan-in ``alpha [q, k]`` that explains at least as much as the one given, each with its best fan-out."""
    best, reached = alpha, float("-inf")
    for _ in range(SWEEPS):
        omegas = [part.fan_out(alpha, resolution) for part in parts]
        drop = sum(part.drop(alpha, omega) for part, omega in zip(parts, omegas, strict=True))
        if drop <= reached + ENOUGH * abs(reached):
            return alpha if drop > reached else best
        best, reached = alpha, drop
        alpha = alpha.clone()
        for at in range(alpha.shape[1]):
            pairs = [part.normal(alpha, omega, at) for part, omega in zip(parts, omegas, strict=True)]
            h, r = (torch.stack(list(side)).sum(0) for side in zip(*pairs, strict=True))
            alpha[:, at] = whitening(h, 0.0, resolution).solve(r[:, None])[:, 0]
    return best
