"""From moments to weights and gains: the closed forms, one function per equation.

One regression carries everything. At a pre-activation with goal ``v`` that reads ``b`` (and new features ``p``),

    v  =  dW b  +  v_perp,        v_perp  ~  X p,

with ``S = E b b^T``, ``M = E b v^T``, ``C = E p b^T``, ``R = E p v^T``, ``P = E p p^T``. Source: Verbockhaven and
Charpiat, "Neural Architecture Growth using Tangent Space"; the joint form, the compensation of the constant and
the cross-validation are this package's own.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from dagrow.features import Feature, Goal, Reads
from dagrow.linalg import Whitening, leading_svd, whitening
from dagrow.moments import Moments, Pair

__all__ = [
    "NEURON_RIDGES", "RIDGES", "Block", "Directions", "Fit", "HeldOut", "Move", "best_move", "directions",
    "explained_alone", "fan_out", "settled", "validate_directions", "validate_fan_out", "validate_move",
]  # fmt: skip

#: ridges that are tried for a layer's own weights, relative to each feature's second moment
RIDGES: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
#: ridges that are tried for new neurons: smaller ones explain more at first order and train worse (docs/mnist.md)
NEURON_RIDGES: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SIGNIFICANT = 3.0  #: standard deviations of the null by which a held-out gain must exceed zero
MOST = 64  #: neurons considered at once when their number is open

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
        ridge: of the regression on ``b``, relative to each feature's second moment.
    """

    features: Feature
    slots: int
    reads: Reads | None
    goal: Goal
    compensation: Compensation = "none"
    project: bool = True
    ridge: float = 0.0

    def pairs(self) -> list[Pair]:
        """The moments that the block needs."""
        pairs: list[Pair] = [(self.features, self.features), (self.features, self.goal)]
        if self.reads is not None:
            pairs += [(self.features, self.reads), (self.reads, self.reads), (self.reads, self.goal)]
        return pairs

    @property
    def energy(self) -> Pair:
        """The moment ``E v v^T``, which only the test for chance needs."""
        return self.goal, self.goal


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


def _projection(m: Moments, block: Block) -> _Projection:
    if block.reads is None:
        return _Projection(None, None)
    s, c = m[block.reads, block.reads], m[block.features, block.reads]
    white = whitening(s, block.ridge, m.resolution) if block.project or block.compensation == "all" else None
    move = white.solve(m[block.reads, block.goal]) if white and block.project else None
    taken = None
    if white and block.compensation == "all":
        taken = white.solve(c.T).T
    elif block.compensation == "constant" and block.reads.bias:
        taken = torch.zeros_like(c)
        taken[:, -1] = c[:, -1] / s[-1, -1]
    return _Projection(move, taken, white.note if white else "")


class _Left(NamedTuple):
    """What is left of new features and goals: ``P = E p' p'^T``, ``N = E p' t^T``, and ``E p^2`` as it was before."""

    p: Tensor
    n: Tensor
    unit: Tensor

    def whitening(self, ridge: float, resolution: float) -> Whitening:
        """Of P, with a ridge relative to what the features were before anything was taken out of them."""
        return whitening(self.p, ridge, resolution, self.unit)


def _remaining(m: Moments, block: Block, projection: _Projection, basis: Tensor | None = None) -> _Left:
    """Equation 2 and its joint form: ``P = E p' p'^T`` and ``N = E p' t^T``.

    p' are the new features (or the combinations ``basis^T p`` of them) and t the goal, less what the projection takes
    out of them. The projection may come from other folds than the moments.
    """
    p, n = m[block.features, block.features], m[block.features, block.goal]
    if basis is not None:
        p, n = basis.T @ (p @ basis), basis.T @ n
    unit = p.diagonal()
    if block.reads is None or (projection.move is None and projection.taken is None):
        return _Left(p, n, unit)
    c = m[block.features, block.reads]
    c = c if basis is None else basis.T @ c
    if projection.move is not None:
        n = torch.addmm(n, c, projection.move, alpha=-1)
    if projection.taken is not None:
        d = projection.taken if basis is None else basis.T @ projection.taken
        s, rest = m[block.reads, block.reads], m[block.reads, block.goal]
        if projection.move is not None:
            rest = rest - s @ projection.move
        overlap = d @ c.T
        n, p = n - d @ rest, p - overlap - overlap.T + d @ s @ d.T
    return _Left(p, n, unit)


