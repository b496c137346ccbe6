"""Widening an axis, in two stages: propose fan-in directions, then fit the fan-out to what they really compute.

The first stage is linear theory: directions ``alpha`` of what the producers read that explain most of what the
consumers' goals leave over. The second puts the directions into a preview of the network with zero fan-out, so
that nothing changes, and measures the new features ``h = sigma(alpha^T p)`` where the consumers read them. The
regression of ``v_perp`` on ``h`` is exact for any activation, norm layer or gate on the way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dagrow.axes import Rider, WideningPlan
from dagrow.graph import Axis, Edge
from dagrow.layers import RiderRule
from dagrow.operators._base import Candidate, Judged, Stage
from dagrow.operators.neurons._places import Place
from dagrow.solvers import (
    LEVEL,
    Compensation,
    Fit,
    FoldSplit,
    Moments,
    MomentView,
    Pair,
    Regression,
    Verdict,
    fan_out,
    marginal_drops,
    upper_tail,
    validate_fan_out,
    with_cross_validated_ridge,
)
from dagrow.statistics import FitScore, NewChannels, NormInputs, Objective, OutputGoal, SampleScores, fan_out_score
from dagrow.surgery import Draft, Growth, cost_of


@dataclass(frozen=True, eq=False)
class Proposal:
    """Directions from the first stage.

    Attributes:
        alpha: ``[p, k]``.
        values: singular values, if linear theory chose the directions.
        invariant: whether permuted units or other units of measurement lead to the same directions.
        other: as many directions, that are taken where they explain more ``[p, k]``.
        explained: what directions that were fitted on the other folds explain of each sample; without it, directions
            count as independent of the goals.
    """

    alpha: Tensor
    values: Tensor | None = None
    notes: tuple[str, ...] = ()
    invariant: bool = True
    other: Tensor | None = None
    explained: SampleScores | None = None


@dataclass(frozen=True, eq=False)
class WidenCandidate(Candidate):
    """New channels at one place, along directions that need no more than ``E p p^T``.

    Attributes:
        propose: ``propose(moments, place) -> Proposal`` with the fan-in directions, or None if there are none.
        needs: the moments that ``propose`` reads.
        fan: whether fan-outs are fitted ("fitted") or random with the norm of the fitted ones ("random").
        paired: adds (alpha, omega) and (-alpha, -omega) instead of choosing a sign.
        exact: whether the number of neurons was asked for, so that chance is not asked about.
    """

    operator: Any
    place: Place
    propose: Callable[[Moments, Place], Proposal | None]
    needs: tuple[Pair, ...] = ()
    compensation: Compensation = "constant"
    project: bool = True
    ridges: tuple[float, ...] = (0.0,)
    fan: Literal["fitted", "random"] = "fitted"
    paired: bool = False
    exact: bool = False
    seed: int = 0

    @property
    def tests(self) -> int:
        """Chance is asked about only if the number of neurons is open."""
        return 0 if self.exact else 1

    def pairs(self) -> list[Pair]:
        return [(self.place.measured, self.place.measured), *self.needs]

    def solve(self, moments: Moments, objective: Objective) -> "FanOutStage | None":
        return self.stage(self.propose(moments, self.place), moments)

    def stage(self, proposal: Proposal | None, moments: Moments) -> "FanOutStage | None":
        """The directions in a preview, scaled to pre-activations of mean square 1 per position."""
        if proposal is None or not proposal.alpha.shape[1]:
            return None
        both = [proposal.alpha] if proposal.other is None else [proposal.alpha, proposal.other]
        alpha = self.place.scaled(torch.cat(both, 1), moments)
        widening = self.place.dag.widening(self.place.axis, 2 * alpha.shape[1])
        return FanOutStage(self, replace(proposal, alpha=alpha), self.place.axis, widening)


@dataclass(frozen=True, eq=False)
class FanOutStage(Stage):
    """Both signs of each direction, in a preview of the network with zero fan-out."""

    origin: WidenCandidate
    proposal: Proposal
    axis: Axis
    widening: WideningPlan

    @property
    def place(self) -> Place:
        return self.origin.place

    def fill(self, draft: Draft) -> None:
        alpha = self.proposal.alpha
        for edge, fan_in in self.place.split(torch.cat([alpha, -alpha], 1)).items():
            draft.fan_in(self.place.dag.edge(edge), self.widening.rows[edge], fan_in)

    def blocks(self) -> list[Regression]:
        """The new features at every consumer."""
        return [
            Regression(
                NewChannels(c.name),
                self.place.reads(c),
                OutputGoal(c.name),
                self.origin.compensation,
                self.origin.project,
                constant=c.bias,
            )
            for c in self.axis.consumers
        ]

    def slots(self, consumer: Edge) -> int:
        """Features of a new unit at a consumer: its channels there, times their taps."""
        return self.widening.columns[consumer.name].new.shape[1] * consumer.rule.taps(consumer.module)

    def _norms(self) -> list[NormInputs]:
        """Where statistics of new channels are needed."""
        return [NormInputs(rider.name) for rider, _ in _keeping_statistics(self.place)]

    def pairs(self) -> list[Pair]:
        explained = self.proposal.explained
        found = [pair for block in self.blocks() for pair in block.pairs()] + [(norm, norm) for norm in self._norms()]
        return found if explained is None else [*found, (explained, explained)]

    def solve(self, moments: Moments, objective: Objective) -> "Growth | JudgedNeurons | None":
        explained, z = self.proposal.explained, None
        if explained is not None:
            z = Verdict.of(moments.sums[explained, explained].sum(0)).z
            if not self.origin.exact and upper_tail(z) > LEVEL:
                return None
        units, split = self._units(moments), moments.split()
        blocks = [with_cross_validated_ridge(split, block) for block in self.blocks()]
        offered = [units] if self.proposal.other is None else units.chunk(2, 1)
        fitted = [(some, *self._fitted(moments, split, blocks, some)) for some in offered]
        units, fits, scores = max(fitted, key=lambda found: sum(fit.drop for fit in found[1].values()))
        growth = self._growth(moments, objective, units, fits)
        if moments.folds == 1:
            return growth
        judged = Judged(growth, SampleScores(scores), z, not self.origin.exact)
        return JudgedNeurons(self, judged, self.axis, self.widening)

    def _fitted(
        self, m: Moments, split: FoldSplit, blocks: Sequence[Regression], units: Tensor
    ) -> tuple[dict[str, Fit], list[FitScore]]:
        """Each consumer's fan-out for some units, and its scores if there are folds."""
        fits, scores = {}, []
        for consumer, block in zip(self.axis.consumers, blocks, strict=True):
            choice, ridge = _per_slot(units, self.slots(consumer)), self.origin.ridges[0]
            if m.folds > 1:
                ridge = validate_fan_out(split, block, choice, self.origin.ridges).ridge
                scores.append(fan_out_score(split, block, self._basis(consumer, block, choice), ridge))
            fits[consumer.name] = fan_out(m, block, choice, ridge)
        return fits, scores

    def _basis(self, consumer: Edge, block: Regression, choice: Tensor) -> Callable[[MomentView], Tensor]:
        """From moments of the other folds the units that they would have kept.

        Where directions are scored by themselves, those that are kept are scored only by what they are fitted to.
        """

        def kept(train: MomentView) -> Tensor:
            return choice if self.proposal.explained else _per_slot(self._units(train), self.slots(consumer))

        return kept

    def _units(self, m: MomentView) -> Tensor:
        """Which of the 2k measured units are kept, as sums ``[2k, k]``: one sign of each direction, or the pair."""
        k = self.proposal.alpha.shape[1]
        if self.origin.paired:
            return torch.cat([torch.eye(k), -torch.eye(k)]).double()
        explained = torch.zeros(2 * k, dtype=torch.float64)
        for consumer, block in zip(self.axis.consumers, self.blocks(), strict=True):
            explained += marginal_drops(m, block, self.slots(consumer), self.origin.ridges[0])
        negative = explained[k:] > explained[:k] * (1 + 1e-9)
        return torch.cat([torch.diag((~negative).double()), torch.diag(negative.double())])

    def _growth(self, m: Moments, objective: Objective, units: Tensor, fits: Mapping[str, Fit]) -> Growth:
        kept, dag = _kept(units), self.place.dag
        generator = torch.Generator().manual_seed(self.origin.seed + self.axis.width)
        widening = dag.widening(self.axis, len(kept))
        draft = Draft(dag, [(self.axis, widening)])
        alpha = torch.cat([self.proposal.alpha, -self.proposal.alpha], 1)[:, kept]
        for edge, fan_in in self.place.split(alpha).items():
            draft.fan_in(dag.edge(edge), widening.rows[edge], fan_in)
        for consumer in self.axis.consumers:
            fit = fits[consumer.name]
            omega = fit.weights.view(len(fit.weights), -1, self.slots(consumer))
            omega = torch.einsum("u k, o k e -> o u e", units[kept], omega)
            draft.fan_out(consumer, widening.columns[consumer.name], self._fan(omega, generator))
            if fit.compensation is not None and self.origin.fan == "fitted":
                draft.move(consumer, fit.compensation)
        self._calibrate(draft, m, widening, kept, objective.mode)
        return self._described(draft, m, objective, kept, fits)

    def _fan(self, omega: Tensor, generator: torch.Generator) -> Tensor:
        if self.origin.fan == "fitted":
            return omega
        noise = torch.randn(omega.shape, generator=generator, dtype=omega.dtype)
        return noise * omega.norm() / noise.norm()

    def _calibrate(self, draft: Draft, m: Moments, widening: WideningPlan, kept: Tensor, mode: str) -> None:
        """NewChannels channels pass a BatchNorm unchanged in train mode as well: they get their own mean and variance.

        Where features were measured in train mode, downstream of the norm of the batch, its affine part stays as it was
        then.
        """
        for rider, rule in _keeping_statistics(self.place):
            carried = NormInputs(rider.name)
            landing = widening.entries[rider]
            square = m[carried, carried] / m.positions[carried]
            mean = square[-1, :-1]
            variance = (square.diagonal()[:-1] - mean**2).clamp_min(0)
            columns = _columns(kept, landing.new.shape[1])
            assert rider.module is not None
            entries = rule.calibrated(rider.module, mean[columns], variance[columns])
            if mode == "train":
                entries = {name: entry for name, entry in entries.items() if name in dict(rider.module.named_buffers())}
            draft.rider(rider, landing, entries)

    def _described(
        self, draft: Draft, m: Moments, objective: Objective, kept: Tensor, fits: Mapping[str, Fit]
    ) -> Growth:
        change, proposal = draft.change(), self.proposal
        gains = {name: fit.gain for name, fit in fits.items()}
        drop = sum(fit.drop for fit in fits.values())
        if self.origin.fan == "random":
            gains, drop = self._uphill_turned(draft, self._measured_slopes(draft, m, kept)), 0.0
        notes = (*proposal.notes, *(fit.note for fit in fits.values() if fit.note))
        return Growth(
            self.origin.operator,
            self.axis.name,
            len(kept),
            sum(gains.values()),
            gains,
            cost_of(self.place.dag, change),
            drop=drop,
            singular_values=proposal.values,
            invariant=proposal.invariant and self.origin.fan == "fitted",
            notes=tuple(dict.fromkeys(notes)),
            change=change,
            dag=self.place.dag,
            objective=objective,
        )

    @staticmethod
    def _uphill_turned(draft: Draft, gains: dict[str, float]) -> dict[str, float]:
        """Random fan-outs that would raise the loss get the other sign."""
        if sum(gains.values()) >= 0:
            return gains
        for slope in draft.slope.values():
            slope.neg_()
        return {name: -gain for name, gain in gains.items()}

    def _measured_slopes(self, draft: Draft, m: Moments, kept: Tensor) -> dict[str, float]:
        """``tr(X R)`` of random fan-outs."""
        gains = {}
        for consumer in self.axis.consumers:
            landing, written = draft.read[consumer.name], draft.written.get(consumer.name)
            omega = consumer.matrix(draft.slope[consumer.path("weight")])[:, landing.new.flatten()].flatten(1)
            omega = omega if written is None else omega[written.old]
            columns = _columns(kept, self.slots(consumer))
            gains[consumer.name] = float(
                (omega.T * m[NewChannels(consumer.name), OutputGoal(consumer.name)][columns]).sum()
            )
        return gains


