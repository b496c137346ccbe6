"""Linear theory: the fan-in directions that explain most of what consumers' goals leave over.

A consumer that reads new channels where they are written needs one pass: ``N = R - C dW^T``. One that reads them
elsewhere, or in several slots at once as a convolution does, would need ``C = E p b^T`` for every slot. There the move
of its own weights is fitted in a first pass, out of fold, and ``N = E p v_perp^T`` is measured in a second one.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dagrow.graph import Edge
from dagrow.operators._base import Needs
from dagrow.operators.neurons._axis_moments import AxisMoments, own_pairs, reads_of
from dagrow.operators.neurons._places import Place
from dagrow.operators.neurons._proposal import OPEN, Proposal, ProposalSteps, drawn, normal, scaled
from dagrow.operators.neurons._settings import NeuronSettings
from dagrow.solvers import (
    Moments,
    Pair,
    Regression,
    SlotMoments,
    alternating_least_squares,
    directions,
    validate_directions,
)
from dagrow.statistics import DirectionScore, DirectionTarget, OutputGoal, ResidualGoal, SampleScores, TapFeatures

MOST = 1024  #: features in all slots among which turns are taken
Goals = Mapping[str, OutputGoal | ResidualGoal]
Fits = Sequence[tuple[Tensor, Sequence[Tensor]]]  #: for each fold alpha, and omega at each consumer


def propose_directions(settings: NeuronSettings) -> ProposalSteps:
    """The directions that explain most, by linear theory; random ones where it does not reach the consumers.

    Args:
        settings: where and how they are sought.

    Yields:
        What linear theory needs, in one to three passes.

    Returns:
        The directions, scaled; None if there are none that are worth it.
    """
    place, scales = settings.place, settings.place.scales
    moved = {c.name: c for c in place.apart() if settings.project and c.trainable}
    unmoved = [c for c in place.linear() if c.name not in moved]
    blocks = {c.name: _regression(settings, c, OutputGoal(c.name)) for c in unmoved}
    move_pairs = [pair for consumer in moved.values() for pair in own_pairs(consumer)]
    later = [place.features] if moved else []
    moments = yield Needs([*_pairs(blocks), *move_pairs, *([] if moved else scales)], later=later)
    own = settings.by_axis(place.axis, moments, None)
    ridges = {c.name: own.ridge(c) for c in place.linear()}
    residuals = {name: own.residual(c, ridges[name]) for name, c in moved.items()}
    known = own.known
    if moved:
        del own  # with its factors, before others are measured
        residual_blocks = {name: _regression(settings, consumer, residuals[name]) for name, consumer in moved.items()}
        moments = moments.joined((yield Needs([*_pairs(residual_blocks), *scales])))
        own, blocks = AxisMoments(place.axis, moments, settings.project), blocks | residual_blocks
    if not blocks:
        random = drawn(place, settings.k or OPEN, settings.seed)
        notes = ("random: linear theory does not reach the consumers",)
        return scaled(replace(random, notes=notes), place, moments)
    leading = _leading(settings, own, [replace(blocks[name], ridge=ridges[name]) for name in blocks])
    if leading is None:
        return None
    proposal = leading.proposal
    if leading.fits:
        explained = _explained(place, own, residuals, ridges, [*blocks], leading.fits)
        proposal = replace(proposal, explained=explained)
    if _rank(settings) and proposal.alpha.shape[1]:
        left = [(c, residuals.get(c.name)) for c in place.linear()]
        goals = {c.name: goal or own.residual(c, ridges[c.name]) for c, goal in left}
        proposal = yield from _alternating(place, proposal, leading, goals)
    return scaled(replace(_completed(settings, proposal, moments), known=known, ridges=ridges), place, moments)


def _rank(settings: NeuronSettings) -> int:
    """The number of directions among which turns are taken; 0 for none."""
    place = settings.place
    if not settings.alternating or not place.apart():
        return 0
    slots = max(arrival.slots for arrival in place.arrivals.values() if arrival is not None)
    return max((settings.k or 1) * place.directions, MOST // slots)


def _regression(settings: NeuronSettings, consumer: Edge, goal: OutputGoal | ResidualGoal) -> Regression:
    """What the producers read, at a consumer."""
    return settings.place.regression(consumer, "all" if settings.joint else "none", settings.project, goal)


def _pairs(blocks: Mapping[str, Regression]) -> list[Pair]:
    return [pair for block in blocks.values() for pair in block.pairs()]


@dataclass(frozen=True, eq=False)
class _Leading:
    """The directions that are taken, all those among which turns may be taken, and the fits on the other folds."""

    proposal: Proposal
    basis: Tensor
    ridge: float
    fits: Fits = ()


def _leading(settings: NeuronSettings, own: AxisMoments, regressions: Sequence[Regression]) -> _Leading | None:
    """The leading singular directions of what is left of the goals; None if they are not worth it."""
    m = own.m
    per_unit = settings.place.directions
    k = None if settings.k is None else settings.k * per_unit
    ridge, fits = settings.ridges[0], list[tuple[Tensor, Sequence[Tensor]]]()
    if m.folds > 1:
        held_out = validate_directions(own.split, regressions, k, settings.ridges)
        ridge, k, fits = held_out.ridge, -(-held_out.k // per_unit) * per_unit, [*held_out.fits]
        if settings.k is None and not held_out.gain > 0:
            return None
    assert k is not None
    leading = directions(own.view(ridge, cancels=settings.joint), regressions, max(k, _rank(settings)), ridge)
    leading = replace(leading, alpha=leading.alpha.double(), values=leading.values.double())  # as all other moments
    notes = (leading.note,) if leading.note else ()
    # singular vectors have no sign: where a unit has several, what it computes depends on their signs to each other
    proposal = Proposal(leading.alpha[:, :k], leading.values[:k], notes, invariant=per_unit == 1)
    return _Leading(proposal, leading.alpha, ridge, fits)


def _explained(
    place: Place, own: AxisMoments, residuals: Goals, ridges: Mapping[str, float], names: Sequence[str], fits: Fits
) -> SampleScores:
    """What directions from the other folds explain of each sample, at consumers in the order of the fits."""
    targets = []
    for number, name in enumerate(names):
        arrival, consumer, goal = place.arrivals[name], place.dag.edge(name), residuals.get(name)
        assert arrival is not None
        reads, combined = reads_of(consumer), [omegas[number] for _, omegas in fits]
        if goal is None and own.project and reads and all(x.shape[1] < len(x) for x in combined):
            taken = own.taken(consumer, ridges[name], combined)
            targets.append(DirectionTarget(place.features, arrival, OutputGoal(name), reads, taken))
        else:
            goal = goal or own.residual(consumer, ridges[name])
            targets.append(DirectionTarget(place.features, arrival, goal))
    return SampleScores([DirectionScore(targets, fits)])


def _alternating(
    place: Place, proposal: Proposal, leading: _Leading, goals: Goals
) -> Generator[Needs, Moments, Proposal]:
    """Measures the leading directions in all slots at once, and takes turns from the first of them."""
    parts = []
    for consumer in place.linear():
        arrival = place.arrivals[consumer.name]
        assert arrival is not None
        taps = TapFeatures(place.features, arrival, leading.basis, consumer.name)
        parts.append((taps, goals[consumer.name]))
    moments = yield Needs([pair for taps, goal in parts for pair in ((taps, taps), (taps, goal))])
    slotted = [
        SlotMoments.of(moments[taps, taps], moments[taps, goal], taps.position_map.slots, leading.ridge)
        for taps, goal in parts
    ]
    start = torch.eye(leading.basis.shape[1], proposal.alpha.shape[1]).to(leading.basis)
    alpha = leading.basis @ alternating_least_squares(slotted, start, moments.resolution)
    return replace(proposal, alpha=alpha, other=proposal.alpha)


def _completed(settings: NeuronSettings, proposal: Proposal, m: Moments) -> Proposal:
    """As fan-in of units, with random directions where linear theory holds fewer than were asked for."""
    place, per_unit, count = settings.place, settings.place.directions, proposal.alpha.shape[1]
    missing = max((settings.k or 0) * per_unit - count, -count % per_unit)
    if missing:
        extra = normal(place, len(proposal.alpha), missing, settings.seed).to(proposal.alpha)
        notes = (*proposal.notes, f"{missing} random directions beyond the rank of the goal")
        alpha = torch.cat([proposal.alpha, extra], 1)
        proposal = replace(proposal, alpha=alpha, other=None, notes=notes, invariant=False)
    if not place.per_channel:
        return proposal
    packed = [None if a is None else place.packed(place.scaled(a, m)) for a in (proposal.alpha, proposal.other)]
    assert packed[0] is not None
    return replace(proposal, alpha=packed[0], other=packed[1])
