"""From moments to weights and gains: the closed forms, one function per equation of docs/method.md.

One regression carries everything. At a pre-activation with goal ``v`` that reads ``b`` (and new features ``p``),

    v  =  dW b  +  v_perp,        v_perp  ~  X p.

Source: Verbockhaven and Charpiat, "Neural Architecture Growth using Tangent Space"; the joint form and the
compensation of the constant are this package's own.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dagrow.solvers._linalg import leading_svd, projected_energy, whitening
from dagrow.solvers._moments import MomentView
from dagrow.solvers._residual import CANCELLATION, Regression, Residual, StackedResidual
from dagrow.solvers._row_products import dense

OVERSAMPLING = 16  #: more goals than neurons in which singular vectors are sought


@dataclass(frozen=True)
class Move:
    """The best move of a target's own weights: ``dW = M^T S^-1 [o, i]`` and what it does to the goal.

    Attributes:
        weights: ``dW [o, i]``.
        gain: ``tr(dW M)``: minus the slope of the loss along dW.
        drop: ``E|v|^2 - E|v - dW b|^2``: what it explains of the goal.
        note: what had to be done to a singular S, or "".
    """

    weights: Tensor
    gain: float
    drop: float
    note: str


@dataclass(frozen=True)
class Directions:
    """The leading directions of what new features explain.

    Attributes:
        alpha: ``[p, k]`` with ``alpha^T (P' + ridge) alpha = 1``.
        values: singular values ``l [k]``.
        note: what had to be done to a singular matrix, or "".
    """

    alpha: Tensor
    values: Tensor
    note: str


@dataclass(frozen=True)
class Fit:
    """The regression of what is left to explain on given features.

    Attributes:
        weights: fan-out ``X [o, k]``.
        compensation: the move ``-X D^T`` of the target's own weights that goes with it ``[o, i]``, or None.
        gain: ``E <v, X p'>`` with p' the compensated features: minus the slope of the loss.
        drop: by how much the bottleneck falls.
        note: what had to be done to a singular P', or "".
    """

    weights: Tensor
    compensation: Tensor | None
    gain: float
    drop: float
    note: str


def best_move(m: MomentView, reads: Hashable, goal: Hashable, ridge: float = 0.0) -> Move:
    """Equation 1: ``dW = M^T S^-1``, which explains ``2 tr(dW M) - tr(dW S dW^T)`` of ``E|v|^2``, for any ridge.

    Args:
        m: moments of the samples that it is fitted on.
        reads: the features ``b``.
        goal: the goal ``v``.
        ridge: relative to each feature's second moment.

    Returns:
        The move ``[o, i]``, its gain and what it explains.
    """
    S, M, white = m.product(reads, reads), m[reads, goal], m.whitening(reads, ridge)
    dW = white.solve(M).T
    gain = float((dW.T * M).sum())
    return Move(dW, gain, 2 * gain - float((dW.T * (S @ dW.T)).sum()), white.note)


def explained(m: MomentView, reads: Hashable, goal: Hashable, ridge: float = 0.0) -> tuple[float, bool]:
    """What :func:`best_move` explains of ``E|v|^2``; without a ridge that is ``|W M|^2``, at half of its expense.

    Args:
        m: moments of the samples that it is fitted on.
        reads: the features ``b``.
        goal: the goal ``v``.
        ridge: relative to each feature's second moment.

    Returns:
        The drop of the bottleneck, and whether it may be more: where S is singular, and its eigenvalues run on into
        rounding.
    """
    if ridge:
        return best_move(m, reads, goal, ridge).drop, m.whitening(reads, ridge).is_blurred
    return projected_energy(m.product(reads, reads), m[reads, goal], m.resolution)


def directions(m: MomentView, regressions: Sequence[Regression], k: int, ridge: float = 0.0) -> Directions:
    """Equation 3 (and 4 with compensation "all"): ``U L V^T = svd(W N)``, ``alpha_k = W^T u_k``.

    Directions that are rounding are left out: of the largest one, or of ``W R``, where all of N is.

    Args:
        m: moments of the samples that they are fitted on.
        regressions: of the same new features at each of their targets.
        k: how many, at most.
        ridge: of P', relative to each feature's second moment.

    Returns:
        At most k directions, the one that explains most first.
    """
    stack = StackedResidual.of(m, regressions)
    white = stack.whitening(ridge)
    goals = stack.leading_goals(white, k + OVERSAMPLING, iterations=4)
    u, values, _ = leading_svd(white.whiten(stack.cross_of(goals)), k)
    largest, raw = float(values[:1].sum()), float(white.whiten(stack.raw_cross_of(goals)).norm())
    kept = values > m.resolution * max(len(stack.gram) * largest, CANCELLATION * raw)
    notes = dict.fromkeys(note for note in (white.note, *(part.note for part in stack.parts)) if note)
    return Directions(white.back(u[:, kept]), values[kept], "; ".join(notes))


def fan_out(m: MomentView, regression: Regression, choice: Tensor | None, ridge: float = 0.0) -> Fit:
    """Equations 5 and 6: the regression of what is left on new features, which may be any function of the input.

    Args:
        m: moments of the samples that it is fitted on.
        regression: the features and their target.
        choice: the indices of the features that are offered ``[k]``, or which sums of them ``[p, k]``; None for all.
        ridge: relative to each feature's second moment.

    Returns:
        The weights ``X [o, k]``, the move that goes with them, and what both explain.
    """
    return residual_fit(Residual.of(m, regression, choice), ridge)


def residual_fit(residual: Residual, ridge: float) -> Fit:
    """``X = N^T (P' + ridge)^-1``."""
    P, N, D, m = residual.gram, residual.cross, residual.D, residual.m
    p, b, v = residual.regression.features, residual.regression.reads, residual.regression.goal
    white = whitening(P, ridge, residual.resolution, residual.unit)
    X = white.solve(N).T
    slope, compensation = dense(residual.basis.rows(m.product(p, v))), None
    if D is not None:
        slope, compensation = slope - D.T @ m.product(b, v), -X @ D.T
    drop = 2 * float((X.T * N).sum()) - float((X.T * (P @ X.T)).sum())
    return Fit(X, compensation, float((X.T * slope).sum()), drop, white.note)