def _stacked(m: Moments, blocks: Sequence[Block], projections: Sequence[_Projection]) -> _Left:
    """Several consumers, or several channels of a unit in one: N side by side, P averaged over them.

    The average is exact when all read the new features at the same positions with the same ``b`` taken out of them;
    otherwise it is a proposal, and the fan-outs are fitted to each consumer afterwards.
    """
    parts = []
    for block, projection in zip(blocks, projections, strict=True):
        p, n, unit = _remaining(m, block, projection)
        if block.slots > 1:
            p = rearrange(p, "(e p) (f q) -> e f p q", e=block.slots, f=block.slots).diagonal().mean(-1)
            n = rearrange(n, "(e p) o -> p (e o)", e=block.slots)
            unit = unit.view(block.slots, -1).mean(0)
        parts.append(_Left(p, n, unit))
    grams, sides, units = zip(*parts, strict=True)
    return _Left(sum(grams[1:], grams[0]) / len(parts), torch.cat(sides, 1), sum(units[1:], units[0]) / len(parts))


def directions(m: Moments, blocks: Sequence[Block], k: int, ridge: float = 0.0) -> Directions:
    """Equation 3 (and 4 with compensation "all"): ``U L V^T = svd(W N)``, ``alpha_k = W^T u_k``."""
    projections = [_projection(m, block) for block in blocks]
    left = _stacked(m, blocks, projections)
    white = left.whitening(ridge, m.resolution)
    u, values, _ = leading_svd(white.whiten(left.n), k)
    kept = values > m.resolution * len(left.p) * values.max() if len(values) else values > 0
    notes = dict.fromkeys(note for note in (white.note, *(q.note for q in projections)) if note)
    return Directions(white.back(u[:, kept]), values[kept], "; ".join(notes))


