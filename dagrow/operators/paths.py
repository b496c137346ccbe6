"""New paths in closed form: what a new layer reads is regressed on what a pre-activation still wants.

With ``p`` what the new layer reads, ``b`` what the pre-activation reads already and ``P' = P - C S^-1 C^T``, the best
weights are ``X = N^T P'^-1``; the old weights move by ``-X C S^-1`` along, so that only what is new in ``p`` acts. A
path of rank K has the leading K singular directions of ``P'^-1/2 N``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dagrow.draft import Draft
from dagrow.features import Feature
from dagrow.growth import Growth, cost_of
from dagrow.moments import Means, Moments, Pair
from dagrow.objective import Objective
from dagrow.operators.base import Candidate, Judged
from dagrow.operators.links import Link
from dagrow.scores import Scores
from dagrow.solve import Block, Fit, fan_out
from dagrow.validate import agreement, settled, validate_fan_out

__all__ = ["Basis", "Layout", "PathCandidate", "everything"]

#: what is fitted, from moments and a ridge: combinations ``A [p, q]`` of the features, or the indices of some ``[q]``
Basis = Callable[[Means, Block, float], Tensor]
#: the layers of a path with ``a += X A^T p``, from A and ``X [o, q]``; all but the last as they will be
Layout = Callable[[Link, Tensor, Tensor], Mapping[str, nn.Module]]


def everything(m: Means, block: Block, ridge: float) -> Tensor:
    """All features, each by itself."""
    p = m[block.features, block.features]
    return torch.arange(len(p), device=p.device)


@dataclass(frozen=True, eq=False)
class PathCandidate(Candidate):
    """A path whose last layer is fitted.

    Attributes:
        features: what the fit is on: what the last layer reads, the constant last if it has a bias.
        basis: which combinations of them.
        layout: builds the layers, the last with its weights at gamma = 1.
        neurons: new hidden units.
        kind: what the new module is called, with a number; by where it leads if None.
        ridges: to choose from.
        drawn: those of the features that do not depend on the goals, unless all are such.
    """

    operator: Any
    link: Link
    features: Feature
    basis: Basis
    layout: Layout
    neurons: int = 0
    kind: str | None = None
    ridges: tuple[float, ...] = (0.0,)
    invariant: bool = True
    drawn: Feature | None = None

    @property
    def block(self) -> Block:
        return self.link.block(self.features)

    def pairs(self) -> list[Pair]:
        return self.block.pairs()

    def solve(self, moments: Moments, objective: Objective) -> "Growth | Candidate | None":
        if not float(moments[self.features, self.features].diagonal().sum()):
            return None
        split = moments.split()
        block = settled(split, self.block)
        basis = self.basis(moments, block, self.ridges[0])
        if not basis.shape[-1]:
            return None
        if moments.folds == 1:
            return self._growth(basis, fan_out(moments, block, basis, self.ridges[0]), objective)
        held = validate_fan_out(split, block, basis, self.ridges)
        growth = self._growth(basis, fan_out(moments, block, basis, held.ridge), objective)
        scores = agreement(split, block, lambda train: self.basis(train, block, self.ridges[0]), held.ridge)
        return Judged(growth, Scores([scores]))

    def _growth(self, basis: Tensor, fit: Fit, objective: Objective) -> Growth:
        link, draft = self.link, Draft(self.link.dag)
        layers = self.layout(link, basis, fit.weights)
        draft.branch(link.branch(link.named(self.kind), layers), [*layers.values()][-1])
        if fit.compensation is not None:
            link.compensate(draft, fit.compensation)
        change = draft.change()
        return Growth(
            self.operator, link.place, self.neurons, fit.gain, {link.fed: fit.gain}, cost_of(link.dag, change),
            drop=fit.drop, invariant=self.invariant, notes=(fit.note,) if fit.note else (),
            regressions=lambda: [link.block(self.drawn or self.features)],
            change=change, dag=link.dag, objective=objective,
        )  # fmt: skip
