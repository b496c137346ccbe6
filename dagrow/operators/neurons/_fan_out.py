"""The fan-out of new neurons, fitted to what they really compute.

Directions are put into a preview of the network with zero fan-out, so that nothing changes, and the new features
``h = sigma(alpha^T p)`` are measured where the consumers read them. The regression of ``v_perp`` on ``h`` is exact for
any activation, norm layer or gate on the way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dagrow.axes import Rider, WideningPlan
from dagrow.graph import Edge
from dagrow.layers import RiderRule
from dagrow.operators._base import Needs, Preview, Steps, scored
from dagrow.operators.neurons._axis_moments import AxisMoments, reads_of
from dagrow.operators.neurons._places import Place, unmeasured
from dagrow.operators.neurons._proposal import Proposal
from dagrow.operators.neurons._settings import NeuronSettings
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
from dagrow.statistics import FitScore, NormInputs, Objective, OutputGoal, SampleScores, fan_out_score
from dagrow.surgery import Draft, Growth, cost_of

ROUNDED = 1000  #: times what moments tell apart: the size of a channel that may be rounding


def fit_fan_out(settings: NeuronSettings, proposal: Proposal | None, objective: Objective) -> Steps:
    """Neurons along directions: a preview, fan-outs, scores, and the growth.

    Args:
        settings: where, and how the fan-out is fitted.
        proposal: the directions, scaled; None if there are none.
        objective: the loss that the growth is measured on.

    Yields:
        What the new neurons compute in a preview, and, where there are folds, what fits on the other folds explain.

    Returns:
        The growth, or None if there is nothing to add.
    """
    if proposal is None:
        return None
    plan = settings.place.dag.widening(settings.place.axis, 2 * proposal.alpha.shape[1])
    units = _Units(settings, proposal, plan)
    preview = Preview(settings.place.axis, plan, settings.place.split(units.alpha), shared=True)
    # in train mode a wider model may draw other numbers, as dropout does
    known = proposal.known if objective.mode == "eval" else None
    moments = yield Needs([pair for pair in units.pairs() if known is None or pair not in known], preview)
    if known is not None and (known.mark is None or known.mark != moments.mark):
        known, moments = None, (yield Needs(units.pairs(), preview))  # the loader gives other batches in every pass
    fitted = _fitted(units, objective, settings.by_axis(settings.place.axis, moments, known))
    if fitted is None:
        return None
    growth, scores, z = fitted
    if not scores:
        return growth
    return (yield from scored(growth, SampleScores(scores), z, settings.k is None, preview))


@dataclass(frozen=True, eq=False)
class _Units:
    """Both signs of each direction, as units of a preview in which the axis is wider."""

    settings: NeuronSettings
    proposal: Proposal
    plan: WideningPlan

    @property
    def alpha(self) -> Tensor:
        """Their fan-in ``[p, 2k]``."""
        return torch.cat([self.proposal.alpha, -self.proposal.alpha], 1)

    def regressions(self) -> list[Regression]:
        """The new features at every consumer."""
        place = self.settings.place
        compensation: Compensation = "all" if self.settings.joint else "constant"
        return [
            Regression(
                place.new_channels(c.name),
                reads_of(c),
                OutputGoal(c.name),
                compensation,
                self.settings.project,
                constant=c.bias,
            )
            for c in place.axis.consumers
        ]

    def with_ridge(self, split: FoldSplit, block: Regression) -> Regression:
        """With the ridge of what is read already as it was chosen for the directions, if it was."""
        assert isinstance(block.goal, OutputGoal)
        ridge = self.proposal.ridges.get(block.goal.edge)
        return with_cross_validated_ridge(split, block) if ridge is None else replace(block, ridge=ridge)

    def slots(self, consumer: Edge) -> int:
        """Features of a new unit at a consumer: its channels there, times their taps."""
        return self.plan.columns[consumer.name].new.shape[1] * consumer.rule.taps(consumer.module)

    def norms(self) -> list[NormInputs]:
        """What norms on the way carry of the new channels."""
        place = self.settings.place
        return [NormInputs(rider.name, place.writers) for rider, _ in _norms(place)]

    def pairs(self) -> list[Pair]:
        explained, norms = self.proposal.explained, self.norms()
        pairs = [pair for block in self.regressions() for pair in block.pairs()] + [(norm, norm) for norm in norms]
        return pairs if explained is None else [*pairs, (explained, explained)]

    def kept(self, m: MomentView, blocks: Sequence[Regression]) -> Tensor:
        """Which of the 2k measured units are kept, as sums ``[2k, k]``: one sign of each direction, or the pair.

        Args:
            m: moments of what is fitted.
            blocks: the new features at every consumer, with the ridges of the fit.

        Returns:
            The sums.
        """
        k = self.proposal.alpha.shape[1]
        if self.settings.paired:
            return torch.cat([torch.eye(k), -torch.eye(k)]).double()
        explained = torch.zeros(2 * k, dtype=torch.float64)
        for consumer, block in zip(self.settings.place.axis.consumers, blocks, strict=True):
            explained += marginal_drops(m, block, self.slots(consumer), self.settings.ridges[0]).to(explained)
        negative = explained[k:] > explained[:k] * (1 + 1e-9)
        return torch.cat([torch.diag((~negative).double()), torch.diag(negative.double())])

    def kept_of(self, consumer: Edge, choice: Tensor, blocks: Sequence[Regression]) -> Callable[[MomentView], Tensor]:
        """From moments of the other folds the units that they would have kept, as measured features at a consumer."""

        def kept(train: MomentView) -> Tensor:
            if (
                self.proposal.explained
            ):  # directions are scored by themselves, and units only by what they are fitted to
                return choice
            return _per_slot(self.kept(train, blocks), self.slots(consumer))

        return kept


def _fitted(
    units: _Units, objective: Objective, own: AxisMoments
) -> tuple[Growth, Sequence[FitScore], float | None] | None:
    """The growth, its scores if there are folds, and z of the directions if it is known; None if that is chance."""
    m = own.m
    explained, z = units.proposal.explained, None
    if explained is not None:
        z = Verdict.of(m.sums[explained, explained].sum(0)).z
        if units.settings.k is None and upper_tail(z) > LEVEL:
            return None
    blocks = [units.with_ridge(own.split, block) for block in units.regressions()]
    kept = units.kept(own.view(units.settings.ridges[0], cancels=units.settings.joint), blocks)
    offered = [kept] if units.proposal.other is None else kept.chunk(2, 1)
    fitted = [(choice, *_fan_outs(units, own, blocks, choice)) for choice in offered]
    choice, fits, scores = max(fitted, key=lambda fit: sum(f.drop for f in fit[1].values()))
    return _growth(units, m, objective, choice, fits), scores, z


def _fan_outs(
    units: _Units, own: AxisMoments, blocks: Sequence[Regression], kept: Tensor
) -> tuple[dict[str, Fit], list[FitScore]]:
    """Each consumer's fan-out for some units, and its scores if there are folds."""
    fits, scores, ridges = {}, [], units.settings.ridges
    for consumer, block in zip(units.settings.place.axis.consumers, blocks, strict=True):
        choice, ridge = _per_slot(kept, units.slots(consumer)), ridges[0]
        if own.m.folds > 1:
            ridge = validate_fan_out(own.split, block, choice, ridges).ridge
            scores.append(fan_out_score(own.split, block, units.kept_of(consumer, choice, blocks), ridge))
        fits[consumer.name] = fan_out(own.view(ridge, cancels=units.settings.joint), block, choice, ridge)
    return fits, scores