@dataclass(frozen=True, eq=False)
class JudgedNeurons(Stage):
    """Fitted neurons in the same preview again, to see what fan-outs from the other folds explain of each sample."""

    origin: FanOutStage
    judged: Judged
    axis: Axis
    widening: WideningPlan

    def fill(self, draft: Draft) -> None:
        self.origin.fill(draft)

    def pairs(self) -> list[Pair]:
        return self.judged.pairs()

    def solve(self, moments: Moments, objective: Objective) -> Growth:
        return self.judged.solve(moments, objective)


def _keeping_statistics(place: Place) -> list[tuple[Rider, RiderRule]]:
    """The norms on the way that new channels are calibrated for."""
    unit = torch.tensor(1.0)
    return [
        (rider, rider.rule)
        for rider in place.axis.riders
        if rider.rule is not None and rider.module is not None and rider.rule.calibrated(rider.module, unit, unit)
    ]


def _kept(units: Tensor) -> Tensor:
    """The measured units that stay, the best direction first."""
    measured = torch.nonzero(units.abs().sum(1) > 0).flatten()
    k = len(units) // 2
    return measured[torch.argsort((measured % k) * 2 + measured // k)]


def _columns(units: Tensor, slots: int) -> Tensor:
    """The measured features of some units, unit by unit and slot by slot."""
    return (units[:, None] * slots + torch.arange(slots)).flatten()


def _per_slot(units: Tensor, slots: int) -> Tensor:
    """Choices of units as choices of measured features."""
    return torch.kron(units, torch.eye(slots, dtype=units.dtype))
