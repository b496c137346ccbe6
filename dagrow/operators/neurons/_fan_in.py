"""Linear theory: the fan-in directions that explain most of what consumers' goals leave over.

A consumer that reads new channels where they are written needs one pass: ``N = R - C dW^T``. One that reads them
elsewhere, or in several slots at once as a convolution does, would need ``C = E p b^T`` for every slot. There the move
of its own weights is fitted in a first pass, out of fold, and ``N = E p v_perp^T`` is measured in a second one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dagrow.graph import Edge
from dagrow.operators._base import Candidate
from dagrow.operators.neurons._fan_out import Proposal, WidenCandidate
from dagrow.operators.neurons._places import Place
from dagrow.solvers import (
    Compensation,
    HeldOutDirections,
    Moments,
    Pair,
    Regression,
    SlotMoments,
    alternating_least_squares,
    directions,
    validate_directions,
    with_cross_validated_ridge,
)
from dagrow.statistics import DirectionScore, Objective, OutputGoal, ResidualGoal, SampleScores, TapFeatures

MOST = 1024  #: features in all slots among which turns are taken
OPEN = 16  #: random directions offered when their number is open


@dataclass(frozen=True, eq=False)
class OptimalCandidate(Candidate):
    """New channels along the directions that linear theory finds.

    Attributes:
        widen: what is done with the directions.
        k: how many units; None for as many as the held-out drop supports.
        compensation, project: see :class:`dagrow.solvers.Regression`.
        alternating: whether directions for consumers that read in several slots are improved by turns.
    """

    widen: WidenCandidate
    k: int | None
    compensation: Compensation
    project: bool
    alternating: bool = False

    @property
    def tests(self) -> int:
        return self.widen.tests

    @property
    def place(self) -> Place:
        return self.widen.place

    @cached_property
    def behind(self) -> list[Edge]:
        """The consumers that need a second pass."""
        return [c for c in self.place.apart() if self.project and self.place.reads(c) is not None]

    @cached_property
    def blocks(self) -> dict[str, Regression]:
        """What is known of the other consumers from one pass."""
        behind = {c.name for c in self.behind}
        return {c.name: self._block(c) for c in self.place.linear() if c.name not in behind}

    def _block(self, consumer: Edge, goal: OutputGoal | ResidualGoal | None = None) -> Regression:
        return self.place.block(consumer, self.compensation, self.project, goal or OutputGoal(consumer.name))

    def pairs(self) -> list[Pair]:
        found = [pair for block in self.blocks.values() for pair in block.pairs()]
        for consumer in self.behind:
            reads, goal = self.place.reads(consumer), OutputGoal(consumer.name)
            assert reads is not None
            found += [(reads, reads), (reads, goal)]
        return found if self.behind else [*found, *self.widen.pairs()]

    def solve(self, moments: Moments, objective: Objective) -> Candidate | None:
        left = {c.name: self._remaining(moments, c) for c in self.behind}
        if not left:
            return self.proposed(moments, self.blocks, {})
        blocks = {c.name: self._block(c, left[c.name]) for c in self.behind}
        return SecondPass(self, moments, left, {**self.blocks, **blocks})

    def remaining_goal(self, m: Moments, consumer: Edge) -> OutputGoal | ResidualGoal:
        """What is to be explained at a consumer."""
        if self.project and self.place.reads(consumer) is not None:
            return self._remaining(m, consumer)
        return OutputGoal(consumer.name)

    def _remaining(self, m: Moments, consumer: Edge) -> ResidualGoal:
        """With a move that was fitted on the other folds, its ridge by cross-validation."""
        reads, goal = self.place.reads(consumer), OutputGoal(consumer.name)
        assert reads is not None
        if m.folds == 1:
            return ResidualGoal(goal, reads, [m.whitening(reads).solve(m[reads, goal]).T])
        split = m.split()
        ridge = with_cross_validated_ridge(split, Regression(reads, reads, goal)).ridge
        return ResidualGoal(
            goal, reads, [train.whitening(reads, ridge).solve(train[reads, goal]).T for train, _ in split]
        )

    def proposed(
        self, m: Moments, blocks: Mapping[str, Regression], left: Mapping[str, ResidualGoal]
    ) -> Candidate | None:
        """The directions, put into a preview."""
        if not blocks:
            random = drawn(self.place, self.k or OPEN, self.widen.seed)
            return self.widen.stage(replace(random, notes=("random: linear theory does not reach the consumers",)), m)
        each = self.place.directions
        k = None if self.k is None else self.k * each
        chosen, ridge, held = list(blocks.values()), self.widen.ridges[0], None
        if m.folds > 1:
            split = m.split()
            chosen = [with_cross_validated_ridge(split, block) for block in chosen]
            held = validate_directions(split, chosen, k, self.widen.ridges)
            ridge, k = held.ridge, -(-held.k // each) * each
            if self.k is None and not held.gain > 0:
                return None
        assert k is not None
        found = directions(m, chosen, max(k, self.rank), ridge)
        notes = (found.note,) if found.note else ()
        explained = None if held is None else self._explained(m, held, blocks, left)
        proposal = Proposal(found.alpha[:, :k], found.values[:k], notes, explained=explained)
        if self.rank and proposal.alpha.shape[1]:
            return Alternating(self, m, proposal, found.alpha, left, ridge)
        return self.completed(proposal, m)

    @property
    def rank(self) -> int:
        """The number of directions among which turns are taken; 0 for none."""
        if not self.alternating or not self.place.apart():
            return 0
        slots = max(arrival.slots for arrival in self.place.arrivals.values() if arrival is not None)
        return max((self.k or 1) * self.place.directions, MOST // slots)

    def completed(self, proposal: Proposal, m: Moments) -> Candidate | None:
        """With random directions where linear theory holds fewer than were asked for."""
        each, found = self.place.directions, proposal.alpha.shape[1]
        missing = max((self.k or 0) * each - found, -found % each)
        if missing:
            extra = _random(self.place, len(proposal.alpha), missing, self.widen.seed).to(proposal.alpha)
            notes = (*proposal.notes, f"{missing} random directions beyond the rank of the goal")
            alpha = torch.cat([proposal.alpha, extra], 1)
            proposal = replace(proposal, alpha=alpha, other=None, notes=notes, invariant=False)
        alpha, other = self._packed(proposal.alpha, m), proposal.other
        return self.widen.stage(
            replace(proposal, alpha=alpha, other=None if other is None else self._packed(other, m)), m
        )

    def _packed(self, alpha: Tensor, m: Moments) -> Tensor:
        """Directions of one size as fan-in of units."""
        return self.place.packed(self.place.scaled(alpha, m)) if self.place.alike else alpha

    def _explained(
        self, m: Moments, held: HeldOutDirections, blocks: Mapping[str, Regression], left: Mapping[str, ResidualGoal]
    ) -> SampleScores:
        """What directions from the other folds explain of each sample: whether that is more than chance."""
        targets, consumers = [], {consumer.name: consumer for consumer in self.place.linear()}
        for name in blocks:  # in the order of the fits
            goal = left.get(name) or self.remaining_goal(m, consumers[name])
            arrival = self.place.arrivals[name]
            assert arrival is not None
            targets.append((self.place.features, arrival, goal))
        return SampleScores([DirectionScore(targets, held.fits)])


@dataclass(frozen=True, eq=False)
class SecondPass(Candidate):
    """Measures what moves of the consumers' own weights leave of their goals."""

    origin: OptimalCandidate
    first: Moments
    left: Mapping[str, ResidualGoal]
    blocks: Mapping[str, Regression]

    def pairs(self) -> list[Pair]:
        found = [pair for name in self.left for pair in self.blocks[name].pairs()]
        return [*found, *self.origin.widen.pairs()]

    def solve(self, moments: Moments, objective: Objective) -> Candidate | None:
        return self.origin.proposed(self.first.joined(moments), self.blocks, self.left)


