"""Initialisations that leave the function as it is at every amplitude: zero fan-out, GradMax, Net2Net copies."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from dagrow.axes import WideningPlan
from dagrow.graph import Axis, Dag
from dagrow.operators._base import Candidate
from dagrow.operators.neurons._places import Place, places
from dagrow.solvers import Moments, Pair, Regression, leading_svd
from dagrow.statistics import Objective, OutputGoal
from dagrow.surgery import Draft, Growth, cost_of


@dataclass(frozen=True)
class PreservingCandidate(Candidate):
    """k new units on an axis that change nothing by themselves."""

    operator: Any
    dag: Dag
    axis: Axis
    k: int
    seed: int

    @property
    def tests(self) -> int:
        return 0

    def pairs(self) -> list[Pair]:
        """One small moment, so that there is a pass that checks the batches and the loss."""
        near = (*self.axis.consumers, *self.axis.producers, *reversed(self.dag.edges))
        goals = [OutputGoal(edge.name) for edge in near if not edge.shared]
        return [(goal, goal) for goal in goals[:1]]

    def solve(self, moments: Moments, objective: Objective) -> Growth | None:
        widening = self.dag.widening(self.axis, self.k)
        draft = Draft(self.dag, [(self.axis, widening)])
        self.fill(draft, widening, moments)
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
            change=change,
            dag=self.dag,
            objective=objective,
        )

    @abstractmethod
    def fill(self, draft: Draft, widening: WideningPlan, m: Moments) -> None:
        """Writes fan-in and fan-out."""

    def generator(self) -> torch.Generator:
        """Another one each time that the axis has another width."""
        return torch.Generator().manual_seed(self.seed + 7919 * self.axis.width)


class ZeroCandidate(PreservingCandidate):
    """Random fan-in with the norm of the old rows, zero fan-out."""

    def fill(self, draft: Draft, widening: WideningPlan, m: Moments) -> None:
        generator = self.generator()
        for edge in self.axis.producers:
            rows = self.axis.layout.rows[edge.name]
            weight = edge.matrix(edge.parameters()["weight"].detach())
            noise = torch.randn(self.k, rows.shape[1], weight[0].numel(), generator=generator)
            noise *= weight[rows.flatten()].norm() / rows.numel() ** 0.5 / weight[0].numel() ** 0.5
            draft.fan_in(edge, widening.rows[edge.name], noise)


class GradMaxCandidate(PreservingCandidate):
    """Zero fan-in and the fan-out ``omega`` with the largest gradient at the fan-in: the leading right singular
    vectors of ``E p v^T``, scaled to the norm of the consumers' old columns. Source: Evci et al. 2022."""

    def pairs(self) -> list[Pair]:
        return [*super().pairs(), *((block.features, block.goal) for block in self._blocks.values())]

    @cached_property
    def _blocks(self) -> dict[str, Regression]:
        place = self._place
        return {c.name: place.block(c, "none", False, OutputGoal(c.name)) for c in place.linear()}

    @cached_property
    def _place(self) -> Place:
        return places(self.dag, self.axis)[0]

    def solve(self, moments: Moments, objective: Objective) -> Growth | None:
        """None where the fan-in's gradient is not a linear function of what the producers read."""
        return super().solve(moments, objective) if self._place.linear() else None

    def fill(self, draft: Draft, widening: WideningPlan, m: Moments) -> None:
        sides = [m[block.features, block.goal] for block in self._blocks.values()]
        omega = self._orthonormal(torch.cat(sides, 1))
        for consumer, side in zip(self._place.linear(), sides, strict=True):
            weight = consumer.matrix(consumer.parameters()["weight"].detach())
            part, omega = omega[: side.shape[1]], omega[side.shape[1] :]
            part = rearrange(part, "(e o) k -> o k e", o=len(weight)) * weight.norm() / weight[0].numel() ** 0.5
            draft.fan_out(consumer, widening.columns[consumer.name], part)

    def _orthonormal(self, covariance: Tensor) -> Tensor:
        """Leading directions in the goals' space, random ones beyond its rank ``[o, k]``."""
        _, _, omega = leading_svd(covariance, self.k)
        missing = torch.randn(len(omega), self.k - omega.shape[1], generator=self.generator(), dtype=omega.dtype)
        return torch.cat([omega, missing / missing.norm(dim=0)], 1)


class CopyCandidate(PreservingCandidate):
    """Net2Net: a new unit copies the fan-in of an old one, and both share its fan-out."""

    def fill(self, draft: Draft, widening: WideningPlan, m: Moments) -> None:
        generator, width = self.generator(), self.axis.width
        if self.k <= width:
            copied = torch.randperm(width, generator=generator)[: self.k]
        else:
            copied = torch.randint(width, (self.k,), generator=generator)
        sharing = 1 + torch.bincount(copied, minlength=width).double()
        layout = self.axis.layout
        for edge in self.axis.producers:
            rows = layout.rows[edge.name][copied]
            parameters = edge.parameters()
            fan_in = edge.matrix(parameters["weight"].detach())[rows].flatten(2)
            if "bias" in parameters:
                fan_in = torch.cat([fan_in, parameters["bias"].detach()[rows][..., None]], -1)
            draft.fan_in(edge, widening.rows[edge.name], fan_in)
        for rider in self.axis.riders:
            draft.copy_rider(rider, widening.entries[rider], layout.entries[rider], copied)
        for consumer in self.axis.consumers:
            columns, weight = layout.columns[consumer.name], consumer.matrix(consumer.parameters()["weight"].detach())
            share = (1 / sharing[copied]).view(-1, *[1] * (weight.ndim - 1)).to(weight)
            draft.fan_out(consumer, widening.columns[consumer.name], weight[:, columns[copied]] * share)
            less = torch.zeros_like(weight)
            kept = (1 - 1 / sharing).view(-1, *[1] * (weight.ndim - 1)).to(weight)
            less[:, columns.flatten()] = -(weight[:, columns] * kept).flatten(1, 2)
            draft.move(consumer, torch.cat([less.flatten(1), weight.new_zeros(len(weight), consumer.bias)], 1))
