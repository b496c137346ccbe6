"""Sums from images against sums from rows."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from images import Plan, built, kernels, plans

from dagrow import AddNeurons
from dagrow.errors import NoPlaceError
from dagrow.statistics import Feature, Objective, PulledGoal, ResidualGoal, measure
from dagrow.statistics._calls import joined_calls
from dagrow.statistics._captures import Batch
from dagrow.statistics._features import LayerInputs
from dagrow.statistics._measure import CaptureHooks
from dagrow.statistics._products import _from_rows, product

DRAWN = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
SPACES = st.sampled_from((1, 2, 3)).flatmap(lambda space: st.tuples(kernels(space), kernels(space)))


def captured(case, dag, pairs) -> Batch:
    """What the first batch leaves at the layers of all features."""
    objective = Objective(dag.model.eval(), case.batches, case.loss)
    objective.probe()
    with CaptureHooks(dag, {f for pair in pairs for f in pair}, {}, {}) as watch:
        batch, n = next(iter(objective))
        (captures,) = joined_calls(watch.captures(objective.value(batch), -1.0))
    return Batch(captures, n, seen=1, folds=3)


def resumed(steps, moments=None):
    """What comes next, unless that needs a preview; None at the end."""
    try:
        needs = steps.send(moments)
    except StopIteration:
        return None
    return needs if needs.preview is None else None


def norm(feature: Feature, batch: Batch) -> float:
    """Of its rows; of a difference, that of the larger side; of patches at least that of the image: sums over all of it
    are taken, and what no patch reads is taken off."""
    if isinstance(feature, ResidualGoal):
        return max(norm(feature.goal, batch), float((feature.goal.rows(batch) - feature.rows(batch)).norm()))
    if isinstance(feature, PulledGoal):
        return norm(feature.goal, batch) * feature.position_map.index.shape[1]
    rows = float(feature.rows(batch).norm())
    return max(rows, float(feature.inputs(batch).norm())) if isinstance(feature, LayerInputs) else rows


@pytest.mark.parametrize("solver", ["svd", "als"])
@given(plan=plans())
@DRAWN
def test_sums_from_images_are_those_from_rows(plan: Plan, solver: str) -> None:
    case = built(plan)
    assume(case is not None)
    dag = case.copy()
    try:
        waiting = AddNeurons(k=2, solver=solver, folds=3).candidates(dag)
    except NoPlaceError:  # nothing grows, or by no closed form
        assume(False)
    objective = Objective(dag.model, case.batches, case.loss)
    waiting = [(steps, next(steps)) for steps in (c.steps(objective) for c in waiting)]
    while waiting:
        pairs = [pair for _, needs in waiting for pair in needs.pairs]
        batch = captured(case, dag, pairs)
        for x, y in set(pairs):
            expected = _from_rows(x, y, batch)
            if isinstance(x, LayerInputs):
                basis = torch.randn(x.rows(batch).shape[1], 2).double()
                torch.testing.assert_close(x.projected(batch, basis), x.rows(batch) @ basis, rtol=1e-10, atol=1e-10)
            size = norm(x, batch) * norm(y, batch)
            torch.testing.assert_close(product(x, y, batch), expected, rtol=0, atol=1e-11 * size)
        m = measure(dag, objective, pairs, folds=3)
        waiting = [(steps, needs) for steps, _ in waiting if (needs := resumed(steps, m)) is not None]
