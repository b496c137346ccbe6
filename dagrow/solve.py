"""From moments to weights and gains: the closed forms, one function per equation.

One regression carries everything. At a pre-activation with goal ``v`` that reads ``b`` (and new features ``p``),

    v  =  dW b  +  v_perp,        v_perp  ~  X p,

with ``S = E b b^T``, ``M = E b v^T``, ``C = E p b^T``, ``R = E p v^T``, ``P = E p p^T``. Source: Verbockhaven and
Charpiat, "Neural Architecture Growth using Tangent Space"; the joint form, the compensation of the constant and
the cross-validation are this package's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from dagrow.linalg import leading_svd, whitening
from dagrow.moments import Feature, Goal, Moments, Pair, Reads

__all__ = [
    "RIDGES", "Block", "Directions", "Fit", "HeldOut", "Move", "best_move", "directions", "fan_out",
    "validate_directions", "validate_fan_out", "validate_move",
]  # fmt: skip

RIDGES: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  #: candidates, relative to each feature's second moment
SIGNIFICANT = 3.0  #: standard deviations of the null by which a held-out gain must exceed zero
MOST = 128  #: neurons considered at once when their number is open

Compensation = Literal["none", "constant", "all"]


@dataclass(frozen=True)
class Block:
    """New features at one target.

    Attributes:
        features: the new features ``p`` as they arrive there, ``slots`` groups of them side by side.
        reads: the features ``b`` that the target's own weights can use, or None if they are frozen.
        goal: the goal ``v``.
        compensation: which part of ``b`` is regressed out of the new features, with the target's own weights moving
            along: none of it, the constant only (the bias takes out the features' mean), or all (the joint optimum).
        project: whether the target is ``v_perp`` or, if not, ``v`` itself.
    """

    features: Feature
    slots: int
    reads: Reads | None
    goal: Goal
    compensation: Compensation = "none"
    project: bool = True

    def pairs(self) -> list[Pair]:
        """The moments that the block needs."""
        pairs: list[Pair] = [(self.features, self.features), (self.features, self.goal), (self.goal, self.goal)]
        if self.reads is not None:
            pairs += [(self.features, self.reads), (self.reads, self.reads), (self.reads, self.goal)]
        return pairs


@dataclass(frozen=True)
class Move:
    """The best move of a target's own weights: ``dW = M^T S^-1 [o, i]`` and what it does to the goal."""

    weights: Tensor
    gain: float  #: tr(dW M): minus the slope of the loss along dW
    goal: float  #: E|v|^2
    bottleneck: float  #: E|v - dW b|^2
    note: str


@dataclass(frozen=True)
class HeldOut:
    """What a fit on the other folds explains of each fold: mean over folds, standard error, and whether it is real."""

    ridge: float
    k: int
    gain: float
    error: float
    significant: bool


@dataclass(frozen=True)
class Directions:
    """The leading directions ``alpha [p, k]`` (whitened: ``alpha^T P alpha = 1``) and singular values ``l [k]``."""

    alpha: Tensor
    values: Tensor
    note: str


@dataclass(frozen=True)
class Fit:
    """The regression of what is left to explain on given features.

    Attributes:
        weights: fan-out ``X [o, k]``.
        compensation: the move of the target's own weights that goes with it ``[o, i]``, or None.
        gain: ``E <v, X h'>`` with h' the compensated features: minus the slope of the loss.
        drop: by how much the bottleneck falls.
    """

    weights: Tensor
    compensation: Tensor | None
    gain: float
    drop: float
    note: str


def best_move(m: Moments, reads: Reads, goal: Goal, ridge: float = 0.0) -> Move:
    """Equation 1: ``dW = M^T S^-1``, residual bottleneck ``E|v|^2 - tr(dW M)`` (exact for any ridge)."""
    s, cross, energy = m[reads, reads], m[reads, goal], float(m[goal, goal].trace())
    white = whitening(s, ridge, m.resolution)
    dw = white.solve(cross).T
    gain = float((dw.T * cross).sum())
    return Move(dw, gain, energy, energy - 2 * gain + float((dw @ s * dw).sum()), white.note)


@dataclass(frozen=True)
class _Projection:
    """What is taken out of goals (``dW^T [i, o]``) and of features (``D [p, i]``), fitted on some folds."""

    move: Tensor | None
    taken: Tensor | None
    note: str = ""


def _projection(m: Moments, block: Block, ridge: float) -> _Projection:
    if block.reads is None:
        return _Projection(None, None)
    s, c = m[block.reads, block.reads], m[block.features, block.reads]
    white = whitening(s, ridge, m.resolution)
    move = white.solve(m[block.reads, block.goal]) if block.project else None
    taken = None
    if block.compensation == "all":
        taken = white.solve(c.T).T
    elif block.compensation == "constant" and block.reads.bias:
        taken = torch.zeros_like(c)
        taken[:, -1] = c[:, -1] / s[-1, -1]
    return _Projection(move, taken, white.note)


def _remaining(m: Moments, block: Block, projection: _Projection) -> tuple[Tensor, Tensor]:
    """Equation 2 and its joint form: ``P = E p' p'^T`` and ``N = E p' t^T``.

    p' are the new features and t the goal, less what the projection takes out of them. The projection may come
    from other folds than the moments.
    """
    p, n = m[block.features, block.features], m[block.features, block.goal]
    if block.reads is None:
        return p, n
    c = m[block.features, block.reads]
    if projection.move is not None:
        n = n - c @ projection.move
    if projection.taken is not None:
        d, s, rest = projection.taken, m[block.reads, block.reads], m[block.reads, block.goal]
        if projection.move is not None:
            rest = rest - s @ projection.move
        overlap = d @ c.T
        n, p = n - d @ rest, p - overlap - overlap.T + d @ s @ d.T
    return p, n


def _stacked(m: Moments, blocks: Sequence[Block], projections: Sequence[_Projection]) -> tuple[Tensor, Tensor]:
    """Several consumers, or several channels of a unit in one: N side by side, P averaged over them.

    The average is exact when all read the new features at the same positions with the same ``b`` taken out of them;
    otherwise it is a proposal, and the fan-outs are fitted to each consumer afterwards.
    """
    grams, sides = [], []
    for block, projection in zip(blocks, projections, strict=True):
        p, n = _remaining(m, block, projection)
        p = rearrange(p, "(e p) (f q) -> e f p q", e=block.slots, f=block.slots)
        grams.append(p.diagonal(dim1=0, dim2=1).mean(-1))
        sides.append(rearrange(n, "(e p) o -> p (e o)", e=block.slots))
    return torch.stack(grams).mean(0), torch.cat(sides, 1)


def directions(m: Moments, blocks: Sequence[Block], k: int, ridge: float = 0.0) -> Directions:
    """Equation 3 (and 4 with compensation "all"): ``U L V^T = svd(W N)``, ``alpha_k = W^T u_k``."""
    projections = [_projection(m, block, ridge) for block in blocks]
    p, n = _stacked(m, blocks, projections)
    white = whitening(p, ridge, m.resolution)
    u, values, _ = leading_svd(white.whiten(n), k)
    kept = values > m.resolution * len(p) * values.max() if len(values) else values > 0
    notes = dict.fromkeys(note for note in (white.note, *(q.note for q in projections)) if note)
    return Directions(white.back(u[:, kept]), values[kept], "; ".join(notes))


def validate_directions(m: Moments, blocks: Sequence[Block], k: int | None, ridges: Sequence[float]) -> HeldOut:
    """Chooses ridge and rank by what directions from the other folds explain of each fold.

    For a fit ``X`` on the other folds, the held-out drop is ``2 tr(X N_f) - tr(X P_f X^T)``; the columns of V are
    orthonormal, so one decomposition gives it for every rank. Under the null that goals are independent of the new
    features, the held-out covariance ``tr(X N_f)`` has mean 0 and variance ``tr(X P_f X^T E v v^T) / n_f``.
    """
    most = k if k is not None else MOST
    drops = torch.stack(
        [torch.stack([_held_out(m, f, blocks, most, ridge)[0] for f in range(m.folds)]) for ridge in ridges]
    )
    mean = drops.mean(1)  # [ridges, ranks]
    columns = mean[:, -1:] if k is not None else mean
    best = int(columns.argmax())
    ridge, rank = ridges[best // columns.shape[1]], (columns.shape[1] if k is None else mean.shape[1])
    rank = best % columns.shape[1] + 1 if k is None else rank
    chosen = drops[ridges.index(ridge), :, rank - 1]
    score = _null_score(m, blocks, rank, ridge)
    gain = float(chosen.mean())
    return HeldOut(ridge, rank, gain, _standard_error(chosen), gain > 0 and score > SIGNIFICANT)


def _held_out(m: Moments, fold: int, blocks: Sequence[Block], k: int, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Held-out drop by rank ``[k]``, held-out covariance by rank ``[k]`` and its null variance by rank ``[k]``."""
    train, test = m.without(fold), m.fold(fold)
    projections = [_projection(train, block, ridge) for block in blocks]
    p, n = _stacked(train, blocks, projections)
    white = whitening(p, ridge, m.resolution)
    u, values, v = leading_svd(white.whiten(n), k)
    p_test, n_test = _stacked(test, blocks, projections)
    alpha = white.back(u)
    covariance = values * ((n_test.T @ alpha) * v).sum(0)
    z = alpha.T @ p_test @ alpha
    noise = _goal_energy(test, blocks, v * values)
    return (
        _padded((2 * covariance - values**2 * z.diagonal()).cumsum(0), k),
        _padded(covariance.cumsum(0), k),
        _padded(torch.stack([(z[:r, :r] * noise[:r, :r]).sum() for r in range(1, len(values) + 1)]) / test.samples, k),
    )


def _goal_energy(m: Moments, blocks: Sequence[Block], omega: Tensor) -> Tensor:
    """``omega^T (E v v^T) omega`` ``[k, k]``, goals of different consumers and channels of a unit counted apart."""
    total, start = omega.new_zeros(omega.shape[1], omega.shape[1]), 0
    for block in blocks:
        covariance = m[block.goal, block.goal]
        for _ in range(block.slots):
            part = omega[start : start + len(covariance)]
            total += part.T @ covariance @ part
            start += len(covariance)
    return total


def _null_score(m: Moments, blocks: Sequence[Block], rank: int, ridge: float) -> float:
    """The held-out covariance over all folds, in standard deviations of the null."""
    parts = [_held_out(m, f, blocks, rank, ridge) for f in range(m.folds)]
    covariance = torch.stack([c[rank - 1] for _, c, _ in parts]).sum()
    variance = (
        2 * torch.stack([v[rank - 1] for _, _, v in parts]).sum()
    )  # folds share what they are fitted on: at most 2
    return float(covariance / variance.clamp_min(1e-300).sqrt())


def fan_out(m: Moments, block: Block, choice: Tensor, ridge: float = 0.0) -> Fit:
    """Equation 5 with few features: the regression of what is left on ``h = choice^T features``, for any activation.

    Args:
        choice: ``[features, k]``: which of the measured features (or which sums of them) are offered.
    """
    projection = _projection(m, block, ridge)
    p, n = _remaining(m, block, projection)
    p, n = choice.T @ p @ choice, choice.T @ n
    white = whitening(p, ridge, m.resolution)
    x = white.solve(n).T
    slope = choice.T @ m[block.features, block.goal]
    compensation = None
    if projection.taken is not None:
        assert block.reads is not None
        taken = choice.T @ projection.taken
        slope = slope - taken @ m[block.reads, block.goal]
        compensation = -x @ taken
    drop = 2 * float((x.T * n).sum()) - float((x @ p * x).sum())
    return Fit(x, compensation, float((x.T * slope).sum()), drop, white.note)


def validate_fan_out(m: Moments, block: Block, choice: Tensor, ridges: Sequence[float]) -> HeldOut:
    """Chooses the ridge of :func:`fan_out` by what the fit on the other folds explains of each fold."""

    def drop(fold: int, ridge: float) -> float:
        train, test = m.without(fold), m.fold(fold)
        projection = _projection(train, block, ridge)
        p, n = _remaining(train, block, projection)
        x = whitening(choice.T @ p @ choice, ridge, m.resolution).solve(choice.T @ n).T
        p, n = _remaining(test, block, projection)
        return 2 * float((x.T * (choice.T @ n)).sum()) - float((x @ (choice.T @ p @ choice) * x).sum())

    return _validated(m, ridges, drop, choice.shape[1])


def validate_move(m: Moments, reads: Reads, goal: Goal, ridges: Sequence[float]) -> HeldOut:
    """Chooses the ridge of :func:`best_move` in the same way."""

    def drop(fold: int, ridge: float) -> float:
        dw, test = best_move(m.without(fold), reads, goal, ridge).weights, m.fold(fold)
        return 2 * float((dw.T * test[reads, goal]).sum()) - float((dw @ test[reads, reads] * dw).sum())

    return _validated(m, ridges, drop, 0)


def _validated(m: Moments, ridges: Sequence[float], drop, k: int) -> HeldOut:  # type: ignore[no-untyped-def]
    drops = torch.tensor([[drop(fold, ridge) for fold in range(m.folds)] for ridge in ridges])
    best = int(drops.mean(1).argmax())
    gain, error = float(drops[best].mean()), _standard_error(drops[best])
    return HeldOut(ridges[best], k, gain, error, gain > 0)


def _standard_error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("inf")


def _padded(values: Tensor, length: int) -> Tensor:
    """Beyond the available ranks nothing changes any more."""
    if not len(values):
        return values.new_zeros(length)
    return torch.cat([values, values[-1:].expand(max(0, length - len(values)))])