def _growth(units: _Units, m: Moments, objective: Objective, choice: Tensor, fits: Mapping[str, Fit]) -> Growth:
    """The units that are kept, drafted and described."""
    settings, proposal, axis = units.settings, units.proposal, units.settings.place.axis
    kept, dag = _measured(choice), settings.place.dag
    generator = torch.Generator().manual_seed(settings.seed + axis.width)
    plan = dag.widening(axis, len(kept))
    draft = Draft(dag, [(axis, plan)])
    for edge, fan_in in settings.place.split(units.alpha[:, kept]).items():
        draft.fan_in(dag.edge(edge), plan.rows[edge], fan_in)
    for consumer in axis.consumers:
        fit = fits[consumer.name]
        omega = fit.weights.to(choice).view(len(fit.weights), -1, units.slots(consumer))
        omega = torch.einsum("u k, o k e -> o u e", choice[kept], omega)
        omega = omega if settings.fan == "fitted" else _random_like(omega, generator)
        draft.fan_out(consumer, plan.columns[consumer.name], omega)
        if fit.compensation is not None and settings.fan == "fitted":
            draft.move(consumer, fit.compensation)
    _calibrate(draft, m, settings.place, plan, kept, objective.mode)
    gains, drop = {name: fit.gain for name, fit in fits.items()}, sum(fit.drop for fit in fits.values())
    change = draft.change()
    notes = (*_of_rounding(m, units, kept), *unmeasured(dag.axis(axis.name)), *change.notes)
    if settings.fan == "random":
        gains, drop = _downhill(draft, _slopes(draft, m, units, kept)), 0.0
    return Growth(
        settings.operator,
        axis.name,
        len(kept),
        sum(gains.values()),
        gains,
        cost_of(dag, change),
        drop=drop,
        singular_values=proposal.values,
        invariant=proposal.invariant and settings.fan == "fitted",
        notes=tuple(dict.fromkeys((*proposal.notes, *(fit.note for fit in fits.values() if fit.note), *notes))),
        change=change,
        dag=dag,
        objective=objective,
    )


