"""What fits on the other folds explain of each sample, and what that says of a gain: its error, and whether it is real.

For a sample n that the fit ``X`` has not seen, with ``v_perp`` what is left of its goals,

    c_n = sum over positions of <v_perp, X p>,        d_n = 2 c_n - sum over positions of |X p|^2.

``d_n`` is by how much the fit lowers the sample's part of the bottleneck, so its mean is the held-out gain. It is also
by how much the sample moves the gain of a least squares fit (its influence function), so that ``sd(d) / sqrt(n)`` is
the standard error of that gain by the delta method. ``c_n`` has mean 0 if goals are independent of ``p``. Positions of
a sample are no independent ones, so each sample counts once. These scores are this package's own.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import erfc, sqrt

import torch
from einops import rearrange
from torch import Tensor

from dagrow.captures import Batch
from dagrow.features import Feature, Goal, Reads, Remaining, Sliding, Stacked
from dagrow.layers import with_constant
from dagrow.positions import Arrival

__all__ = ["LEVEL", "Agreement", "Explained", "FoldFit", "Score", "Scores", "Verdict", "upper_tail"]

LEVEL = 0.05  #: of all tests of a call together


class Score(ABC):
    """What out-of-fold fits explain at some targets."""

    @property
    @abstractmethod
    def read(self) -> Sequence[Feature]:
        """The features that it is computed from."""

    @abstractmethod
    def sums(self, batch: Batch, fold: int) -> Tensor:
        """``(d, c)`` of samples that all belong to one fold ``[n, 2]``."""


@dataclass(frozen=True, eq=False)
class Scores(Feature):
    """Several scores added up, sample by sample, with the constant 1: rows ``(d, c, 1) [n, 3]``."""

    parts: Sequence[Score]

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
    def arrivals(self) -> Sequence[Arrival]:
        return [arrival for feature in self._read for arrival in feature.arrivals]

    def count(self, batch: Batch) -> int:
        return batch.samples

    def rows(self, batch: Batch) -> Tensor:
        return with_constant(batch.by_fold(self._sums), True)

    def _sums(self, batch: Batch, fold: int) -> Tensor:
        return torch.stack([part.sums(batch, fold) for part in self.parts]).sum(0)


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


@dataclass(frozen=True, eq=False)
class Agreement(Score):
    """Of features ``p`` at one target that reads ``b``.

    Attributes:
        source: ``p``.
        reads: ``b``, or None where fits use none of it.
        goal: ``v``.
        fits: for each fold the fit on the others.
    """

    source: Feature
    reads: Reads | Stacked | None
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
class Explained(Score):
    """Of directions of linear theory ``X = omega alpha^T`` at the consumers of an axis.

    Attributes:
        targets: for each consumer what the producers read, how it arrives there, and the goal.
        fits: for each fold ``alpha [p, k]`` and for each consumer ``omega [slots o, k]``.
    """

    targets: Sequence[tuple[Feature, Arrival, Goal | Remaining]]
    fits: Sequence[tuple[Tensor, Sequence[Tensor]]] = field(repr=False)

    @property
    def read(self) -> Sequence[Feature]:
        alpha = self.fits[0][0]
        found = [(Sliding(source, arrival, alpha, goal.edges[0]), goal) for source, arrival, goal in self.targets]
        return [feature for pair in found for feature in pair]

    def sums(self, batch: Batch, fold: int) -> Tensor:
        (alpha, omegas), total = self.fits[fold], []
        for (source, arrival, goal), omega in zip(self.targets, omegas, strict=True):
            read = Sliding(source, arrival, alpha, goal.edges[0]).rows(batch)
            out = rearrange(omega, "(e o) k -> (k e) o", e=arrival.index.shape[1]).to(read)
            total.append(_scores(read @ out, goal.rows(batch), batch.samples))
        return torch.stack(total).sum(0)


def _scores(explained: Tensor, goals: Tensor, samples: int) -> Tensor:
    """``(d, c)`` of each sample ``[n, 2]``."""
    c = (explained * goals).reshape(samples, -1).sum(1, dtype=torch.float64)
    square = explained.square().reshape(samples, -1).sum(1, dtype=torch.float64)
    return torch.stack([2 * c - square, c], 1)


@dataclass(frozen=True)
class Verdict:
    """What scores say.

    Attributes:
        samples: how many.
        gain: the held-out gain, the mean of ``d``.
        error: its standard error, ``sd(d) / sqrt(n)``.
        z: ``sum c / sqrt(2 sum c^2)``, of mean 0 and variance 1 where goals are independent of the features. Each
            fold's fit is on the others: of what one fold has in common with another, which is what sums up, each
            appears twice, and the variance is twice that of independent scores.
    """

    samples: int
    gain: float
    error: float
    z: float

    @classmethod
    def of(cls, sums: Tensor) -> "Verdict":
        """From the sums over samples of products of ``(d, c, 1)`` ``[3, 3]``."""
        n = float(sums[2, 2])
        gain = float(sums[0, 2]) / n
        variance = max(float(sums[0, 0]) / n - gain**2, 0.0)
        spread = sqrt(2 * float(sums[1, 1]))
        error = sqrt(variance / (n - 1)) if n > 1 else float("inf")
        return cls(int(n), gain, error, float(sums[1, 2]) / spread if spread else 0.0)


def upper_tail(z: float) -> float:
    """The probability that a standard normal variable is at least z."""
    return erfc(z / sqrt(2)) / 2
