"""Ridge and rank by cross-validation: what is fitted on all folds but one is measured on that one.

For a fit ``X`` on the other folds, the held-out drop of the bottleneck is ``2 tr(X N_f) - tr(X P_f X^T)``. Moments
add, so this costs no pass. The cross-validation is this package's own.
"""

import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dagrow.solvers._basis import Basis
from dagrow.solvers._closed_forms import OVERSAMPLING, best_move, residual_fit
from dagrow.solvers._linalg import Whitening, leading_svd
from dagrow.solvers._moments import FoldSplit, FoldView, MomentView
from dagrow.solvers._residual import Regression, Residual, StackedResidual
from dagrow.solvers._row_products import Product, RowProduct, dense

#: ridges that are tried for a layer's own weights, relative to each feature's second moment
RIDGES: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
#: ridges that are tried for new neurons: smaller ones explain more at first order and train worse (docs/mnist.md)
NEURON_RIDGES: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SKETCHED_GOALS = 32  #: combinations of goals by which a layer's own ridge is chosen
MAX_RANK = 64  #: neurons considered at once when their number is open
_WIDE, _ENOUGH = 256, 64  #: features from which on a ridge is chosen on so many held-out samples, or groups of them


def neuron_ridges(ridge: float | None, folds: int) -> tuple[float, ...]:
    """The ridges to choose from for new neurons.

    Args:
        ridge: the one that was asked for; None for one by cross-validation.
        folds: of the cross-validation; 1 for none.

    Returns:
        The one that was asked for; several, if there are folds to choose by; or 0 alone.
    """
    if ridge is not None:
        return (ridge,)
    return NEURON_RIDGES if folds > 1 else (0.0,)


@dataclass(frozen=True)
class HeldOutDrop:
    """What fits on the other folds explain of each fold, for the ridge for which that is most.

    Attributes:
        ridge: the best.
        gain: the drop of the bottleneck on samples that the fit has not seen, mean over folds.
    """

    ridge: float
    gain: float


@dataclass(frozen=True, eq=False)
class HeldOutDirections(HeldOutDrop):
    """With the rank for which it is most, and the fits on the other folds.

    Attributes:
        k: the best rank.
        fits: for each fold ``alpha [p, k]``, and for each target its ``omega [o, k]``.
    """

    k: int
    fits: Sequence[tuple[Tensor, Sequence[Tensor]]]


def with_cross_validated_ridge(split: FoldSplit, regression: Regression) -> Regression:
    """Chooses the ridge of the regression on what the target reads.

    Args:
        split: for each fold the moments of all others and its own.
        regression: features and target.

    Returns:
        The same with the ridge that explains most of folds that were left out; as it was if there is one fold only, or
        nothing is regressed on what the target reads.
    """
    is_used = regression.project or regression.compensation == "all"
    if regression.reads is None or not is_used or len(split) == 1:
        return regression
    b, v = regression.reads, regression.goal
    cross = split[0][0].product(b, v)
    sketch, judges = _sketch(cross), _judges(split, cross.shape[0])

    @functools.cache
    def drop(ridge: float) -> float:
        """Held out, on a few random combinations of the goals: the ridge needs no more."""
        total = 0.0
        for train, test in judges:
            dW = train.whitening(b, ridge).solve(train.product(b, v) @ sketch)
            total += _drop(dW, test.product(b, v) @ sketch, test.product(b, b))
        return total

    return replace(regression, ridge=_best_ridge(RIDGES, drop))


