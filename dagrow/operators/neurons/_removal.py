"""Units that go: which ones, what their consumers' other weights become, and by how much the loss will rise.

All of it comes from the second moments of what the consumers read, but for one number: the curvature of the loss along
the way is measured, by the loss at its end.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from dagrow.errors import GrowthError, NotFiniteError, first_line
from dagrow.graph import Axis, Dag, Edge
from dagrow.operators._base import Needs, Operator, Steps
from dagrow.operators.neurons._places import unmeasured
from dagrow.solvers import Lost, Moments, Pair, Reader, Verdict, least_needed
from dagrow.statistics import FitScore, InputFeatures, Objective, OutputGoal, SampleScores, UnitEffects
from dagrow.surgery import Growth, cost_of, removal

Score = Literal["refit", "magnitude", "taylor"]
SAME = 1e-9  #: a relative rise of the loss that is none
ROUNDED = 64  #: times what moments tell apart: another one


@dataclass(frozen=True, eq=False)
class Removal:
    """What is to go, and how it is chosen.

    Attributes:
        operator: what proposes it.
        dag: where the axis is.
        axis: whose units may go.
        k: how many; None for as many as go at no rise that can be told from none.
        score: "refit", "magnitude" or "taylor".
        ridges: of the refit, to choose from.
    """

    operator: Operator
    dag: Dag
    axis: Axis
    k: int | None
    score: Score
    ridges: tuple[float, ...]

    @property
    def most(self) -> int:
        """How many may go."""
        return self.axis.width - self.axis.layout.least

    @cached_property
    def consumers(self) -> tuple[Edge, ...]:
        """Those that are measured."""
        return self.axis.measured.consumers

    def features(self, consumer: Edge) -> tuple[InputFeatures, OutputGoal]:
        """What a consumer reads, and its goal."""
        return InputFeatures(consumer.name, consumer.bias), OutputGoal(consumer.name)

    def weights(self, consumer: Edge) -> Tensor:
        """``W [o, i]``, with 0 for the constant of a bias."""
        weight = consumer.matrix(consumer.parameters()["weight"].detach()).flatten(1)
        return torch.cat([weight, weight.new_zeros(len(weight), consumer.bias)], 1)

    def columns(self, consumer: Edge) -> Tensor:
        """The features of each unit ``[U, m]``: its channels there, with their taps."""
        channels, taps = self.axis.layout.columns[consumer.name], consumer.rule.taps(consumer.module)
        return (channels[..., None] * taps + torch.arange(taps)).flatten(1)

    def outputs(self, consumer: Edge) -> Tensor:
        """The unit that each of its outputs is of, or -1 ``[o]``: some write what they read."""
        units = torch.full((len(self.weights(consumer)),), -1)
        rows = self.axis.layout.rows.get(consumer.name)
        if rows is not None:
            units[rows] = torch.arange(len(rows))[:, None]
        return units

    @cached_property
    def effects(self) -> UnitEffects:
        """What the Taylor score is the mean of."""
        return UnitEffects([(*self.features(c), self.weights(c), self.columns(c)) for c in self.consumers])

    def pairs(self) -> list[Pair]:
        """What has to be measured at first."""
        sides = [self.features(consumer) for consumer in self.consumers]
        pairs: list[Pair] = [pair for reads, goal in sides for pair in ((reads, reads), (reads, goal))]
        return [*pairs, (self.effects, self.effects)] if self.score == "taylor" else pairs


def remove_units(settings: Removal, objective: Objective) -> Steps:
    """Units go, and their consumers are refitted.

    Args:
        settings: where, how many, and how they are chosen.
        objective: the loss that it is measured on.

    Yields:
        Second moments of what consumers read; then, where there are folds, what fits on the other folds lose.

    Returns:
        The growth, or None where the number is open and no unit goes for nothing.
    """
    choice = _Choice(settings, objective, (yield Needs(settings.pairs())))
    if settings.k is not None:
        return (yield from choice.judged(settings.k))
    best, enough, too_many, most = None, 0, settings.most + 1, settings.most
    while too_many - enough > 1:  # at first twice as many every time, then halves of what is between
        count = min(2 * enough or 1, most) if too_many > most else (enough + too_many) // 2
        growth = yield from choice.judged(count)
        assert isinstance(growth, Growth)
        if choice.is_free(growth):
            best, enough = growth, count
        else:
            too_many = count
    return best


@dataclass(frozen=True, eq=False)
class _Choice:
    """The units that go, for any number of them."""

    settings: Removal
    objective: Objective
    m: Moments
    _orders: dict[float, Tensor] = field(default_factory=dict)

    def order(self, ridge: float) -> Tensor:
        """Units, those first that go first."""
        used = ridge if self.settings.score == "refit" else 0.0
        if used not in self._orders:
            self._orders[used] = self._ordered(used)
        return self._orders[used]

    def _ordered(self, ridge: float) -> Tensor:
        settings = self.settings
        if settings.score == "magnitude":
            return torch.argsort(_magnitudes(settings.axis), stable=True)
        if settings.score == "taylor":
            return torch.argsort(self.m[settings.effects, settings.effects][:-1, -1].cpu(), stable=True)
        readers = [
            Reader(
                self.m[settings.features(c)[0], settings.features(c)[0]],
                settings.weights(c),
                settings.columns(c),
                settings.outputs(c),
                c.trainable,
            )
            for c in settings.consumers
        ]
        return least_needed(readers, settings.k or settings.most, ridge, self.m.resolution)

    def lost(self, units: Tensor) -> dict[str, Lost]:
        """What each consumer loses with some units."""
        settings, found = self.settings, {}
        for consumer in settings.consumers:
            weights = settings.weights(consumer)
            weights[torch.isin(settings.outputs(consumer), units)] = 0
            gone = settings.columns(consumer)[units].flatten()
            refits = settings.score == "refit" and consumer.trainable
            found[consumer.name] = Lost(self.m, *settings.features(consumer), weights, gone, refits)
        return found

    def judged(self, count: int) -> Steps:
        """So many units, and what is predicted of the loss without them."""
        ridge = self._ridge(count)
        lost = self.lost(self.order(ridge)[:count])
        growth, energy = self._growth(self.order(ridge)[:count], lost, ridge)
        rise = self._measured(growth) - self.m.loss
        if self.m.folds == 1:
            return replace(growth, heldout_gain=-rise, heldout_error=0.0, samples=self.m.samples)
        scores = SampleScores(
            [FitScore(each.reads, None, each.goal, each.folds(ridge)) for each in lost.values()]  # type: ignore[arg-type]
        )
        moments = yield Needs([(scores, scores)])
        return _predicted(growth, moments.sums[scores, scores].sum(0), rise, energy)

    def _ridge(self, count: int) -> float:
        """The ridge with which least is lost on samples that were left out: more of it, as long as that helps."""
        best, least = self.settings.ridges[0], float("inf")
        for ridge in self.settings.ridges if len(self.settings.ridges) > 1 else ():  # each chooses units of its own
            lost = sum(each.held_out(ridge) for each in self.lost(self.order(ridge)[:count]).values())
            if lost >= least:
                break
            best, least = ridge, lost
        return best

    def _measured(self, growth: Growth) -> float:
        """The loss without the units, on the measured samples."""
        try:
            return growth.loss(1.0)
        except NotFiniteError as error:
            raise GrowthError(f"without {-growth.neurons} of its units {first_line(error)}") from error

    def _growth(self, units: Tensor, lost: dict[str, Lost], ridge: float) -> tuple[Growth, float]:
        """The growth, and what is lost of what consumers write."""
        settings, refits = self.settings, {name: each.refit(ridge) for name, each in lost.items()}
        moves = {name: refit.change for name, refit in refits.items() if lost[name].is_refitted}
        change = removal(settings.dag, settings.axis, units, moves)
        gains, energy = {name: refit.gain for name, refit in refits.items()}, sum(r.energy for r in refits.values())
        named = f"units {', '.join(map(str, sorted(units.tolist())))} of {settings.axis.width} go"
        notes = (named, *(refit.note for refit in refits.values() if refit.note), *unmeasured(settings.axis))
        growth = Growth(
            settings.operator,
            settings.axis.name,
            -len(units),
            sum(gains.values()),
            gains,
            cost_of(settings.dag, change),
            drop=2 * sum(gains.values()) - energy,
            invariant=settings.score != "magnitude",  # weights have units
            notes=tuple(dict.fromkeys((*notes, *change.final.notes))),
            change=change,
            dag=settings.dag,
            objective=self.objective,
        )
        return growth, energy

    def is_free(self, growth: Growth) -> bool:
        """Whether its predicted rise cannot be told from none: it is at most its standard error."""
        assert growth.heldout_gain is not None
        assert growth.heldout_error is not None
        rounding = max(SAME, ROUNDED * self.m.resolution) * abs(self.m.loss)
        return -growth.heldout_gain <= growth.heldout_error + rounding


def _predicted(growth: Growth, sums: Tensor, rise: float, energy: float) -> Growth:
    """With the predicted rise: of each sample ``-c + kappa s``, to second order in what fits on the other folds change.

    The curvature kappa is that of the loss along the change that is fitted on all samples, whose rise is measured. So
    where fits on the other folds are the same, the prediction is what was measured. Where the loss curves downwards,
    what is beyond the slope is taken as it was measured.

    Args:
        growth: without a prediction.
        sums: over samples, of products of ``(2 c - s, c, 1) [3, 3]`` with ``c = <v, change b>``, ``s = |change b|^2``.
        rise: of the loss, as it was measured.
        energy: the mean of s for the change that is fitted on all samples.

    Returns:
        It with minus the predicted rise as its held-out gain.
    """
    beyond = rise + growth.gain
    kappa = beyond / energy if beyond > 0 and energy > 0 else 0.0
    of_scores = sums.new_tensor([[kappa, 1 - 2 * kappa, -min(beyond, 0.0)], [0, 1, 0], [0, 0, 1]])
    verdict = Verdict.of(of_scores @ sums @ of_scores.T)
    return replace(growth, heldout_gain=verdict.gain, heldout_error=verdict.error, samples=verdict.samples)


def _magnitudes(axis: Axis) -> Tensor:
    """The sum of the magnitudes of what producers read for each unit ``[U]``. Source: Li et al. 2017."""
    total = torch.zeros(axis.width, dtype=torch.float64)
    for producer in axis.producers:
        weight = producer.matrix(producer.parameters()["weight"].detach()).flatten(1).abs().sum(1).double().cpu()
        total += weight[axis.layout.rows[producer.name]].sum(1)
    return total
