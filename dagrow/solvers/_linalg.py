"""Matrices only: Grams, damped positive semidefinite solves, whitening, leading singular vectors.

All cut-offs are relative to the data: matrices are first scaled to a unit diagonal, so that neither the unit of
a single feature nor the size of all of them decides what counts as zero.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dagrow.solvers._row_products import Product, RowProduct, row_noise

_RANDOM = 256  #: features from which on rounding of a Gram's entries averages out: it moves eigenvalues by d^0.5, not d
_APART = 100  #: times what rounding moves: where eigenvalues end above that, it hides none
_BLOCK, _ITERATIONS = 16, 4  #: columns and steps by which directions are sought that a matrix does not hold
_COARSE = 1e-10  #: resolutions above it are those of single precision and below
_SMALL = 512  #: features up to which eigenvalues are cheap
_FROM_RIGHT = 64  #: columns from which on it takes about half of the time, in single precision, to solve from the right
_ITERATED = 192  #: up to this width subspaces are not worth iterating for


@dataclass(frozen=True)
class Whitening:
    """A factor ``W`` with ``W (P + ridge) W^T = 1`` on the directions that P holds.

    Attributes:
        scale: the diagonal D ``[p]`` that brings P to a unit diagonal; ``D^2`` if P is known by rows.
        basis: orthonormal rows ``Q [r, p]`` that span what ``D P D`` holds; if P is known by rows, ``Q D^-1``, which
            are combinations of them; None for all of it.
        root: the Cholesky factor ``R [r, r]`` of ``Q (D P D + ridge) Q^T``; or, if Q holds eigenvectors, the square
            roots of their eigenvalues ``[r]``. So ``W = R^-1 Q D``.
        note: what had to be done to a singular matrix, or "".
        is_blurred: whether eigenvalues run on into rounding, so that there may be more directions than are kept.
    """

    scale: Tensor
    basis: Product | None
    root: Tensor
    note: str
    is_blurred: bool = False

    @property
    def rank(self) -> int:
        """The directions that P holds."""
        return len(self.root)

    def whiten(self, x: Tensor) -> Tensor:
        """``W x`` for ``x [p, m]``."""
        scaled = self.scale[:, None] * x
        inside = (scaled if self.basis is None else self.basis @ scaled).to(self.root)
        if self.root.ndim == 1:
            return (inside / self.root[:, None]).to(x)
        return _substituted(self.root, inside).to(x)

    def back(self, u: Tensor) -> Tensor:
        """``W^T u`` for ``u [rank, m]``."""
        if self.root.ndim == 1:
            inside = u / self.root[:, None]
        else:
            inside = _substituted(self.root, u.to(self.root), transposed=True)
        return self.scale[:, None] * (inside if self.basis is None else self.basis.T @ inside).to(u)

    def solve(self, x: Tensor) -> Tensor:
        """``(P + ridge)^-1 x``, the pseudo-inverse where P is singular."""
        return self.back(self.whiten(x))


def _substituted(root: Tensor, x: Tensor, *, transposed: bool = False) -> Tensor:
    """``R^-1 X``, or ``R^-T X``, for a lower triangular R."""
    if x.dtype != torch.float32 or x.shape[1] < _FROM_RIGHT:
        return torch.linalg.solve_triangular(root.T if transposed else root, x, upper=transposed)
    return torch.linalg.solve_triangular(root if transposed else root.T, x.T, upper=not transposed, left=False).T


def whitening(p: Product, ridge: float = 0.0, resolution: float | None = None, unit: Tensor | None = None) -> Whitening:
    """A whitening of a positive semidefinite matrix.

    Args:
        p: ``[p, p]``. One that is known by rows is whitened on their span, where all lies that they make.
        ridge: added to the diagonal, relative to ``unit``.
        resolution: relative precision of the entries; directions below it are noise and are cut.
        unit: what counts as large, per feature ``[p]``: by default the diagonal of ``p``. If ``p`` is what is left of
            features once others are regressed out, the second moment that they had before.

    Returns:
        By Cholesky of the matrix, or of its rows' products; or by an eigendecomposition with a relative cut-off if the
        matrix is singular.
    """
    d, unit = len(p), (p.diagonal() if unit is None else unit).clamp_min(0)
    scale, cut = _scale(unit, resolution)
    if isinstance(p, RowProduct):
        return _whitened_rows(p, scale, ridge, resolution, cut)
    scaled = _scaled(p, scale, ridge)
    factor = _factor(scaled, cut * (1 + ridge))
    if factor is not None:
        return Whitening(scale, None, factor, "")
    alive = scale > 0
    values, some = torch.linalg.eigh(scaled[alive][:, alive].double())  # in single precision it may not converge
    vectors = some.new_zeros(d, len(values))
    vectors[alive] = some
    return _whitened(values, vectors, scale, 0.0, _noise(cut, d))


def _scale(unit: Tensor, resolution: float | None) -> tuple[Tensor, float]:
    """The diagonal D ``[d]`` that brings features to size 1, dead ones to 0, and below what pivots are rounding."""
    d = len(unit)
    cut = max(resolution or 0.0, torch.finfo(unit.dtype).eps) * max(d, 1)
    alive = unit > (cut**2 * unit.max() if d else 0)
    return torch.where(alive, unit, 1).rsqrt() * alive, cut


def _scaled(p: Tensor, scale: Tensor, ridge: float) -> Tensor:
    """``D P D + ridge``; a dead feature has weight zero, whatever its entry."""
    scaled = (p * scale).mul_(scale[:, None])
    scaled.diagonal().add_(torch.where(scale > 0, p.new_tensor(ridge), p.new_tensor(1.0)))
    return scaled


def _factor(scaled: Tensor, least: float) -> Tensor | None:
    """The Cholesky factor, if no pivot is below a bound."""
    factor, failed = torch.linalg.cholesky_ex(scaled.mT)  # LAPACK reads columns
    if failed or (len(factor) and factor.diagonal().min() ** 2 <= least):
        return None
    return factor


def _noise(cut: float, d: int) -> float:
    """By how much rounding of entries moves eigenvalues."""
    return cut * min(1.0, (_RANDOM / d) ** 0.5)


def projected_energy(p: Product, cross: Tensor, resolution: float) -> tuple[float, bool]:
    """``tr(M^T P^+ M)``: the part of goals that features explain.

    By Cholesky, if need be without some directions that P does not hold, or with a shift where many are hidden by
    rounding; else, or where P is known by rows, on its eigenvectors.

    Args:
        p: ``[p, p]``, positive semidefinite.
        cross: M ``[p, o]``, which lies in the range of P but for rounding.
        resolution: relative precision of the entries.

    Returns:
        The energy, and whether it may be more, as eigenvalues run on into rounding.
    """
    unit = p.diagonal().clamp_min(0)
    if isinstance(p, RowProduct) and len(p.x) > int(unit.count_nonzero()):
        p = p.dense()  # more rows than features that vary
    if isinstance(p, Tensor):
        found = _energy_by_factors(p, cross, *_scale(unit, resolution))
        if found is not None:
            return found
    white = whitening(p, 0.0, resolution)
    return float(white.whiten(cross).square().sum()), white.is_blurred


def _energy_by_factors(p: Tensor, cross: Tensor, scale: Tensor, cut: float) -> tuple[float, bool] | None:
    """The same by Cholesky factors alone; None where it takes eigenvalues."""
    scaled, wanted, noise = _scaled(p, scale, 0.0), scale[:, None] * cross, _noise(cut, len(p))
    root, is_blurred = _factor(scaled, cut), False
    if root is None:
        rounding = torch.finfo(p.dtype).eps * len(p)
        shifted = _factor(scaled + noise * torch.eye(len(p)).to(p), rounding)
        if shifted is None:
            return None
        values, vectors = _smallest(shifted, scaled)
        held = values > noise
        if held.any():  # whatever is not held is known
            null, is_blurred = vectors[:, ~held], bool(values[held][0] < _APART * noise)
            root, wanted = _factor(scaled + null @ null.T, rounding), wanted - null @ (null.T @ wanted)
        elif cut > _COARSE * len(p) and len(p) > _SMALL:  # the shift is where the cut would be, which rounding moved
            root, is_blurred = shifted, True
    return None if root is None else (float(_substituted(root, wanted).square().sum()), is_blurred)


def _smallest(root: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest eigenvalues ``[r]`` of a matrix P ``[p, p]``, with orthonormal vectors ``[p, r]``.

    Features behind a LayerNorm have one that is zero: a combination of them is constant. By inverse iteration of a
    block.

    Args:
        root: the Cholesky factor of P, shifted.
        p: P.

    Returns:
        Ritz values, smallest first, and vectors.
    """
    block = torch.randn(len(p), _BLOCK, generator=torch.Generator().manual_seed(0)).to(p)
    for _ in range(_ITERATIONS):
        block = torch.linalg.qr(_substituted(root, _substituted(root, block), transposed=True)).Q
    values, vectors = torch.linalg.eigh(block.T @ p @ block)
    return values, block @ vectors