def validate_directions(
    split: FoldSplit, regressions: Sequence[Regression], k: int | None, ridges: Sequence[float]
) -> HeldOutDirections:
    """Chooses ridge and rank by what directions from the other folds explain of each fold.

    The columns of V are orthonormal, so one decomposition gives the held-out drop for every rank. A ridge for many
    features is chosen on some of the folds only, if these have enough samples; the drop is that of all. Whether it is
    more than chance is not seen from moments: see :class:`dagrow.solvers.Verdict`.

    Args:
        split: for each fold the moments of all others and its own.
        regressions: of the same new features at each of their targets.
        k: the rank; None for the best.
        ridges: to choose from, in increasing order.

    Returns:
        Ridge, rank, held-out drop and the fits of all folds.
    """
    most, features = MAX_RANK if k is None else k, regressions[0].features
    judges = _judges(split, len(split[0][0].product(features, features)))
    trials = [_Trial.of(*views, regressions, most, ridges[len(ridges) // 2]) for views in judges]

    def mean_drop(ridge: float) -> Tensor:
        """By rank, or of the one that is wanted."""
        drop = torch.stack([trial.held_out(most, ridge) for trial in trials]).mean(0)
        return drop if k is None else drop[-1:]

    ridge = _best_ridge(ridges, functools.cache(lambda ridge: float(mean_drop(ridge).max())))
    trials += [_Trial.of(*views, regressions, most, ridge) for views in split[len(judges) :]]
    drop = mean_drop(ridge)
    rank = int(drop.argmax()) if k is None else most - 1
    fits = [trial.fit(rank + 1, ridge) for trial in trials]
    return HeldOutDirections(ridge, float(drop[rank if k is None else -1]), rank + 1, fits)


@dataclass(frozen=True, eq=False)
class _Trial:
    """What all folds but one leave to explain, seen in the goals' leading directions.

    Attributes:
        test: moments of the one fold.
        stack: of the others.
        goals: ``G [o, q]``.
        cross: ``N G [p, q]``.
        whiten: by ridge.
    """

    test: FoldView
    stack: StackedResidual
    goals: Tensor
    cross: Tensor
    whiten: Callable[[float], Whitening]

    @classmethod
    def of(cls, train: FoldView, test: FoldView, regressions: Sequence[Regression], k: int, ridge: float) -> "_Trial":
        """The leading directions are those for a middle ridge, with room for the others'."""
        stack = StackedResidual.of(train, regressions)
        whiten = functools.cache(stack.whitening)
        goals = stack.leading_goals(whiten(ridge), k + OVERSAMPLING, iterations=2)
        return cls(test, stack, goals, stack.cross_of(goals), whiten)

    def fit(self, k: int, ridge: float) -> tuple[Tensor, Sequence[Tensor]]:
        """``alpha [p, k]`` and each target's ``omega [o, k]``."""
        white = self.whiten(ridge)
        u, values, v = leading_svd(white.whiten(self.cross), k)
        return white.back(u), (self.goals @ (v * values)).split(self.stack.widths)

    def held_out(self, k: int, ridge: float) -> Tensor:
        """The held-out drop by rank ``[k]``."""
        alpha, omegas = self.fit(k, ridge)
        drop = alpha.new_zeros(alpha.shape[1])
        for part, omega in zip(self.stack.parts, omegas, strict=True):
            neurons = part.restricted(alpha)
            explained = neurons.cross_on(self.test, omega).diagonal().cumsum(0)
            drop += 2 * explained - _by_rank(dense(neurons.gram_on(self.test)) * (omega.T @ omega))
        return _padded(drop, k).double()


def validate_fan_out(
    split: FoldSplit, regression: Regression, choice: Tensor | None, ridges: Sequence[float]
) -> HeldOutDrop:
    """Chooses the ridge of :func:`dagrow.solvers.fan_out` by what the fit on the other folds explains of each fold.

    Args:
        split: for each fold the moments of all others and its own.
        regression: features and target.
        choice: which features, or which sums of them, see :func:`dagrow.solvers.fan_out`.
        ridges: to choose from, in increasing order.

    Returns:
        The best ridge, and the held-out drop with it.
    """
    trials = []
    for train, test in split:
        residual = Residual.of(train, regression, choice)
        trials.append((residual, residual.gram_on(test), test))

    def drop(residual: Residual, gram: Product, test: MomentView, ridge: float) -> float:
        x = residual_fit(residual, ridge).weights
        return float(2 * residual.cross_on(test, x).trace() - (x.T * (gram @ x.T)).sum())

    return _best(ridges, lambda ridge: [drop(*trial, ridge) for trial in trials])


def validate_move(split: FoldSplit, reads: Hashable, goal: Hashable, ridges: Sequence[float]) -> HeldOutDrop:
    """Chooses the ridge of :func:`dagrow.solvers.best_move` in the same way.

    Args:
        split: for each fold the moments of all others and its own.
        reads: the features ``b``.
        goal: the goal ``v``.
        ridges: to choose from, in increasing order.

    Returns:
        The best ridge, and the held-out drop with it.
    """

    def drop(train: MomentView, test: MomentView, ridge: float) -> float:
        dW = best_move(train, reads, goal, ridge).weights.T
        return _drop(dW, test[reads, goal], test.product(reads, reads))

    judges = _judges(split, split[0][0].product(reads, goal).shape[0])
    ridge = _best(ridges, lambda ridge: [drop(*views, ridge) for views in judges]).ridge
    return _best((ridge,), lambda ridge: [drop(*views, ridge) for views in split])


@dataclass(frozen=True)
class FoldFit:
    """A fit on all folds but one: ``X (B^T p - D^T b)`` is to explain ``v - dW b``.

    Attributes:
        weights: ``X [o, k]``.
        width: p.
        basis: ``B [p, k]``.
        taken: ``D [i, k]``, or ``[k]`` where only the constant is taken out of the features, or None for nothing.
        move: ``dW [o, i]``, or ``X^T dW [k, i]`` if that is smaller, or None where nothing is taken out of the goals.
    """

    weights: Tensor
    width: int
    basis: Basis
    taken: Tensor | None = None
    move: Tensor | None = None

    @property
    def is_by_column(self) -> bool:
        """Whether there are fewer columns of B than outputs, so that ``X^T v`` is smaller than ``v``."""
        return _is_by_column(self.weights)


def fan_out_fits(
    split: FoldSplit, regression: Regression, basis: Callable[[MomentView], Tensor], ridge: float
) -> list[FoldFit]:
    """:func:`dagrow.solvers.fan_out` on all folds but one.

    Args:
        split: for each fold the moments of all others and its own.
        regression: features and target.
        basis: from moments of the other folds the combinations ``[p, k]``, or the indices ``[k]``, that are fitted.
        ridge: relative to each feature's second moment.

    Returns:
        A fit for each fold.
    """
    fits = []
    for train, _ in split:
        residual = Residual.of(train, regression, basis(train))
        x, taken = residual_fit(residual, ridge).weights, residual.D
        move = residual.best_moves(x if _is_by_column(x) else torch.eye(len(x)).to(x))
        if taken is not None and regression.compensation == "constant":  # its last row is all there is
            taken = taken[-1]
        width = len(train.product(regression.features, regression.features))
        fits.append(FoldFit(x, width, residual.basis, taken, None if move is None else move.T))
    return fits


def _is_by_column(weights: Tensor) -> bool:
    return weights.shape[1] < len(weights)


def move_fits(split: FoldSplit, reads: Hashable, goal: Hashable, ridge: float) -> list[FoldFit]:
    """:func:`dagrow.solvers.best_move` on all folds but one.

    Args:
        split: for each fold the moments of all others and its own.
        reads: the features ``b``.
        goal: the goal ``v``.
        ridge: relative to each feature's second moment.

    Returns:
        A fit for each fold.
    """
    moves = [best_move(train, reads, goal, ridge).weights for train, _ in split]
    return [FoldFit(move, move.shape[1], Basis()) for move in moves]


def _best(ridges: Sequence[float], drop: Callable[[float], list[float]]) -> HeldOutDrop:
    """By the mean over folds of what ``drop`` gives for a ridge."""
    mean = functools.cache(lambda ridge: float(torch.tensor(drop(ridge), dtype=torch.float64).mean()))
    ridge = _best_ridge(ridges, mean)
    return HeldOutDrop(ridge, mean(ridge))


def _best_ridge(ridges: Sequence[float], value: Callable[[float], float]) -> float:
    """The best ridge, by climbing from the middle one: held-out gains have one maximum in the ridge."""
    start = at = len(ridges) // 2
    for step in (1, -1):
        while 0 <= at + step < len(ridges) and value(ridges[at + step]) > value(ridges[at]):
            at += step
        if at != start:
            break
    return ridges[at]


def _judges(split: FoldSplit, features: int) -> FoldSplit:
    """The folds that a ridge is chosen on: all, or of many features, whose factors are dear, as many as are enough."""
    if features < _WIDE:
        return split
    held_out = itertools.accumulate(test.units for _, test in split)
    return split[: 1 + sum(units < _ENOUGH for units in itertools.islice(held_out, len(split) - 1))]


def _drop(xt: Tensor, n: Tensor, p: Product) -> float:
    """``2 tr(X N) - tr(X P X^T)`` for ``X^T [p, o]``."""
    return float(2 * (xt * n).sum() - (xt * (p @ xt)).sum())


def _sketch(cross: Product) -> Tensor:
    """Random combinations of goals, or all of them if they are few."""
    goals, like = cross.shape[1], cross.x if isinstance(cross, RowProduct) else cross
    if goals <= SKETCHED_GOALS:
        return torch.eye(goals).to(like)
    return torch.randn(goals, SKETCHED_GOALS, generator=torch.Generator().manual_seed(0)).to(like)


def _by_rank(products: Tensor) -> Tensor:
    """For each r the sum over all pairs of the first r directions: ``[k, k]`` to ``[k]``."""
    return products.cumsum(0).cumsum(1).diagonal()


def _padded(values: Tensor, length: int) -> Tensor:
    """Beyond the available ranks nothing changes any more."""
    if not len(values):
        return values.new_zeros(length)
    return torch.cat([values, values[-1:].expand(max(0, length - len(values)))])