@dataclass(frozen=True, eq=False)
class Alternating(Candidate):
    """Measures the leading directions in all slots at once, and takes turns from the first of them."""

    origin: OptimalCandidate
    first: Moments
    proposal: Proposal
    basis: Tensor
    left: Mapping[str, ResidualGoal]
    ridge: float

    @cached_property
    def parts(self) -> dict[str, tuple[TapFeatures, OutputGoal | ResidualGoal]]:
        found = {}
        for consumer in self.origin.place.linear():
            arrival = self.origin.place.arrivals[consumer.name]
            assert arrival is not None
            goal = self.left.get(consumer.name) or self.origin.remaining_goal(self.first, consumer)
            found[consumer.name] = TapFeatures(self.origin.place.features, arrival, self.basis, consumer.name), goal
        return found

    def pairs(self) -> list[Pair]:
        return [pair for z, goal in self.parts.values() for pair in ((z, z), (z, goal))]

    def solve(self, moments: Moments, objective: Objective) -> Candidate | None:
        parts = [
            SlotMoments.of(moments[z, z], moments[z, goal], z.position_map.slots, self.ridge)
            for z, goal in self.parts.values()
        ]
        start = torch.eye(self.basis.shape[1], self.proposal.alpha.shape[1]).to(self.basis)
        turned = self.basis @ alternating_least_squares(parts, start, moments.resolution)
        return self.origin.completed(replace(self.proposal, alpha=turned, other=self.proposal.alpha), self.first)


def drawn(place: Place, k: int, seed: int) -> Proposal:
    """Random fan-in, another one each time that the axis has another width."""
    return Proposal(_random(place, place.width * place.channels, k, seed), invariant=False)


def _random(place: Place, rows: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7919 * place.axis.width)
    return torch.randn(rows, k, generator=generator, dtype=torch.float64)
