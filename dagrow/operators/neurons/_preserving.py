"""Initialisations that leave the function as it is at every amplitude: zero fan-out, GradMax, Net2Net copies."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from dagrow.axes import WideningPlan
from dagrow.graph import Axis, Dag
from dagrow.operators._base import Needs, Operator, Steps
from dagrow.operators.neurons._places import places, unmeasured
from dagrow.solvers import Moments, Pair, leading_svd
from dagrow.statistics import Norms, Objective, OutputGoal
from dagrow.surgery import Draft, Growth, cost_of


@dataclass(frozen=True, eq=False)
class NewUnits:
    """Units that change nothing by themselves.

    Attributes:
        operator: what proposes them.
        dag: where the axis is.
        axis: what they are new on.
        k: how many.
        seed: of random draws.
    """

    operator: Operator
    dag: Dag
    axis: Axis
    k: int
    seed: int

    def checked(self) -> list[Pair]:
        """One small moment, so that there is a pass that checks the batches and the loss."""
        edges = (*self.axis.consumers, *self.axis.producers, *reversed(self.dag.edges))
        goals = [Norms(OutputGoal(edge.name)) for edge in edges if not edge.shared]
        return [(goal, goal) for goal in goals[:1]]

    def draft(self) -> tuple[Draft, WideningPlan]:
        """The axis wider by them, and what changes where."""
        plan = self.dag.widening(self.axis, self.k)
        return Draft(self.dag, [(self.axis, plan)]), plan

    def generator(self) -> torch.Generator:
        """Another one each time that the axis has another width."""
        return torch.Generator().manual_seed(self.seed + 7919 * self.axis.width)

    def growth(self, draft: Draft, objective: Objective) -> Growth:
        """What was drafted, without a gain."""
        change = draft.change()
        return Growth(
            self.operator,
            self.axis.name,
            self.k,
            0.0,
            {consumer.name: 0.0 for consumer in self.axis.consumers},
            cost_of(self.dag, change),
            preserving=True,
            invariant=False,
            notes=(*unmeasured(self.axis), *change.notes),
            change=change,
            dag=self.dag,
            objective=objective,
        )


def add_zero(units: NewUnits, objective: Objective) -> Steps:
    """Random fan-in with the norm of the old rows, zero fan-out.

    Args:
        units: where, and how many.
        objective: the loss that the growth is measured on.

    Yields:
        One moment, which checks the batches.

    Returns:
        The growth.
    """
    yield Needs(units.checked())
    (draft, plan), axis, generator = units.draft(), units.axis, units.generator()
    for edge in axis.producers:
        rows = axis.layout.rows[edge.name]
        weight = edge.matrix(edge.parameters()["weight"].detach())
        noise = torch.randn(units.k, rows.shape[1], weight[0].numel(), generator=generator)
        noise *= weight[rows.flatten()].norm() / rows.numel() ** 0.5 / weight[0].numel() ** 0.5
        draft.fan_in(edge, plan.rows[edge.name], noise)
    return units.growth(draft, objective)


def add_gradmax(units: NewUnits, objective: Objective) -> Steps:
    """GradMax: zero fan-in, and the fan-out ``omega`` with the largest gradient at the fan-in.

    That is the leading right singular vectors of ``E p v^T``, scaled to the norm of the consumers' old columns.
    Source: Evci et al. 2022.

    Args:
        units: where, and how many.
        objective: the loss that the growth is measured on.

    Yields:
        ``E p v^T`` of the consumers.

    Returns:
        The growth, or None where the fan-in's gradient is no linear function of what the producers read.
    """
    place = places(units.dag, units.axis)[0]
    consumers = place.linear()
    blocks = [place.regression(c, "none", False, OutputGoal(c.name)) for c in consumers]
    pairs = [(block.features, block.goal) for block in blocks]
    moments: Moments = yield Needs([*units.checked(), *pairs])
    if not consumers:
        return None
    sides = [moments[pair] for pair in pairs]
    omega = _leading(torch.cat(sides, 1), units.k, units.generator())
    draft, plan = units.draft()
    for consumer, side in zip(consumers, sides, strict=True):
        weight = consumer.matrix(consumer.parameters()["weight"].detach())
        part, omega = omega[: side.shape[1]], omega[side.shape[1] :]
        part = rearrange(part, "(e o) k -> o k e", o=len(weight)) * weight.norm() / weight[0].numel() ** 0.5
        draft.fan_out(consumer, plan.columns[consumer.name], part)
    return units.growth(draft, objective)


def _leading(covariance: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Leading directions in the goals' space, random ones beyond its rank ``[o, k]``."""
    _, _, omega = leading_svd(covariance, k)
    missing = torch.randn(len(omega), k - omega.shape[1], generator=generator, dtype=omega.dtype)
    return torch.cat([omega, missing / missing.norm(dim=0)], 1)


def add_copies(units: NewUnits, objective: Objective) -> Steps:
    """Net2Net: a new unit copies the fan-in of an old one, and both share its fan-out.

    Args:
        units: where, and how many.
        objective: the loss that the growth is measured on.

    Yields:
        One moment, which checks the batches.

    Returns:
        The growth.
    """
    yield Needs(units.checked())
    (draft, plan), axis, generator = units.draft(), units.axis, units.generator()
    k, width, layout = units.k, axis.width, axis.layout
    if k <= width:
        copied = torch.randperm(width, generator=generator)[:k]
    else:
        copied = torch.randint(width, (k,), generator=generator)
    sharing = 1 + torch.bincount(copied, minlength=width).double()
    for edge in axis.producers:
        rows, parameters = layout.rows[edge.name][copied], edge.parameters()
        fan_in = edge.matrix(parameters["weight"].detach())[rows].flatten(2)
        if "bias" in parameters:
            fan_in = torch.cat([fan_in, parameters["bias"].detach()[rows][..., None]], -1)
        draft.fan_in(edge, plan.rows[edge.name], fan_in)
    for rider in axis.riders:
        draft.copy_rider(rider, plan.entries[rider], layout.entries[rider], copied)
    for consumer in axis.consumers:
        columns, weight = layout.columns[consumer.name], consumer.matrix(consumer.parameters()["weight"].detach())
        share = (1 / sharing[copied]).view(-1, *[1] * (weight.ndim - 1)).to(weight)
        draft.fan_out(consumer, plan.columns[consumer.name], weight[:, columns[copied]] * share)
        delta = torch.zeros_like(weight)
        kept = (1 - 1 / sharing).view(-1, *[1] * (weight.ndim - 1)).to(weight)
        delta[:, columns.flatten()] = -(weight[:, columns] * kept).flatten(1, 2)
        draft.move(consumer, torch.cat([delta.flatten(1), weight.new_zeros(len(weight), consumer.bias)], 1))
    return units.growth(draft, objective)
