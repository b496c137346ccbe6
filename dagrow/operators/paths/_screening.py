"""Choosing among many places for a path: sketches rank them all, and only the best are solved exactly.

Of every activation a few random combinations ``z = sigma(Omega^T p)`` stand for all of its features. What they explain
of a pre-activation's goal costs products with few columns only, and one pass over the batches for all pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from dagrow.operators._base import Candidate
from dagrow.operators.paths._links import PathSite
from dagrow.solvers import FoldSplit, Moments, Pair, Regression, fan_out, validate_fan_out, with_cross_validated_ridge
from dagrow.statistics import Feature, Hidden, Objective, Ones, Squares

EXACT = 10  #: places that are solved exactly
COLUMNS = 32  #: combinations of the features of each activation; those with fewer features are not combined
RIDGE = 0.1  #: of what is explained


def screened(
    links: Sequence[PathSite], candidate: Callable[[PathSite], Candidate], activation: nn.Module | None, exact: int
) -> Sequence[Candidate]:
    """Candidates for the best places only, once all were looked at; for all places if they are few.

    Args:
        candidate: makes the candidate of a place.
        activation: of new hidden units, None for a path without.
    """
    if len(links) <= exact:
        return [candidate(link) for link in links]
    return [Screening(tuple(links), candidate, activation, exact)]


@dataclass(frozen=True, eq=False)
class Screening(Candidate):
    """A first pass, which tells how large each activation's features are."""

    links: tuple[PathSite, ...]
    candidate: Callable[[PathSite], Candidate]
    activation: nn.Module | None
    exact: int

    @property
    def tests(self) -> int:
        """All places are looked at, and the best are chosen."""
        return len(self.links)

    def features(self, link: PathSite) -> Feature:
        return link.features(link.bias if self.activation is None else True)

    @cached_property
    def sizes(self) -> dict[Feature, Pair]:
        """Mean squares of every feature."""
        return {p: (Squares(p), Ones(p)) for p in map(self.features, self.links)}

    def pairs(self) -> list[Pair]:
        return list(self.sizes.values())

    def solve(self, moments: Moments, objective: Objective) -> Candidate:
        sketches = {p: self._sketch(p, moments[pair][:, 0]) for p, pair in self.sizes.items()}
        return Ranking(self, [link.block(sketches[self.features(link)]) for link in self.links])

    def _sketch(self, features: Feature, squares: Tensor) -> Feature:
        """Random combinations of features of equal size."""
        scale = torch.where(squares > 0, squares, 1).rsqrt() * (squares > 0)
        if self.activation is None and len(squares) <= COLUMNS:
            return Hidden(features, scale.diag(), nn.Identity())
        generator = torch.Generator().manual_seed(len(squares))
        mixed = torch.randn(len(squares), COLUMNS, generator=generator, dtype=torch.float64).to(squares)
        return Hidden(features, scale[:, None] * mixed / len(squares) ** 0.5, self.activation or nn.Identity())


@dataclass(frozen=True, eq=False)
class Ranking(Candidate):
    """A second pass, which tells what the sketches explain."""

    origin: Screening
    blocks: Sequence[Regression]

    def pairs(self) -> list[Pair]:
        return [pair for block in self.blocks for pair in block.pairs()]

    def solve(self, moments: Moments, objective: Objective) -> Sequence[Candidate]:
        split, known = moments.split(), {}
        worth = []
        for block in self.blocks:
            if block.goal not in known:  # the ridge of what is read already, once for each pre-activation
                known[block.goal] = with_cross_validated_ridge(split, block).ridge
            worth.append(self._worth(moments, split, block, known[block.goal]))
        order = sorted(range(len(worth)), key=worth.__getitem__, reverse=True)
        return [self.origin.candidate(self.origin.links[i]) for i in order[: self.origin.exact]]

    @staticmethod
    def _worth(m: Moments, split: FoldSplit, block: Regression, ridge: float) -> float:
        """What a sketch explains, of samples that it was not fitted on if there are folds."""
        block = replace(block, ridge=ridge)
        if m.folds == 1:
            return fan_out(m, block, None, RIDGE).drop
        return validate_fan_out(split, block, None, (RIDGE,)).gain
