"""Widening an axis, in two stages: propose fan-in directions, then fit the fan-out to what they really compute.

The first stage is linear theory: directions ``alpha`` of what the producers read that explain most of what the
consumers' goals leave over. The second puts the directions into a preview of the network with zero fan-out, so
that nothing changes, and measures the new features ``h = sigma(alpha^T p)`` where the consumers read them. The
regression of ``v_perp`` on ``h`` is exact for any activation, norm layer or gate on the way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from dagrow.axes import Widening
from dagrow.dag import Axis, Dag, Edge
from dagrow.draft import Draft
from dagrow.features import Carried, Feature, Gathered, Goal, New, Reads, Stacked
from dagrow.growth import Growth, cost_of
from dagrow.moments import Moments, Pair
from dagrow.objective import Objective
from dagrow.operators.base import Candidate, Stage
from dagrow.positions import Arrival, arrival
from dagrow.solve import Block, Compensation, explained_alone, fan_out
from dagrow.validate import HeldOut, settled, validate_fan_out

__all__ = ["Place", "Proposal", "WidenCandidate", "places"]


@dataclass(frozen=True, eq=False)
class Place:
    """An axis and the producers that write its new channels: all that arrive everywhere in the same way.

    Attributes:
        producers: each with the part of ``p`` that it reads.
        arrivals: consumer -> how the new channels arrive, or None where linear theory does not reach.
    """

    dag: Dag
    axis: Axis
    producers: tuple[Edge, ...]
    arrivals: Mapping[str, Arrival | None]

    @cached_property
    def features(self) -> Feature:
        """``p``: what the producers read, one constant for all."""
        parts = [
            Reads(edge.name, edge.bias and not any(e.bias for e in self.producers[:i]))
            for i, edge in enumerate(self.producers)
        ]
        return parts[0] if len(parts) == 1 else Stacked(tuple(parts))

    @property
    def channels(self) -> int:
        """Channels of a unit at a producer."""
        return self.axis.layout.rows[self.producers[0].name].shape[1]

    def arriving(self, consumer: Edge) -> tuple[Feature, int]:
        """``p`` as it arrives at a consumer, and in how many slots."""
        found = self.arrivals[consumer.name]
        if found is None or found.aligned:
            return self.features, 1
        return self._gathered[consumer.name], found.index.shape[1]

    @cached_property
    def _gathered(self) -> dict[str, Feature]:
        return {
            name: Gathered(self.features, found.index, found.channels, found.positions)
            for name, found in self.arrivals.items() if found is not None
        }  # fmt: skip

    def reads(self, consumer: Edge) -> Reads | None:
        """What the consumer's own weights can use: nothing if they are frozen."""
        return Reads(consumer.name, consumer.bias) if consumer.trainable else None

    def linear(self) -> list[Edge]:
        """The consumers that linear theory reaches."""
        return [c for c in self.axis.consumers if self.arrivals[c.name] is not None]

    def blocks(self, compensation: Compensation, project: bool) -> list[Block]:
        """First stage: what the producers read, at every consumer that it reaches."""
        return [Block(*self.arriving(c), self.reads(c), Goal(c.name), compensation, project) for c in self.linear()]

    def split(self, alpha: Tensor) -> dict[str, Tensor]:
        """``alpha [p, k]`` as fan-in of each producer ``[k, channels, i]``, constants last."""
        fans, start = {}, 0
        alpha = alpha.view(self.channels, -1, alpha.shape[1])
        for index, edge in enumerate(self.producers):
            bias = edge.bias and not any(e.bias for e in self.producers[:index])
            size = edge.rule.widths(edge.module)[0] + bias
            fans[edge.name] = alpha[:, start : start + size].permute(2, 0, 1)
            start += size
        return fans


def places(dag: Dag, axis: Axis) -> list[Place]:
    """The choices of producers for a new channel of an axis.

    On a residual stream producers write at different depths: a new channel is written by one of them, and the
    others write zero. Producers whose output arrives everywhere in the same way write it together.
    """
    grouped: dict[tuple, list[tuple[Edge, dict[str, Arrival | None]]]] = {}
    for producer in axis.producers:
        arrivals = {consumer.name: arrival(dag, axis, producer, consumer) for consumer in axis.consumers}
        aligned = all(a is None or a.aligned for a in arrivals.values())
        key = tuple(None if a is None else a.positions for a in arrivals.values()) if aligned else (producer.name,)
        grouped.setdefault(key, []).append((producer, arrivals))
    return [Place(dag, axis, tuple(p for p, _ in group), group[0][1]) for group in grouped.values()]


