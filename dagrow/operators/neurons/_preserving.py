"""Initialisations that leave the function as it is at every amplitude: zero fan-out, GradMax, Net2Net copies."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from dagrow.graph import Axis, Dag
from dagrow.operators._base import Needs, Steps
from dagrow.operators.neurons._places import places
from dagrow.solvers import Moments, Pair, leading_svd
from dagrow.statistics import Objective, OutputGoal
from dagrow.surgery import Draft, Growth, cost_of


def add_zero(operator: Any, dag: Dag, axis: Axis, k: int, seed: int, objective: Objective) -> Steps:
    """Random fan-in with the norm of the old rows, zero fan-out."""
    yield Needs(_checked(dag, axis))
    plan, generator = dag.widening(axis, k), _generator(axis, seed)
    draft = Draft(dag, [(axis, plan)])
    for edge in axis.producers:
        rows = axis.layout.rows[edge.name]
        weight = edge.matrix(edge.parameters()["weight"].detach())
        noise = torch.randn(k, rows.shape[1], weight[0].numel(), generator=generator)
        noise *= weight[rows.flatten()].norm() / rows.numel() ** 0.5 / weight[0].numel() ** 0.5
        draft.fan_in(edge, plan.rows[edge.name], noise)
    return _growth(operator, axis, k, draft, objective)


def add_gradmax(operator: Any, dag: Dag, axis: Axis, k: int, seed: int, objective: Objective) -> Steps:
    """Zero fan-in and the fan-out ``omega`` with the largest gradient at the fan-in: the leading right singular
    vectors of ``E p v^T``, scaled to the norm of the consumers' old columns. Source: Evci et al. 2022.

    Nothing where the fan-in's gradient is not a linear function of what the producers read."""
    place = places(dag, axis)[0]
    consumers = place.linear()
    blocks = [place.regression(c, "none", False, OutputGoal(c.name)) for c in consumers]
    pairs = [(block.features, block.goal) for block in blocks]
    moments: Moments = yield Needs([*_checked(dag, axis), *pairs])
    if not consumers:
        return None
    sides = [moments[pair] for pair in pairs]
    omega = _leading(torch.cat(sides, 1), k, _generator(axis, seed))
    plan = dag.widening(axis, k)
    draft = Draft(dag, [(axis, plan)])
    for consumer, side in zip(consumers, sides, strict=True):
        weight = consumer.matrix(consumer.parameters()["weight"].detach())
        part, omega = omega[: side.shape[1]], omega[side.shape[1] :]
        part = rearrange(part, "(e o) k -> o k e", o=len(weight)) * weight.norm() / weight[0].numel() ** 0.5
        draft.fan_out(consumer, plan.columns[consumer.name], part)
    return _growth(operator, axis, k, draft, objective)


def _leading(covariance: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Leading directions in the goals' space, random ones beyond its rank ``[o, k]``."""
    _, _, omega = leading_svd(covariance, k)
    missing = torch.randn(len(omega), k - omega.shape[1], generator=generator, dtype=omega.dtype)
    return torch.cat([omega, missing / missing.norm(dim=0)], 1)


def add_copies(operator: Any, dag: Dag, axis: Axis, k: int, seed: int, objective: Objective) -> Steps:
    """Net2Net: a new unit copies the fan-in of an old one, and both share its fan-out."""
    yield Needs(_checked(dag, axis))
    plan, generator, width = dag.widening(axis, k), _generator(axis, seed), axis.width
    draft = Draft(dag, [(axis, plan)])
    if k <= width:
        copied = torch.randperm(width, generator=generator)[:k]
    else:
        copied = torch.randint(width, (k,), generator=generator)
    sharing = 1 + torch.bincount(copied, minlength=width).double()
    layout = axis.layout
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
        less = torch.zeros_like(weight)
        kept = (1 - 1 / sharing).view(-1, *[1] * (weight.ndim - 1)).to(weight)
        less[:, columns.flatten()] = -(weight[:, columns] * kept).flatten(1, 2)
        draft.move(consumer, torch.cat([less.flatten(1), weight.new_zeros(len(weight), consumer.bias)], 1))
    return _growth(operator, axis, k, draft, objective)


def _checked(dag: Dag, axis: Axis) -> list[Pair]:
    """One small moment, so that there is a pass that checks the batches and the loss."""
    near = (*axis.consumers, *axis.producers, *reversed(dag.edges))
    goals = [OutputGoal(edge.name) for edge in near if not edge.shared]
    return [(goal, goal) for goal in goals[:1]]


def _generator(axis: Axis, seed: int) -> torch.Generator:
    """Another one each time that the axis has another width."""
    return torch.Generator().manual_seed(seed + 7919 * axis.width)


def _growth(operator: Any, axis: Axis, k: int, draft: Draft, objective: Objective) -> Growth:
    change = draft.change()
    return Growth(
        operator,
        axis.name,
        k,
        0.0,
        {consumer.name: 0.0 for consumer in axis.consumers},
        cost_of(draft.dag, change),
        preserving=True,
        invariant=False,
        change=change,
        dag=draft.dag,
        objective=objective,
    )
