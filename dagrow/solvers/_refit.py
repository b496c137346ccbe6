"""What a layer's other weights have to become once some of its features go: a regression of what these wrote.

With ``b_S`` the features that go and ``b_R`` those that stay, the weights become ``W_R + Delta`` with

    Delta = argmin E|W_S b_S - Delta b_R|^2 = W_S G_SR (G_RR + ridge)^-1,        G = E b b^T,

exact on the measured samples without a ridge, and the smallest one where G is singular. The constant of a bias is one
of the features that stay. Source: He et al. 2017 (channel pruning with reconstruction by least squares).
"""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dagrow.solvers._basis import Basis
from dagrow.solvers._closed_forms import best_move
from dagrow.solvers._cross_validation import RIDGES, FoldFit
from dagrow.solvers._moments import Moments, MomentView, Pair
from dagrow.solvers._row_products import dense

REFIT_RIDGES = (0.0, *RIDGES)  #: that are tried: none is best where the others stand in exactly
_REST, _GONE = "rest", "gone"


@dataclass(frozen=True, eq=False)
class Refit:
    """A layer without some of its features.

    Attributes:
        change: ``(-W_S, Delta) [o, i]``: of all weights, those that go to zero among them.
        gain: ``E <v, change b>``: minus the slope of the loss along the change.
        energy: ``E |change b|^2``: what is lost of what the layer writes.
        note: what had to be done to a singular G, or "".
    """

    change: Tensor
    gain: float
    energy: float
    note: str


@dataclass(frozen=True, eq=False)
class Lost:
    """What some features wrote, to be written by the rest.

    Attributes:
        m: moments of ``b`` with itself and with the goal.
        reads: ``b``.
        goal: ``v``.
        weights: ``W [o, i]``; 0 in the rows of outputs that do not count.
        gone: the columns of the features that go.
        is_refitted: whether the others stand in for them.
    """

    m: Moments
    reads: Hashable
    goal: Hashable
    weights: Tensor
    gone: Tensor
    is_refitted: bool = True

    @property
    def rest(self) -> Tensor:
        """The columns of the features that stay."""
        stays = torch.ones(self.weights.shape[1], dtype=torch.bool)
        stays[self.gone] = False
        return torch.nonzero(stays).flatten()

    @cached_property
    def _moments(self) -> Moments:
        """Of what stays, and of what is to be written by it, in the same folds."""
        m, gone, rest = self.m, self.gone, self.rest
        grams = m.by_fold((self.reads, self.reads))
        wanted = grams[:, rest][:, :, gone] @ self.weights[:, gone].to(grams).T
        sums: dict[Pair, Tensor] = {(_REST, _REST): grams[:, rest][:, :, rest], (_REST, _GONE): wanted}
        positions: dict[Hashable, float] = dict.fromkeys((_REST, _GONE), m.positions[self.reads])
        return Moments(m.counts, sums, positions, m.resolution, groups=m.groups)

    def refit(self, ridge: float) -> Refit:
        """On all samples.

        Args:
            ridge: relative to each feature's second moment.

        Returns:
            The change, what it does to the loss, and what is lost.
        """
        change, note = self._change(self._moments, ridge) if self.is_refitted else (self._faded(), "")
        gram, goals = dense(self.m.product(self.reads, self.reads)), self.m[self.reads, self.goal]
        gain, energy = (change.to(goals).T * goals).sum(), (change.to(gram) @ gram * change.to(gram)).sum()
        return Refit(change, float(gain), max(0.0, float(energy)), note)

    def folds(self, ridge: float) -> list[FoldFit]:
        """For each fold the change that is fitted on the others, as a fit of what the layer reads."""
        changes = [self._faded()] * self.m.folds
        if self.is_refitted:
            changes = [self._change(train, ridge)[0] for train, _ in self._moments.split()]
        return [FoldFit(change, change.shape[1], Basis()) for change in changes]

    def held_out(self, ridge: float) -> float:
        """What is lost on samples that the fit has not seen, mean over folds."""
        total, pairs = 0.0, zip(self.m.split(), self.folds(ridge), strict=True)
        for (_, test), fit in pairs:
            gram = dense(test.product(self.reads, self.reads))
            total += float((fit.weights.to(gram) @ gram * fit.weights.to(gram)).sum())
        return max(0.0, total / self.m.folds)

    def _faded(self) -> Tensor:
        change = torch.zeros_like(self.weights)
        change[:, self.gone] = -self.weights[:, self.gone]
        return change

    def _change(self, m: MomentView, ridge: float) -> tuple[Tensor, str]:
        move, change = best_move(m, _REST, _GONE, ridge), self._faded()
        change[:, self.rest] = move.weights.to(change)
        return change, move.note