@dataclass(frozen=True, eq=False)
class Proposal:
    """Directions from the first stage.

    Attributes:
        alpha: ``[p, k]``.
        values: singular values, if linear theory chose the directions.
        held: the cross-validation that chose ridge and rank.
        invariant: whether permuted units or other units of measurement lead to the same directions.
    """

    alpha: Tensor
    values: Tensor | None = None
    held: HeldOut | None = None
    notes: tuple[str, ...] = ()
    invariant: bool = True


@dataclass(frozen=True, eq=False)
class WidenCandidate(Candidate):
    """New channels at one place.

    Attributes:
        propose: ``propose(moments, place) -> Proposal`` with the fan-in directions, or None if there are none.
        needs: the moments that ``propose`` reads besides ``E p p^T``.
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

    def pairs(self) -> list[Pair]:
        return [(self.place.features, self.place.features), *self.needs]

    def solve(self, moments: Moments, objective: Objective) -> "FanOutStage | None":
        proposal = self.propose(moments, self.place)
        if proposal is None or not proposal.alpha.shape[1]:
            return None
        alpha = _unit_scale(proposal.alpha, moments, self.place)
        axis = self.place.axis
        widening = self.place.dag.widening(axis, 2 * alpha.shape[1])
        return FanOutStage(self, replace(proposal, alpha=alpha), axis, widening)


def _unit_scale(alpha: Tensor, m: Moments, place: Place) -> Tensor:
    """Directions scaled to pre-activations of mean square 1 per position."""
    p = m[place.features, place.features]
    if place.channels > 1:
        p = torch.block_diag(*[p] * place.channels) / place.channels
    square = (alpha * (p @ alpha)).sum(0) / m.positions[place.features]
    return alpha * torch.where(square > 0, square, 1).rsqrt()


@dataclass(frozen=True, eq=False)
class FanOutStage(Stage):
    """Both signs of each direction, in a preview of the network with zero fan-out."""

    origin: WidenCandidate
    proposal: Proposal
    axis: Axis
    widening: Widening

    @property
    def place(self) -> Place:
        return self.origin.place

    def fill(self, draft: Draft) -> None:
        alpha = self.proposal.alpha
        for edge, fan_in in self.place.split(torch.cat([alpha, -alpha], 1)).items():
            draft.fan_in(self.place.dag.edge(edge), self.widening.rows[edge], fan_in)

    def blocks(self) -> list[Block]:
        """The new features at every consumer."""
        return [
            Block(New(c.name), 1, self.place.reads(c), Goal(c.name), self.origin.compensation, self.origin.project)
            for c in self.axis.consumers
        ]

    def _norms(self) -> list[Carried]:
        return [Carried(rider.name) for rider in self.axis.riders if rider.rule is not None]

    def pairs(self) -> list[Pair]:
        return [pair for block in self.blocks() for pair in block.pairs()] + [(norm, norm) for norm in self._norms()]

    def solve(self, moments: Moments, objective: Objective) -> Growth | None:
        units, split = self._units(moments), moments.split()
        fits, held = {}, []
        for consumer, block in zip(self.axis.consumers, self.blocks(), strict=True):
            choice = _per_slot(units, self.widening.columns[consumer.name].new.shape[1])
            block, ridge = settled(split, block), self.origin.ridges[0]
            if moments.folds > 1:
                held.append(validate_fan_out(split, block, choice, self.origin.ridges))
                ridge = held[-1].ridge
            fits[consumer.name] = fan_out(moments, block, choice, ridge)
        return self._growth(moments, objective, units, fits, held)

    def _units(self, m: Moments) -> Tensor:
        """Which of the 2k measured units are kept, as sums ``[2k, k]``: one sign of each direction, or the pair."""
        k = self.proposal.alpha.shape[1]
        if self.origin.paired:
            return torch.cat([torch.eye(k), -torch.eye(k)]).double()
        explained = torch.zeros(2 * k, dtype=torch.float64)
        for consumer, block in zip(self.axis.consumers, self.blocks(), strict=True):
            slots = self.widening.columns[consumer.name].new.shape[1]
            explained += explained_alone(m, block, slots, self.origin.ridges[0])
        negative = explained[k:] > explained[:k] * (1 + 1e-9)
        return torch.cat([torch.diag((~negative).double()), torch.diag(negative.double())])

    def _growth(
        self, m: Moments, objective: Objective, units: Tensor, fits: Mapping[str, Any], held: Sequence[HeldOut]
    ) -> Growth:
        kept, dag = _kept(units), self.place.dag
        generator = torch.Generator().manual_seed(self.origin.seed + self.axis.width)
        widening = dag.widening(self.axis, len(kept))
        draft = Draft(dag, [(self.axis, widening)])
        alpha = torch.cat([self.proposal.alpha, -self.proposal.alpha], 1)[:, kept]
        for edge, fan_in in self.place.split(alpha).items():
            draft.fan_in(dag.edge(edge), widening.rows[edge], fan_in)
        for consumer in self.axis.consumers:
            fit, slots = fits[consumer.name], widening.columns[consumer.name].new.shape[1]
            omega = fit.weights.view(len(fit.weights), -1, slots)
            omega = torch.einsum("u k, o k e -> o u e", units[kept], omega)
            draft.fan_out(consumer, widening.columns[consumer.name], self._fan(omega, generator))
            if fit.compensation is not None and self.origin.fan == "fitted":
                draft.move(consumer, fit.compensation)
        self._calibrate(draft, m, widening, kept, objective.mode)
        return self._described(draft, m, objective, kept, fits, held)

    def _fan(self, omega: Tensor, generator: torch.Generator) -> Tensor:
        if self.origin.fan == "fitted":
            return omega
        noise = torch.randn(omega.shape, generator=generator, dtype=omega.dtype)
        return noise * omega.norm() / noise.norm()

    def _calibrate(self, draft: Draft, m: Moments, widening: Widening, kept: Tensor, mode: str) -> None:
        """New channels pass a BatchNorm unchanged in train mode as well: they get their own mean and variance.

        Where features were measured in train mode, downstream of the norm of the batch, its affine part stays as it was
        then.
        """
        for rider in self.axis.riders:
            if rider.rule is None:
                continue
            carried = Carried(rider.name)
            landing = widening.entries[rider]
            square = m[carried, carried] / m.positions[carried]
            mean = square[-1, :-1]
            variance = (square.diagonal()[:-1] - mean**2).clamp_min(0)
            columns = _columns(kept, landing.new.shape[1])
            module = self.place.dag.model.get_submodule(rider.name)
            entries = rider.rule.calibrated(module, mean[columns], variance[columns])
            if mode == "train":
                entries = {name: entry for name, entry in entries.items() if name in dict(module.named_buffers())}
            draft.rider(rider.name, landing, entries)

    def _described(
        self,
        draft: Draft,
        m: Moments,
        objective: Objective,
        kept: Tensor,
        fits: Mapping[str, Any],
        held: Sequence[HeldOut],
    ) -> Growth:
        change, proposal = draft.change(), self.proposal
        first = proposal.held
        gains = {name: fit.gain for name, fit in fits.items()}
        drop = sum(fit.drop for fit in fits.values())
        if self.origin.fan == "random":
            gains, drop = self._uphill_turned(draft, self._measured_slopes(draft, m, kept)), 0.0
        gain = sum(h.gain for h in held)
        notes = (*proposal.notes, *(fit.note for fit in fits.values() if fit.note))
        return Growth(
            self.origin.operator, self.axis.name, len(kept), sum(gains.values()), gains,
            cost_of(self.place.dag, change),
            gain if held else None, sum(h.error**2 for h in held) ** 0.5 if held else None, drop, proposal.values,
            significant=self.origin.exact or ((first is None or first.significant) and gain > 0),
            invariant=proposal.invariant and self.origin.fan == "fitted", notes=tuple(dict.fromkeys(notes)),
            change=change, dag=self.place.dag, objective=objective,
        )  # fmt: skip

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
            omega = draft.slope[f"{consumer.name}.weight"][:, landing.new.flatten()]
            omega = omega if written is None else omega[written.old]
            columns = _columns(kept, landing.new.shape[1])
            gains[consumer.name] = float((omega.T * m[New(consumer.name), Goal(consumer.name)][columns]).sum())
        return gains


def _kept(units: Tensor) -> Tensor:
    """The measured units that stay, the best direction first."""
    measured = torch.nonzero(units.abs().sum(1) > 0).flatten()
    k = units.shape[1]
    return measured[torch.argsort((measured % k) * 2 + measured // k)]


def _columns(units: Tensor, slots: int) -> Tensor:
    """The measured features of some units, unit by unit and slot by slot."""
    return (units[:, None] * slots + torch.arange(slots)).flatten()


def _per_slot(units: Tensor, slots: int) -> Tensor:
    """Choices of units as choices of measured features."""
    return torch.kron(units, torch.eye(slots, dtype=units.dtype))
