"""Ridge and rank by cross-validation: what is fitted on all folds but one is measured on that one.

For a fit ``X`` on the other folds, the held-out drop of the bottleneck is ``2 tr(X N_f) - tr(X P_f X^T)``. Moments
add, so this costs no pass. The cross-validation is this package's own.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dagrow.solvers._linalg import Whitening, leading_svd, spread
from dagrow.solvers._moments import FoldSplit, FoldView, MomentView
from dagrow.solvers._regression import OVERSAMPLED, Regression, Residual, StackedResidual, best_move, fan_out

#: ridges that are tried for a layer's own weights, relative to each feature's second moment
RIDGES: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
#: ridges that are tried for new neurons: smaller ones explain more at first order and train worse (docs/mnist.md)
NEURON_RIDGES: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
FEW = 32  #: combinations of goals by which a layer's own ridge is chosen
MOST = 64  #: neurons considered at once when their number is open


def neuron_ridges(ridge: float | None, folds: int) -> tuple[float, ...]:
    """The ridges to choose from: the one that is given; several, if there are folds to choose by; or none at all."""
    if ridge is not None:
        return (ridge,)
    return NEURON_RIDGES if folds > 1 else (0.0,)


@dataclass(frozen=True)
class HeldOut:
    """What a fit on the other folds explains of each fold, mean over folds, and the ridge for which it is most."""

    ridge: float
    gain: float


def with_cross_validated_ridge(split: FoldSplit, block: Regression) -> Regression:
    """The block with the ridge of its regression on ``b`` chosen by cross-validation."""
    if block.reads is None or len(split) == 1:
        return block
    reads, goal = block.reads, block.goal
    some = _sketch(split[0][0][reads, goal])

    @functools.cache
    def drop(ridge: float) -> float:
        """Held out, on a few random combinations of the goals: the ridge needs no more."""
        total = 0.0
        for train, test in split:
            dw = train.whitening(reads, ridge).solve(train[reads, goal] @ some)
            total += _drop(dw, test[reads, goal] @ some, test[reads, reads])
        return total

    return replace(block, ridge=_best_ridge(RIDGES, drop))


def _drop(xt: Tensor, n: Tensor, p: Tensor) -> float:
    """``2 tr(X N) - tr(X P X^T)`` for ``X^T [p, o]``."""
    return float(2 * (xt * n).sum() - (xt * (p @ xt)).sum())


def _sketch(side: Tensor) -> Tensor:
    """Random combinations of goals, or all of them if they are few."""
    outputs = side.shape[1]
    if outputs <= FEW:
        return torch.eye(outputs).to(side)
    return torch.randn(outputs, FEW, generator=torch.Generator().manual_seed(0)).to(side)


@dataclass(frozen=True, eq=False)
class Directed(HeldOut):
    """With the rank for which it is most, and the fits on the other folds.

    Attributes:
        fits: for each fold ``alpha [p, k]``, and for each block its ``omega [o, k]``.
    """

    k: int
    fits: Sequence[tuple[Tensor, Sequence[Tensor]]]


def validate_directions(
    split: FoldSplit, blocks: Sequence[Regression], k: int | None, ridges: Sequence[float]
) -> Directed:
    """Chooses ridge and rank by what directions from the other folds explain of each fold.

    The columns of V are orthonormal, so one decomposition gives the held-out drop for every rank. Whether it is more
    than chance is not seen from moments: see :class:`dagrow.scores.Verdict`.
    """
    most = MOST if k is None else k
    trials = [_Trial.of(train, test, blocks, most, ridges[len(ridges) // 2]) for train, test in split]

    @functools.cache
    def drops(ridge: float) -> Tensor:
        """By fold and rank ``[folds, ranks]``."""
        return torch.stack([trial.held_out(most, ridge) for trial in trials])

    def mean_drop(ridge: float) -> Tensor:
        drop = drops(ridge).mean(0)
        return drop if k is None else drop[-1:]

    ridge = _best_ridge(ridges, lambda ridge: float(mean_drop(ridge).max()))
    rank = int(mean_drop(ridge).argmax()) if k is None else most - 1
    fits = [trial.fit(rank + 1, ridge) for trial in trials]
    return Directed(ridge, float(drops(ridge)[:, rank].mean()), rank + 1, fits)


@dataclass(frozen=True, eq=False)
class _Trial:
    """What all folds but one leave to explain, seen in the goals' leading directions ``goals [o, q]``."""

    test: FoldView
    stack: StackedResidual
    goals: Tensor
    side: Tensor  #: ``N G [p, q]``
    whiten: Callable[[float], Whitening]

    @classmethod
    def of(cls, train: FoldView, test: FoldView, blocks: Sequence[Regression], k: int, ridge: float) -> "_Trial":
        """The leading directions are those for a middle ridge, with room for the others'."""
        stack = StackedResidual.of(train, blocks)
        whiten = functools.cache(stack.whitening)
        goals = stack.leading_goals(whiten(ridge), k + OVERSAMPLED, iterations=2)
        return cls(test, stack, goals, stack.times(goals), whiten)

    def fit(self, k: int, ridge: float) -> tuple[Tensor, Sequence[Tensor]]:
        """``alpha [p, k]`` and each block's ``omega [o, k]``."""
        white = self.whiten(ridge)
        u, values, v = leading_svd(white.whiten(self.side), k)
        return white.back(u), (self.goals @ (v * values)).split(self.stack.widths)

    def held_out(self, k: int, ridge: float) -> Tensor:
        """The held-out drop by rank ``[k]``."""
        alpha, omegas = self.fit(k, ridge)
        drop = alpha.new_zeros(alpha.shape[1])
        for part, out in zip(self.stack.parts, omegas, strict=True):
            explained = part.times(out, alpha, self.test).diagonal().cumsum(0)
            drop += 2 * explained - _by_rank(part.gram(alpha, self.test) * (out.T @ out))
        return _padded(drop, k).double()