def _of_rounding(m: Moments, units: _Units, kept: Tensor) -> tuple[str, ...]:
    """A note where new channels, of size 1 where they are written, arrive as what rounding left of them."""
    tiny = []
    for consumer in units.settings.place.axis.consumers:
        feature = units.settings.place.new_channels(consumer.name)
        size = (m.product(feature, feature).diagonal() / m.positions[feature]).clamp_min(0).sqrt()
        size = size[_columns(kept, units.slots(consumer)).to(size.device)]
        if bool(((size > 0) & (size < ROUNDED * m.resolution)).any()):
            tiny.append(consumer.name)
    if not tiny:
        return ()
    return (f"{', '.join(tiny)}: what arrives of new neurons is of the size of rounding, of which no gain holds",)


def _random_like(omega: Tensor, generator: torch.Generator) -> Tensor:
    """A random fan-out of the same norm."""
    noise = torch.randn(omega.shape, generator=generator, dtype=omega.dtype)
    return noise * omega.norm() / noise.norm()


def _downhill(draft: Draft, gains: dict[str, float]) -> dict[str, float]:
    """Random fan-outs that would raise the loss get the other sign."""
    if sum(gains.values()) >= 0:
        return gains
    for slope in draft.slope.values():
        slope.neg_()
    return {name: -gain for name, gain in gains.items()}


def _slopes(draft: Draft, m: Moments, units: _Units, kept: Tensor) -> dict[str, float]:
    """``tr(X R)`` of random fan-outs."""
    gains = {}
    for consumer in units.settings.place.axis.consumers:
        index_map, written = draft.read[consumer.name], draft.written.get(consumer.name)
        omega = consumer.matrix(draft.slope[consumer.path("weight")])[:, index_map.new.flatten()].flatten(1)
        omega = omega if written is None else omega[written.old]
        columns = _columns(kept, units.slots(consumer))
        goals = m[units.settings.place.new_channels(consumer.name), OutputGoal(consumer.name)]
        gains[consumer.name] = float((omega.T * goals[columns]).sum())
    return gains


def _calibrate(draft: Draft, m: Moments, place: Place, plan: WideningPlan, kept: Tensor, mode: str) -> None:
    """New channels pass a BatchNorm unchanged in train mode as well: they get their own mean and variance.

    Where features were measured in train mode, downstream of the norm of the batch, its affine part stays as it was
    then.
    """
    for rider, rule in _norms(place):
        inputs, index_map = NormInputs(rider.name, place.writers), plan.entries[rider]
        square = m[inputs, inputs] / m.positions[inputs]
        mean = square[-1, :-1]
        variance = (square.diagonal()[:-1] - mean**2).clamp_min(0)
        columns = _columns(kept, index_map.new.shape[1])
        assert rider.module is not None
        entries = rule.calibrated(rider.module, mean[columns], variance[columns])
        if mode == "train":
            entries = {name: entry for name, entry in entries.items() if name in dict(rider.module.named_buffers())}
        draft.rider(rider, index_map, entries)


def _norms(place: Place) -> list[tuple[Rider, RiderRule]]:
    """The norms on the way that new channels are calibrated for."""
    unit = torch.tensor(1.0)
    return [
        (rider, rider.rule)
        for rider in place.axis.riders
        if rider.rule is not None and rider.module is not None and rider.rule.calibrated(rider.module, unit, unit)
    ]


def _measured(choice: Tensor) -> Tensor:
    """The measured units that stay, the best direction first."""
    measured = torch.nonzero(choice.abs().sum(1) > 0).flatten()
    k = len(choice) // 2
    return measured[torch.argsort((measured % k) * 2 + measured // k)]


def _columns(units: Tensor, slots: int) -> Tensor:
    """The measured features of some units, unit by unit and slot by slot."""
    return (units[:, None] * slots + torch.arange(slots)).flatten()


def _per_slot(units: Tensor, slots: int) -> Tensor:
    """Choices of units as choices of measured features."""
    return torch.kron(units, torch.eye(slots, dtype=units.dtype))
