"""Convolutions: their sums against rows, their theory against slow truths, and what they grow into."""

import copy

import pytest
import reference as truth
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from images import Kernel, Plan, built, kernels, plans
from torch import Tensor, nn
from zoo import case_of

import dagrow
from dagrow import AddNeurons
from dagrow.features import Batch
from dagrow.grow import _growths
from dagrow.layers import rule_for
from dagrow.measure import _Watch
from dagrow.objective import Objective
from dagrow.products import _from_rows, product

DRAWN = settings(
    max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
SPACES = st.sampled_from((1, 2, 3)).flatmap(lambda space: st.tuples(kernels(space), kernels(space)))


def image(space: int, channels: int, n: int = 3) -> Tensor:
    return torch.randn(n, channels, *(5, 4, 3)[:space], dtype=torch.float64)


@given(kernel=SPACES)
@DRAWN
def test_patches_are_those_of_loops(kernel: tuple[Kernel, Kernel]) -> None:
    layer, x = kernel[0].layer(2, 3).double(), image(len(kernel[0].size), 2)
    try:
        written = layer(x)
    except RuntimeError:
        assume(False)
    rule = rule_for(layer, dagrow.layers.DEFAULT_RULES)
    found = rule.features(layer, x)
    torch.testing.assert_close(found, torch.cat([truth.patches(layer, x[n : n + 1]) for n in range(3)]))
    o, i = rule.dims["weight"]
    matrix = layer.weight.movedim((o, i), (0, 1)).flatten(1)
    again = found @ matrix.T + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(again, rule.rows(layer, written))


def captured(case, candidates) -> Batch:
    """What the first batch leaves at the layers of all candidates."""
    dag = candidates[0].place.dag if hasattr(candidates[0], "place") else candidates[0].origin.place.dag
    objective = Objective(dag.model.eval(), case.batches, case.loss)
    objective.probe()
    with _Watch(dag, {f for c in candidates for pair in c.pairs() for f in pair}, {}, {}) as watch:
        batch, n = next(iter(objective))
        captures = watch.harvest(objective.value(batch), -1.0)
    return Batch(captures, n, 0, 1, 0)


@pytest.mark.parametrize("solver", ["svd", "als"])
@given(plan=plans())
@DRAWN
def test_sums_from_images_are_those_from_rows(plan: Plan, solver: str) -> None:
    case = built(plan)
    assume(case is not None)
    dag = case.copy()
    assume(any(axis.growable for axis in dag.axes))
    waiting = AddNeurons(k=2, solver=solver, folds=1).candidates(dag)
    while waiting:
        batch = captured(case, waiting)
        for x, y in {pair for c in waiting for pair in c.pairs()}:
            expected = _from_rows(x, y, batch)
            torch.testing.assert_close(
                product(x, y, batch), expected, rtol=0, atol=1e-10 * (1 + float(expected.abs().max()))
            )
        m = dagrow.measure.measure(
            dag, Objective(dag.model, case.batches, case.loss), [p for c in waiting for p in c.pairs()], folds=1
        )
        solved = [c.solve(m, None) for c in waiting]
        waiting = [c for c in solved if c is not None and not hasattr(c, "widening")]