def validate_directions(m: Moments, blocks: Sequence[Block], k: int | None, ridges: Sequence[float]) -> HeldOut:
    """Chooses ridge and rank by what directions from the other folds explain of each fold.

    For a fit ``X`` on the other folds, the held-out drop is ``2 tr(X N_f) - tr(X P_f X^T)``; the columns of V are
    orthonormal, so one decomposition gives it for every rank. Under the null that goals are independent of the new
    features, the held-out covariance ``tr(X N_f)`` has mean 0 and variance ``tr(X P_f X^T E v v^T) / n_f``.
    """
    most = MOST if k is None else k
    pairs = [pair for block in blocks for pair in (*block.pairs(), *([block.energy] if k is None else []))]
    middle = ridges[len(ridges) // 2]
    folds = [_fold(train, test, blocks, most, middle) for train, test in m.split(pairs, _precision(m))]

    @functools.cache
    def seen(ridge: float) -> tuple[Tensor, Tensor, Tensor]:
        """Drop, covariance and its variance, ``[folds, ranks]`` each."""
        parts = [_held_out(fold, blocks, most, ridge) for fold in folds]
        return tuple(torch.stack(part).double() for part in zip(*parts, strict=True))  # type: ignore[return-value]

    def mean_drop(ridge: float) -> Tensor:
        drop = seen(ridge)[0].mean(0)
        return drop if k is None else drop[-1:]

    ridge = _climbed(ridges, lambda ridge: float(mean_drop(ridge).max()))
    drop, covariance, variance = seen(ridge)
    rank = int(mean_drop(ridge).argmax()) if k is None else most - 1
    spread = (2 * variance[:, rank].sum()).clamp_min(1e-300).sqrt()  # folds share what they are fitted on: at most 2
    gain = float(drop[:, rank].mean())
    significant = gain > 0 and bool(covariance[:, rank].sum() > SIGNIFICANT * spread)
    return HeldOut(ridge, rank + 1, gain, _standard_error(drop[:, rank]), significant)


@dataclass(frozen=True)
class _Fold:
    """One fold's own moments, and what the others give: projections, what they leave, and the goals' leading
    directions ``[o, q]`` in which the leading directions of every ridge are sought."""

    test: Moments
    projections: Sequence[_Projection]
    left: _Left
    goals: Tensor
    whitenings: dict[float, Whitening]

    def whitening(self, ridge: float) -> Whitening:
        if ridge not in self.whitenings:
            self.whitenings[ridge] = self.left.whitening(ridge, self.test.resolution)
        return self.whitenings[ridge]


def _fold(train: Moments, test: Moments, blocks: Sequence[Block], k: int, ridge: float) -> _Fold:
    projections = [_projection(train, block) for block in blocks]
    left = _stacked(train, blocks, projections)
    white = left.whitening(ridge, train.resolution)
    _, _, goals = leading_svd(white.whiten(left.n), k + 16, iterations=2)
    return _Fold(test, projections, left._replace(n=left.n @ goals), goals, {ridge: white})


def settled(m: Moments, block: Block, ridges: Sequence[float] = RIDGES) -> Block:
    """The block with the ridge of its regression on ``b`` chosen by cross-validation."""
    if block.reads is None or m.folds == 1:
        return block
    reads, goal = block.reads, block.goal
    folds = list(m.split([(reads, reads), (reads, goal)], _precision(m)))
    sketch = _sketch(m[reads, goal].shape[1]).to(folds[0][0][reads, goal])

    def drop(ridge: float) -> float:
        """Held out, on a few random combinations of the goals: the ridge needs no more."""
        total = 0.0
        for train, test in folds:
            dw = whitening(train[reads, reads], ridge, m.resolution).solve(train[reads, goal] @ sketch)
            total += 2 * float((dw * (test[reads, goal] @ sketch)).sum()) - float(
                (dw * (test[reads, reads] @ dw)).sum()
            )
        return total

    return replace(block, ridge=_climbed(ridges, functools.cache(drop)))


def _sketch(outputs: int, few: int = 32) -> Tensor:
    """Random combinations of goals, or all of them if they are few."""
    if outputs <= few:
        return torch.eye(outputs)
    return torch.randn(outputs, few, generator=torch.Generator().manual_seed(0))


def _precision(m: Moments) -> torch.dtype:
    """Choosing a ridge or a rank needs no more precision than the activations had."""
    return torch.float32 if m.resolution > torch.finfo(torch.float64).eps else torch.float64


def _climbed(ridges: Sequence[float], value: Callable[[float], float]) -> float:
    """The best ridge, by climbing from the middle one: held-out gains have one maximum in the ridge."""
    at = len(ridges) // 2
    while True:
        near = [i for i in (at - 1, at + 1) if 0 <= i < len(ridges) and value(ridges[i]) > value(ridges[at])]
        if not near:
            return ridges[at]
        at = max(near, key=lambda i: value(ridges[i]))


def _held_out(fold: _Fold, blocks: Sequence[Block], k: int, ridge: float) -> tuple[Tensor, ...]:
    """By rank ``[k]``: the held-out drop, the held-out covariance, and its variance under the null."""
    test, white = fold.test, fold.whitening(ridge)
    u, values, v = leading_svd(white.whiten(fold.left.n), k, iterations=3)
    alpha, omega, start = white.back(u), fold.goals @ (v * values), 0
    covariance, square, variance = (values.new_zeros(len(values)) for _ in range(3))
    for block, projection in zip(blocks, fold.projections, strict=True):
        outputs = test[block.features, block.goal].shape[1]
        for slot in range(block.slots):
            basis = alpha if block.slots == 1 else _in_slot(alpha, slot, block.slots)
            z, seen, _ = _remaining(test, block, projection, basis)
            out = omega[start : start + outputs]
            start += outputs
            covariance += (seen.T * out).sum(0).cumsum(0)
            square += (z * (out.T @ out)).cumsum(0).cumsum(1).diagonal()
            if block.energy in test:
                noise = out.T @ test[block.energy] @ out
                variance += (z * noise).cumsum(0).cumsum(1).diagonal() / test.samples
    return tuple(_padded(x, k) for x in (2 * covariance - square, covariance, variance))


def _in_slot(alpha: Tensor, slot: int, slots: int) -> Tensor:
    """Directions as they act on one of several groups of features."""
    basis = alpha.new_zeros(slots, *alpha.shape)
    basis[slot] = alpha
    return basis.flatten(0, 1)


def fan_out(m: Moments, block: Block, choice: Tensor, ridge: float = 0.0) -> Fit:
    """Equation 5 with few features: the regression of what is left on ``h = choice^T features``, for any activation.

    Args:
        choice: ``[features, k]``: which of the measured features (or which sums of them) are offered.
    """
    projection = _projection(m, block)
    left = _remaining(m, block, projection, choice)
    white = left.whitening(ridge, m.resolution)
    x = white.solve(left.n).T
    slope = choice.T @ m[block.features, block.goal]
    compensation = None
    if projection.taken is not None:
        assert block.reads is not None
        taken = choice.T @ projection.taken
        slope = slope - taken @ m[block.reads, block.goal]
        compensation = -x @ taken
    drop = 2 * float((x.T * left.n).sum()) - float((x @ left.p * x).sum())
    return Fit(x, compensation, float((x.T * slope).sum()), drop, white.note)


def explained_alone(m: Moments, block: Block, slots: int, ridge: float = 0.0) -> Tensor:
    """What each unit (``slots`` neighbouring features) would explain alone: ``n^T (p + ridge)^-1 n`` ``[units]``."""
    left = _remaining(m, block, _projection(m, block))
    p = rearrange(left.p, "(u s) (w t) -> u w s t", s=slots, t=slots).diagonal().permute(2, 0, 1)
    n = rearrange(left.n, "(u s) o -> u s o", s=slots)
    damping = max(ridge, 100 * m.resolution) * rearrange(left.unit, "(u s) -> u s", s=slots)
    inverse = torch.linalg.pinv(p + torch.diag_embed(damping), hermitian=True)
    return torch.einsum("uso, ust, uto -> u", n, inverse, n)


def validate_fan_out(m: Moments, block: Block, choice: Tensor, ridges: Sequence[float]) -> HeldOut:
    """Chooses the ridge of :func:`fan_out` by what the fit on the other folds explains of each fold."""

    def drop(train: Moments, test: Moments, ridge: float) -> float:
        projection = _projection(train, block)
        left = _remaining(train, block, projection, choice)
        x = left.whitening(ridge, m.resolution).solve(left.n).T
        p, n, _ = _remaining(test, block, projection, choice)
        return 2 * float((x.T * n).sum()) - float((x @ p * x).sum())

    return _validated(m, block.pairs(), ridges, drop, choice.shape[1])


def validate_move(m: Moments, reads: Reads, goal: Goal, ridges: Sequence[float]) -> HeldOut:
    """Chooses the ridge of :func:`best_move` in the same way."""

    def drop(train: Moments, test: Moments, ridge: float) -> float:
        dw = best_move(train, reads, goal, ridge).weights
        return 2 * float((dw.T * test[reads, goal]).sum()) - float((dw @ test[reads, reads] * dw).sum())

    return _validated(m, [(reads, reads), (reads, goal), (goal, goal)], ridges, drop, 0)


def _validated(
    m: Moments, pairs: Sequence[Pair], ridges: Sequence[float], drop: Callable[[Moments, Moments, float], float], k: int
) -> HeldOut:
    folds = list(m.split(pairs))
    drops = functools.cache(lambda ridge: torch.tensor([drop(*fold, ridge) for fold in folds], dtype=torch.float64))
    ridge = _climbed(ridges, lambda ridge: float(drops(ridge).mean()))
    gain, error = float(drops(ridge).mean()), _standard_error(drops(ridge))
    return HeldOut(ridge, k, gain, error, gain > 0)


def _standard_error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("inf")


def _padded(values: Tensor, length: int) -> Tensor:
    """Beyond the available ranks nothing changes any more."""
    if not len(values):
        return values.new_zeros(length)
    return torch.cat([values, values[-1:].expand(max(0, length - len(values)))])
