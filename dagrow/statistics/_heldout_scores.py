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

from dagrow.layers import with_constant
from dagrow.solvers import FoldFit, FoldSplit, MomentView, Regression, fan_out_fits, move_fits
from dagrow.statistics._captures import Batch
from dagrow.statistics._features import Feature, InputFeatures, OutputGoal, ResidualGoal, Stacked
from dagrow.statistics._position_map import PositionMap
from dagrow.statistics._shifted_features import TapFeatures


class SampleScore(ABC):
    """What out-of-fold fits explain at some targets."""

    @property
    @abstractmethod
    def read(self) -> Sequence[Feature]:
        """The features that it is computed from."""

    @abstractmethod
    def sums(self, batch: Batch, fold: int) -> Tensor:
        """``(d, c)`` of samples that all belong to one fold ``[n, 2]``."""


@dataclass(frozen=True, eq=False)
class SampleScores(Feature):
    """Several scores added up, sample by sample, with the constant 1: rows ``(d, c, 1) [n, 3]``."""

    parts: Sequence[SampleScore]

    @property
    def _read(self) -> list[Feature]:
        return [feature for part in self.parts for feature in part.read]

    @property
    def edges(self) -> tuple[str, ...]:
        return tuple(edge for feature in self._read for edge in feature.edges)

    @property
    def goals(self) -> tuple[str, ...]:
        return tuple(edge for feature in self._read for edge in feature.goals)

    @property
    def wishes(self) -> tuple[str, ...]:
        return tuple(edge for feature in self._read for edge in feature.wishes)

    @property
    def arrivals(self) -> Sequence[PositionMap]:
        return [arrival for feature in self._read for arrival in feature.arrivals]

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
    def read(self) -> Sequence[Feature]:
        return [self.source, self.goal, *([] if self.reads is None else [self.reads])]

    def sums(self, batch: Batch, fold: int) -> Tensor:
        fit = self.fits[fold]
        explained, goals = self.source.projected(batch, fit.weights.T), self.goal.rows(batch)
        if fit.taken is not None and fit.taken.ndim == 1:
            explained = explained - fit.taken.to(explained)
        used = [part for part in (fit.taken, fit.move) if part is not None and part.ndim == 2]
        if self.reads is not None and used:
            out = self.reads.projected(batch, torch.cat(used).T).split(len(fit.weights), 1)
            explained = explained - out[0] if used[0] is fit.taken else explained
            goals = goals if fit.move is None else goals - out[-1]
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
    def read(self) -> Sequence[Feature]:
        alpha = self.fits[0][0]
        found = [(TapFeatures(source, arrival, alpha, goal.edges[0]), goal) for source, arrival, goal in self.targets]
        return [feature for pair in found for feature in pair]

    def sums(self, batch: Batch, fold: int) -> Tensor:
        (alpha, omegas), total = self.fits[fold], []
        for (source, arrival, goal), omega in zip(self.targets, omegas, strict=True):
            read = TapFeatures(source, arrival, alpha, goal.edges[0]).rows(batch)
            out = rearrange(omega, "(e o) k -> (k e) o", e=arrival.index.shape[1]).to(read)
            total.append(_scores(read @ out, goal.rows(batch), batch.samples))
        return torch.stack(total).sum(0)


def _scores(explained: Tensor, goals: Tensor, samples: int) -> Tensor:
    """``(d, c)`` of each sample ``[n, 2]``."""
    c = (explained * goals).reshape(samples, -1).sum(1, dtype=torch.float64)
    square = explained.square().reshape(samples, -1).sum(1, dtype=torch.float64)
    return torch.stack([2 * c - square, c], 1)


def agreement(split: FoldSplit, block: Regression, basis: Callable[[MomentView], Tensor], ridge: float) -> FitScore:
    """What :func:`dagrow.solvers.fan_out`, fitted on the other folds, explains of each sample.

    Args:
        basis: from moments of the other folds the combinations ``[p, k]``, or the indices ``[k]``, that are fitted.
    """
    source, reads, goal = block.features, block.reads, block.goal
    assert isinstance(source, Feature)
    assert isinstance(goal, Feature)
    assert reads is None or isinstance(reads, (InputFeatures, Stacked))
    return FitScore(source, reads, goal, fan_out_fits(split, block, basis, ridge))


def move_agreement(split: FoldSplit, reads: InputFeatures, goal: OutputGoal, ridge: float) -> FitScore:
    """What :func:`dagrow.solvers.best_move`, fitted on the other folds, explains of each sample."""
    return FitScore(reads, None, goal, move_fits(split, reads, goal, ridge))
