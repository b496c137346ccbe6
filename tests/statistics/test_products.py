"""Sums from images against sums from rows."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from images import Plan, built, kernels, plans

from dagrow import AddNeurons
from dagrow.errors import NoPlaceError
from dagrow.statistics import Feature, Objective, PulledGoal, ResidualGoal, measure
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


def captured(case, candidates) -> Batch:
    """What the first batch leaves at the layers of all candidates."""
    dag = candidates[0].place.dag if hasattr(candidates[0], "place") else candidates[0].origin.place.dag
    objective = Objective(dag.model.eval(), case.batches, case.loss)
    objective.probe()
    with CaptureHooks(dag, {f for c in candidates for pair in c.pairs() for f in pair}, {}, {}) as watch:
        batch, n = next(iter(objective))
        captures = watch.captures(objective.value(batch), -1.0)
    return Batch(captures, n, seen=1, folds=3)


def norm(feature: Feature, batch: Batch) -> float:
    """Of its rows; of a difference, that of the larger side."""
    if isinstance(feature, ResidualGoal):
        return max(norm(feature.goal, batch), float((feature.goal.rows(batch) - feature.rows(batch)).norm()))
    if isinstance(feature, PulledGoal):
        return norm(feature.goal, batch) * feature.position_map.index.shape[1]
    return float(feature.rows(batch).norm())


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
    while waiting:
        batch = captured(case, waiting)
        for x, y in {pair for c in waiting for pair in c.pairs()}:
            expected = _from_rows(x, y, batch)
            if isinstance(x, LayerInputs):
                basis = torch.randn(x.rows(batch).shape[1], 2).double()
                torch.testing.assert_close(x.projected(batch, basis), x.rows(batch) @ basis, rtol=1e-10, atol=1e-10)
            size = norm(x, batch) * norm(y, batch)
            torch.testing.assert_close(product(x, y, batch), expected, rtol=0, atol=1e-11 * size)
        m = measure(
            dag, Objective(dag.model, case.batches, case.loss), [p for c in waiting for p in c.pairs()], folds=3
        )
        solved = [c.solve(m, None) for c in waiting]
        waiting = [c for c in solved if c is not None and not hasattr(c, "widening")]