def _whitened_rows(p: RowProduct, scale: Tensor, ridge: float, resolution: float | None, cut: float) -> Whitening:
    """On the span of the rows: by Cholesky, or by eigenvalues where these decide what counts."""
    in_double, alive = p.x.dtype == torch.float64, int(scale.count_nonzero())
    found = p.triangular(scale) if ridge or len(p.x) <= alive else None  # more rows than that are dependent
    noise = row_noise(resolution) if in_double else cut * alive
    if found is not None and (
        found.shift <= 10 * max(torch.finfo(p.x.dtype).eps, 1e-9) * ridge if ridge else found.smallest > _APART * noise
    ):
        damped = found.gram + ridge * torch.eye(len(found.gram)).to(found.gram)
        note = "" if ridge or len(damped) == len(scale) else f"rank cut from {len(scale)} to {len(damped)}"
        return Whitening(scale.square(), found.vectors.T, torch.linalg.cholesky(damped), note)
    values, rows = p.spectrum(scale)
    return _whitened(values, rows, scale, ridge, row_noise(resolution) if in_double else cut * float(values[-1:].sum()))


def _whitened(values: Tensor, vectors: Product, scale: Tensor, ridge: float, noise: float) -> Whitening:
    """By eigenvalues of the scaled matrix, to which a ridge comes, and eigenvectors ``[d, r]``, by rows ``D^-1 V``."""
    # rounding of entries, which are at most 1, moves eigenvalues by noise; finding them by a part of the largest
    largest = max(1.0, float(values[-1])) if len(values) else 1.0
    least = 0.0 if ridge else max(noise, torch.finfo(torch.float64).eps * len(scale) * largest)
    kept = values > least
    rank = int(kept.sum())
    is_blurred = not ridge and rank < len(values) and bool((values[kept][:1] < _APART * noise).any())
    if rank < len(values):
        chosen = torch.nonzero(kept).flatten()
        values = values[chosen]
        vectors = vectors.columns(chosen) if isinstance(vectors, RowProduct) else vectors[:, chosen]
    note = "" if ridge or rank == len(scale) else f"rank cut from {len(scale)} to {rank}"
    root = (values + ridge).sqrt()
    if isinstance(vectors, RowProduct):
        return Whitening(scale.square(), vectors.T, root, note, is_blurred)
    return Whitening(scale, vectors.T.to(scale), root.to(scale), note, is_blurred)


