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
        explained, goals = self.source.projected(batch, fit.weights.T), self.goal.rows(batch)
        if fit.taken is not None and fit.taken.ndim == 1:
            explained = explained - fit.taken.to(explained)
        weights = [part for part in (fit.taken, fit.move) if part is not None and part.ndim == 2]
        if self.reads is not None and weights:
            outputs = self.reads.projected(batch, torch.cat(weights).T).split(len(fit.weights), 1)
            explained = explained - outputs[0] if weights[0] is fit.taken else explained
            goals = goals if fit.move is None else goals - outputs[-1]
        return _scores(explained, goals, batch.samples)


@dataclass(frozen=True, eq=False)
class DirectionScore(SampleScore):
    """Of directions of linear theory ``X = omega alpha^T`` at the consumers of an axis.

    Attributes:
        targets: for each consumer what the producers read, how it arrives there, and the goal.
        fits: for each fold ``alpha [p, k]`` and for each consumer ``omega [slots o, k]``.
    """

    targets: Sequence[tuple[Feature, PositionMap, OutputGoal | ResidualGoal]]
    fits: Sequence[tuple[Tensor, Sequence[Tensor]]] = field(repr=False)

    @property
    def features(self) -> Sequence[Feature]:
        taps = self._taps(self.fits[0][0])
        return [feature for (_, _, goal), read in zip(self.targets, taps, strict=True) for feature in (read, goal)]

    def _taps(self, alpha: Tensor) -> list[TapFeatures]:
        """What each consumer reads of the directions."""
        return [TapFeatures(source, position_map, alpha, goal.edges[0]) for source, position_map, goal in self.targets]

    def sums(self, batch: Batch, fold: int) -> Tensor:
        alpha, omegas = self.fits[fold]
        scores = []
        for (_, position_map, goal), taps, omega in zip(self.targets, self._taps(alpha), omegas, strict=True):
            rows = taps.rows(batch)
            weights = rearrange(omega, "(e o) k -> (k e) o", e=position_map.slots).to(rows)
            scores.append(_scores(rows @ weights, goal.rows(batch), batch.samples))
        return torch.stack(scores).sum(0)


def _scores(explained: Tensor, goals: Tensor, samples: int) -> Tensor:
    """``(d, c)`` of each sample ``[n, 2]``."""
    c = (explained * goals).reshape(samples, -1).sum(1, dtype=torch.float64)
    square = explained.square().reshape(samples, -1).sum(1, dtype=torch.float64)
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