def _by_rank(products: Tensor) -> Tensor:
    """For each r the sum over all pairs of the first r directions: ``[k, k]`` to ``[k]``."""
    return products.cumsum(0).cumsum(1).diagonal()


def validate_fan_out(split: FoldSplit, block: Regression, choice: Tensor | None, ridges: Sequence[float]) -> HeldOut:
    """Chooses the ridge of :func:`dagrow.solvers.fan_out` by what the fit on the other folds explains of each fold."""

    def drop(train: MomentView, test: MomentView, ridge: float) -> float:
        x, fitted = fan_out(train, block, choice, ridge).weights, Residual(train, block)
        return float(2 * fitted.times(x, choice, test).trace() - (x @ fitted.gram(choice, test) * x).sum())

    return _validated(split, ridges, drop)


def validate_move(split: FoldSplit, reads: Hashable, goal: Hashable, ridges: Sequence[float]) -> HeldOut:
    """Chooses the ridge of :func:`dagrow.solvers.best_move` in the same way."""

    def drop(train: MomentView, test: MomentView, ridge: float) -> float:
        return _drop(best_move(train, reads, goal, ridge).weights.T, test[reads, goal], test[reads, reads])

    return _validated(split, ridges, drop)


@dataclass(frozen=True)
class FoldFit:
    """A fit on all folds but one: ``X p - D b`` is to explain ``v - dW b``.

    Attributes:
        weights: ``X [o, p]``.
        taken: ``D [o, i]``, or ``[o]`` where only the constant is taken out of the features, or None for nothing.
        move: ``dW [o, i]``, or None where nothing is taken out of the goals.
    """

    weights: Tensor
    taken: Tensor | None = None
    move: Tensor | None = None


def fan_out_fits(
    split: FoldSplit, block: Regression, basis: Callable[[MomentView], Tensor], ridge: float
) -> list[FoldFit]:
    """:func:`dagrow.solvers.fan_out` on all folds but one, for each fold.

    Args:
        basis: from moments of the other folds the combinations ``[p, k]``, or the indices ``[k]``, that are fitted.
    """
    fits = []
    for train, _ in split:
        some, left = basis(train), Residual(train, block)
        x, taken = fan_out(train, block, some, ridge).weights, left.taken(some)
        move = left.moved(torch.eye(len(x)).to(x))
        if taken is not None:  # of the constant its last row is all there is
            taken = x @ (taken[-1] if block.compensation == "constant" else taken.T)
        fits.append(FoldFit(spread(x, some, len(left.unit)), taken, None if move is None else move.T))
    return fits


def move_fits(split: FoldSplit, reads: Hashable, goal: Hashable, ridge: float) -> list[FoldFit]:
    """:func:`dagrow.solvers.best_move` on all folds but one, for each fold."""
    return [FoldFit(best_move(train, reads, goal, ridge).weights) for train, _ in split]


def _validated(
    split: FoldSplit, ridges: Sequence[float], drop: Callable[[MomentView, MomentView, float], float]
) -> HeldOut:
    drops = functools.cache(lambda ridge: torch.tensor([drop(*fold, ridge) for fold in split], dtype=torch.float64))
    ridge = _best_ridge(ridges, lambda ridge: float(drops(ridge).mean()))
    return HeldOut(ridge, float(drops(ridge).mean()))


def _best_ridge(ridges: Sequence[float], value: Callable[[float], float]) -> float:
    """The best ridge, by climbing from the middle one: held-out gains have one maximum in the ridge."""
    start = at = len(ridges) // 2
    for step in (1, -1):
        while 0 <= at + step < len(ridges) and value(ridges[at + step]) > value(ridges[at]):
            at += step
        if at != start:
            break
    return ridges[at]


def _padded(values: Tensor, length: int) -> Tensor:
    """Beyond the available ranks nothing changes any more."""
    if not len(values):
        return values.new_zeros(length)
    return torch.cat([values, values[-1:].expand(max(0, length - len(values)))])
