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

MAX_SWEEPS = 30
TOLERANCE = 1e-4  #: relative gain of a sweep at which turns end


@dataclass(frozen=True, eq=False)
class SlotMoments:
    """A consumer's exact moments of features z in slots.

    Attributes:
        gram: ``E z_e z_f^T`` ``[q, e, q, e]``, with a ridge on its diagonal.
        cross: ``E z_e v_perp^T`` ``[q, e, o]``.
    """

    gram: Tensor
    cross: Tensor

    @classmethod
    def of(cls, gram: Tensor, cross: Tensor, slots: int, ridge: float) -> "SlotMoments":
        """From moments in which a feature's slots are neighbours.

        Args:
            gram: ``[q e, q e]``.
            cross: ``[q e, o]``.
            slots: e.
            ridge: relative to each feature's second moment.

        Returns:
            The moments by feature and slot.
        """
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
        """``2 tr(X N) - tr(X P X^T)`` for ``alpha [q, k]`` and ``omega [k, e, o]``."""
        written = torch.einsum("qk, keo -> qeo", alpha, omega)
        return float((written * (2 * self.cross - torch.einsum("qerf, rfo -> qeo", self.gram, written))).sum())

    def normal_equations(self, alpha: Tensor, omega: Tensor, neuron: int) -> tuple[Tensor, Tensor]:
        """``H [q, q]`` and ``r [q]`` of ``H alpha_k = r`` for one neuron's fan-in, the others being as they are."""
        others = torch.einsum("qk, keo -> qeo", alpha, omega) - alpha[:, neuron, None, None] * omega[neuron]
        remaining = self.cross - torch.einsum("qerf, rfo -> qeo", self.gram, others)
        h = torch.einsum("qerf, ef -> qr", self.gram, omega[neuron] @ omega[neuron].T)
        return h, torch.einsum("qeo, eo -> q", remaining, omega[neuron])


def alternating_least_squares(consumers: Sequence[SlotMoments], alpha: Tensor, resolution: float) -> Tensor:
    """Fan-in that explains at least as much as the one at the start, each with its best fan-out.

    Args:
        consumers: moments at each of them.
        alpha: the start ``[q, k]``.
        resolution: relative precision of the moments.

    Returns:
        ``alpha [q, k]``.
    """
    best, best_drop = alpha, float("-inf")
    for _ in range(MAX_SWEEPS):
        omegas = [consumer.fan_out(alpha, resolution) for consumer in consumers]
        drop = sum(consumer.drop(alpha, omega) for consumer, omega in zip(consumers, omegas, strict=True))
        if drop <= best_drop + TOLERANCE * abs(best_drop):
            return alpha if drop > best_drop else best
        best, best_drop = alpha, drop
        alpha = alpha.clone()
        for neuron in range(alpha.shape[1]):
            equations = [
                consumer.normal_equations(alpha, omega, neuron)
                for consumer, omega in zip(consumers, omegas, strict=True)
            ]
            h, r = (torch.stack(sides).sum(0) for sides in zip(*equations, strict=True))
            alpha[:, neuron] = whitening(h, 0.0, resolution).solve(r[:, None])[:, 0]
    return best
