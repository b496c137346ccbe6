"""What fits on the other folds explain of each sample, and what that says of a gain: its error, and whether it is real.

For a sample n that the fit ``X`` has not seen, with ``v_perp`` what is left of its goals,

    c_n = sum over positions of <v_perp, X p>,        d_n = 2 c_n - sum over positions of |X p|^2.

``d_n`` is by how much the fit lowers the sample's part of the bottleneck, so its mean is the held-out gain. It is also
by how much the sample moves the gain of a least squares fit (its influence function), so that ``sd(d) / sqrt(n)`` is
the standard error of that gain by the delta method. ``c_n`` has mean 0 if goals are independent of ``p``. Positions of
a sample are no independent ones, so each sample counts once. These scores are this package's own.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

from dagrow.graph import PositionMap
from dagrow.layers import with_constant
from dagrow.solvers import FoldFit, FoldSplit, MomentView, Regression, fan_out_fits, move_fits
from dagrow.statistics._captures import Batch
from dagrow.statistics._features import Derived, Feature, InputFeatures, OutputGoal, ResidualGoal, Stacked
from dagrow.statistics._shifted_features import TapFeatures


class SampleScore(ABC):
    """What out-of-fold fits explain at some targets."""

    @property
    @abstractmethod
    def features(self) -> Sequence[Feature]:
        """The features that it is computed from."""

    @abstractmethod
    def sums(self, batch: Batch, fold: int) -> Tensor:
        """``(d, c)`` of samples that all belong to one fold ``[n, 2]``."""


@dataclass(frozen=True, eq=False)
class SampleScores(Derived):
    """Several scores added up, sample by sample, with the constant 1: rows ``(d, c, 1) [n, 3]``.

    Attributes:
        parts: the scores.
    """

    parts: Sequence[SampleScore]

    @property
    def sources(self) -> Sequence[Feature]:
        return [feature for part in self.parts for feature in part.features]

    def count(self, batch: Batch) -> int:
        return batch.samples

    def rows(self, batch: Batch) -> Tensor:
        return with_constant(batch.by_fold(self._sums), True)

    def _sums(self, batch: Batch, fold: int) -> Tensor:
        return torch.stack([part.sums(batch, fold) for part in self.parts]).sum(0)


@dataclass(frozen=True, eq=False)
class FitScore(SampleScore):
    """Of features ``p`` at one target that reads ``b``.

    Attributes:
        source: ``p``.
        reads: ``b``, or None where fits use none of it.
        goal: ``v``.
        fits: for each fold the fit on the others.
    """

    source: Feature
    reads: InputFeatures | Stacked | None
    goal: Feature
    fits: Sequence[FoldFit] = field(repr=False)

    @property
    def features(self) -> Sequence[Feature]:
        return [self.source, self.goal, *([] if self.reads is None else [self.reads])]

    def sums(self, batch: Batch, fold: int) -> Tensor:
        fit = self.fits[fold]
        return self._by_column(batch, fit) if fit.is_by_column else self._by_output(batch, fit)

    def _by_output(self, batch: Batch, fit: FoldFit) -> Tensor:
        """With ``X p'`` and ``v - dW b``, which have an entry for each output."""
        x, goals = fit.weights, self.goal.rows(batch)
        explained = self.source.projected(batch, fit.basis.spread(x, fit.width).T)
        taken = None if fit.taken is None else fit.taken @ x.T
        return _scores(*self._left(batch, explained, taken, goals, fit.move), batch.samples)

    def _by_column(self, batch: Batch, fit: FoldFit) -> Tensor:
        """With ``p'`` and ``X^T (v - dW b)``, which have an entry for each column of B."""
        x, goals = fit.weights, self.goal.projected(batch, fit.weights)
        features = fit.basis.columns(self.source.rows(batch))
        assert isinstance(features, Tensor)
        return _scores(*self._left(batch, features, fit.taken, goals, fit.move), batch.samples, x)

    def _left(
        self, batch: Batch, features: Tensor, taken: Tensor | None, goals: Tensor, move: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Features and goals once what the target reads is taken out of them, all of it or the constant alone."""
        if taken is not None and taken.ndim == 1:
            features, taken = features - taken.to(features), None
        weights = [part for part in (taken, None if move is None else move.T) if part is not None]
        if self.reads is None or not weights:
            return features, goals
        read = self.reads.projected(batch, torch.cat(weights, 1)).split(goals.shape[1], 1)
        return features if taken is None else features - read[0], goals if move is None else goals - read[-1]


@dataclass(frozen=True, eq=False)
class DirectionTarget:
    """A consumer that directions are for.

    Attributes:
        source: what the producers read.
        position_map: how it arrives there.
        goal: the goal, or what moves of the consumer's weights leave of it.
        reads: what the consumer reads, where the moves are still to be taken out; else None.
        taken: for each fold ``dW^T X [i, k slots]``: what they take out of ``X^T v``.
    """

    source: Feature
    position_map: PositionMap
    goal: OutputGoal | ResidualGoal
    reads: InputFeatures | None = None
    taken: Sequence[Tensor] = field(default=(), repr=False)

    def left(self, batch: Batch, fold: int, x: Tensor) -> Tensor:
        """``X^T (v - dW b)`` for ``X [o, k slots]``, the fit on the other folds."""
        goals = self.goal.projected(batch, x)
        return goals if self.reads is None else goals - self.reads.projected(batch, self.taken[fold])


@dataclass(frozen=True, eq=False)
class DirectionScore(SampleScore):
    """Of directions of linear theory ``X = omega alpha^T`` at the consumers of an axis.

    Attributes:
        targets: the consumers.
        fits: for each fold ``alpha [p, k]`` and for each consumer ``omega [slots o, k]``.
    """

    targets: Sequence[DirectionTarget]
    fits: Sequence[tuple[Tensor, Sequence[Tensor]]] = field(repr=False)

    @property
    def features(self) -> Sequence[Feature]:
        taps, read = self._taps(self.fits[0][0]), [t.reads for t in self.targets if t.reads is not None]
        return [*taps, *(target.goal for target in self.targets), *read]

    @cached_property
    def _by_slot(self) -> list[tuple[Tensor, list[Tensor]]]:
        """For each fold alpha, and for each consumer ``X [o, k slots]``."""

        def by_slot(omega: Tensor, position_map: PositionMap) -> Tensor:
            return rearrange(omega, "(e o) k -> o (k e)", e=position_map.slots)

        maps = [target.position_map for target in self.targets]
        return [(alpha, [*map(by_slot, omegas, maps)]) for alpha, omegas in self.fits]

    def _taps(self, alpha: Tensor) -> list[TapFeatures]:
        """What each consumer reads of the directions."""
        return [TapFeatures(t.source, t.position_map, alpha, t.goal.edges[0]) for t in self.targets]

    def sums(self, batch: Batch, fold: int) -> Tensor:
        alpha, omegas = self._by_slot[fold]
        scores = []
        for target, taps, x in zip(self.targets, self._taps(alpha), omegas, strict=True):
            rows = taps.rows(batch)
            if x.shape[1] < len(x) or target.reads is not None:
                scores.append(_scores(rows, target.left(batch, fold, x), batch.samples, x))
            else:
                scores.append(_scores(rows @ x.T.to(rows), target.goal.rows(batch), batch.samples))
        return torch.stack(scores).sum(0)


def _scores(features: Tensor, goals: Tensor, samples: int, x: Tensor | None = None) -> Tensor:
    """``(d, c)`` of each sample ``[n, 2]``.

    Args:
        features: ``X p [n s, o]``; or ``p [n s, k]``, where ``x`` is X.
        goals: ``v [n s, o]``; or ``X^T v [n s, k]``.
        samples: n.
        x: ``X [o, k]``.

    Returns:
        Sums over the s positions of each sample, in double precision.
    """
    c = (features * goals).reshape(samples, -1).sum(1, dtype=torch.float64)
    squares = features.square() if x is None else features * (features @ (x.T @ x).to(features))
    square = squares.reshape(samples, -1).sum(1, dtype=torch.float64)
    return torch.stack([2 * c - square, c], 1)


def fan_out_score(split: FoldSplit, block: Regression, basis: Callable[[MomentView], Tensor], ridge: float) -> FitScore:
    """What :func:`dagrow.solvers.fan_out`, fitted on the other folds, explains of each sample.

    Args:
        split: moments of each fold and of the others.
        block: what is fitted to what.
        basis: from moments of the other folds the combinations ``[p, k]``, or the indices ``[k]``, that are fitted.
        ridge: of the fit.

    Returns:
        The score.
    """
    source, reads, goal = block.features, block.reads, block.goal
    assert isinstance(source, Feature)
    assert isinstance(goal, Feature)
    assert reads is None or isinstance(reads, (InputFeatures, Stacked))
    return FitScore(source, reads, goal, fan_out_fits(split, block, basis, ridge))


def move_score(split: FoldSplit, reads: InputFeatures, goal: OutputGoal, ridge: float) -> FitScore:
    """What :func:`dagrow.solvers.best_move`, fitted on the other folds, explains of each sample.

    Args:
        split: moments of each fold and of the others.
        reads: what the layer reads.
        goal: the goal at its output.
        ridge: of the fit.

    Returns:
        The score.
    """
    return FitScore(reads, None, goal, move_fits(split, reads, goal, ridge))
