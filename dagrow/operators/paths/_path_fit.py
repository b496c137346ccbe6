"""The best last layer of a new path, in closed form.

What a new layer reads is regressed on what a pre-activation still wants. With ``p`` what the new layer reads, ``b``
what the pre-activation reads already and ``P' = P - C S^-1 C^T``, the best weights are ``X = N^T P'^-1``; the old
weights move by ``-X C S^-1`` along, so that only what is new in ``p`` acts. A path of rank K has the leading K singular
directions of ``P'^-1/2 N``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dagrow.operators._base import Needs, Operator, Steps, scored
from dagrow.operators.paths._links import PathSite
from dagrow.solvers import (
    Fit,
    Moments,
    MomentView,
    Regression,
    fan_out,
    validate_fan_out,
    with_cross_validated_ridge,
)
from dagrow.statistics import Feature, Objective, SampleScores, fan_out_score
from dagrow.surgery import Draft, Growth, cost_of

#: what is fitted, from moments and a ridge: combinations ``A [p, q]`` of the features, or the indices of some ``[q]``
Basis = Callable[[MomentView, Regression, float], Tensor]
#: the layers of a path with ``a += X A^T p``, from A and ``X [o, q]``; all but the last as they will be
LayerBuilder = Callable[[PathSite, Tensor, Tensor], Mapping[str, nn.Module]]


@dataclass(frozen=True, eq=False)
class PathForm:
    """What a new path consists of.

    Attributes:
        operator: what proposes it.
        basis: which combinations of features the last layer reads.
        layers: builds the layers, the last with its weights at gamma = 1.
        ridges: to choose from.
        neurons: new hidden units.
        kind: what the new module is called, with a number; by where it leads if None.
        invariant: see :class:`dagrow.Growth`.
    """

    operator: Operator
    basis: Basis
    layers: LayerBuilder
    ridges: tuple[float, ...]
    neurons: int = 0
    kind: str | None = None
    invariant: bool = True


def everything(m: MomentView, block: Regression, ridge: float) -> Tensor:
    """All features, each by itself.

    Args:
        m: moments of the features.
        block: the regression at the target.
        ridge: not needed.

    Returns:
        Their indices ``[p]``.
    """
    p = m[block.features, block.features]
    return torch.arange(len(p), device=p.device)


def fit_path(site: PathSite, features: Feature, form: PathForm, objective: Objective) -> Steps:
    """A path whose last layer is fitted.

    Args:
        site: where it leads from and to.
        features: what the fit is on: what the last layer reads, the constant last if it has a bias.
        form: what it consists of.
        objective: the loss that the growth is measured on.

    Yields:
        What the last layer is fitted to, and, where there are folds, what fits on the other folds explain.

    Returns:
        The growth, or None if there is nothing that the layer could read.
    """
    block = site.regression(features)
    fitted = _fitted(block, form, (yield Needs(block.pairs())))
    if fitted is None:
        return None
    basis, fit, scores = fitted
    growth = _growth(site, form, basis, fit, objective)
    return growth if scores is None else (yield from scored(growth, scores))


def _fitted(block: Regression, form: PathForm, m: Moments) -> tuple[Tensor, Fit, SampleScores | None] | None:
    """The combinations of features, the last layer's weights on them, and their scores if there are folds."""
    if not float(m[block.features, block.features].diagonal().sum()):
        return None
    split = m.split()
    block = with_cross_validated_ridge(split, block)
    basis = form.basis(m, block, form.ridges[0])
    if not basis.shape[-1]:
        return None
    if m.folds == 1:
        return basis, fan_out(m, block, basis, form.ridges[0]), None
    ridge = validate_fan_out(split, block, basis, form.ridges).ridge
    scores = fan_out_score(split, block, lambda train: form.basis(train, block, form.ridges[0]), ridge)
    return basis, fan_out(m, block, basis, ridge), SampleScores([scores])


def _growth(site: PathSite, form: PathForm, basis: Tensor, fit: Fit, objective: Objective) -> Growth:
    draft, layers = Draft(site.dag), form.layers(site, basis, fit.weights)
    draft.add_path(site.new_path(site.module_name(form.kind), layers), [*layers.values()][-1])
    if fit.compensation is not None:
        site.compensate(draft, fit.compensation)
    change = draft.change()
    return Growth(
        form.operator,
        site.place,
        form.neurons,
        fit.gain,
        {site.target_name: fit.gain},
        cost_of(site.dag, change),
        drop=fit.drop,
        invariant=form.invariant,
        notes=(*([fit.note] if fit.note else []), *change.notes),
        change=change,
        dag=site.dag,
        objective=objective,
    )
