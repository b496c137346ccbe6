"""Matrices only: Grams, damped positive semidefinite solves, whitening, leading singular vectors.

All cut-offs are relative to the data: matrices are first scaled to a unit diagonal, so that neither the unit of
a single feature nor the size of all of them decides what counts as zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Whitening", "gram", "leading_svd", "whitening"]

_HALVED = 256  #: Grams from this width on are computed by blocks, without the redundant one
_SMALL = 192  #: matrices up to this width are decomposed in full


def gram(x: Tensor) -> Tensor:
    """``x^T x`` ``[d, d]``, exactly symmetric; a quarter cheaper than the plain product when d is large."""
    d = x.shape[1]
    if d < _HALVED:
        return x.T @ x
    left, right = x[:, : d // 2], x[:, d // 2 :]
    cross = left.T @ right
    return torch.cat([torch.cat([gram(left), cross], 1), torch.cat([cross.T, gram(right)], 1)])


@dataclass(frozen=True)
class Whitening:
    """A factor ``W`` with ``W (P + ridge) W^T = 1`` on the directions that P holds.

    Attributes:
        factor: Cholesky factor ``L`` of the scaled matrix (``W = L^-1 D``), or ``W D^-1`` itself if P is singular.
        scale: the diagonal D ``[p]``.
        rank: the number of directions.
        note: what had to be done to a singular matrix, or "".
    """

    factor: Tensor
    scale: Tensor
    triangular: bool
    rank: int
    note: str

    def whiten(self, x: Tensor) -> Tensor:
        """``W x`` for ``x [p, m]``."""
        scaled = self.scale[:, None] * x
        if self.triangular:
            return torch.linalg.solve_triangular(self.factor, scaled, upper=False)
        return self.factor @ scaled

    def back(self, u: Tensor) -> Tensor:
        """``W^T u`` for ``u [rank, m]``."""
        if self.triangular:
            return self.scale[:, None] * torch.linalg.solve_triangular(self.factor.T, u, upper=True)
        return self.scale[:, None] * (self.factor.T @ u)

    def solve(self, x: Tensor) -> Tensor:
        """``(P + ridge)^-1 x``, the pseudo-inverse where P is singular."""
        return self.back(self.whiten(x))


def whitening(p: Tensor, ridge: float = 0.0, resolution: float | None = None, unit: Tensor | None = None) -> Whitening:
    """A whitening of a positive semidefinite matrix ``p [p, p]``.

    Args:
        ridge: added to the diagonal, relative to ``unit``.
        resolution: relative precision of the entries; directions below it are noise and are cut.
        unit: what counts as large, per feature ``[p]``: by default the diagonal of ``p``. If ``p`` is what is left of
            features once others are regressed out, the second moment that they had before.
    """
    d = len(p)
    resolution = max(resolution or 0.0, torch.finfo(p.dtype).eps)
    cut = resolution * max(d, 1)
    unit = (p.diagonal() if unit is None else unit).clamp_min(0)
    alive = unit > (cut**2 * unit.max() if d else 0)
    scale = torch.where(alive, unit, 1).rsqrt() * alive
    scaled = scale[:, None] * p * scale
    scaled.diagonal().add_(
        torch.where(alive, p.new_tensor(ridge), p.new_tensor(1.0))
    )  # a dead feature has weight zero, whatever its entry
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if not failed and (not d or factor.diagonal().min() ** 2 > cut * (1 + ridge)):
        return Whitening(factor, scale, True, int(alive.sum()), "")
    scaled.diagonal().mul_(alive)
    values, vectors = torch.linalg.eigh(scaled)
    kept = values > cut * values.max()
    factor, rank = (vectors[:, kept] * values[kept].rsqrt()).T, int(kept.sum())
    return Whitening(factor, scale, False, rank, f"rank cut from {d} to {rank}")


def leading_svd(matrix: Tensor, k: int, iterations: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """The k leading singular triples ``u [m, k], s [k], v [n, k]``, largest first."""
    k = min(k, *matrix.shape)
    if min(matrix.shape) <= _SMALL or 4 * k > min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :k], s[:k], vh[:k].T
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, q=k + 16, niter=iterations)
    return u[:, :k], s[:k], v[:, :k]