def leading_subspace(
    times: Callable[[Tensor], Tensor],
    transposed: Callable[[Tensor], Tensor],
    width: int,
    q: int,
    like: Tensor,
    iterations: int,
) -> Tensor:
    """Orthonormal columns ``[width, q]`` that hold the leading right singular vectors of a matrix, known by products.

    Subspace iteration from a fixed random start; the identity where the matrix has few columns anyway. Source: Halko,
    Martinsson and Tropp 2011.

    Args:
        times: the matrix times columns ``[width, q]``.
        transposed: the matrix' transpose times columns ``[rows, q]``.
        width: columns of the matrix.
        q: columns to be found.
        like: a tensor of the same dtype and device.
        iterations: of the subspace.

    Returns:
        ``[width, q]``, or the identity ``[width, width]``.
    """
    if width <= max(q, _ITERATED):
        return torch.eye(width).to(like)
    columns = torch.randn(width, q, generator=torch.Generator().manual_seed(0)).to(like)
    for _ in range(iterations):
        columns = torch.linalg.qr(transposed(torch.linalg.qr(times(columns)).Q)).Q
    return columns


def leading_svd(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k leading singular triples, largest first.

    Args:
        matrix: ``[m, n]``.
        k: how many, at most.

    Returns:
        ``u [m, k], s [k], v [n, k]``.
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :k], s[:k], vh[:k].T
