"""Growths that compare: p-values of all places together, samples for an error."""

from math import inf, nan
from typing import Any

import pytest
import reference as truth
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_planning import made
from tokens import DOUBLE, Tokens, data, loss
from torch import Tensor, nn

import dagrow
from dagrow import AddConnection, AddNeurons, GrowthError, MoveWeights
from dagrow.growing._propose import corrected
from dagrow.solvers import upper_tail


@given(st.lists(st.none() | st.sampled_from([1e-5, 0.001, 0.009, 0.01, 0.02, 0.3]), max_size=5), st.integers(0, 3))
def test_p_values_are_those_of_closed_testing(p_values: list[float | None], further: int) -> None:
    growths = [made({"x": 1.0}, where=str(i), p_value=p) for i, p in enumerate(p_values)]
    asked = [p for p in p_values if p is not None]
    expected = iter(truth.closed_testing(asked, len(asked) + further))
    for before, after in zip(growths, corrected(growths, len(asked) + further), strict=True):
        assert after.where == before.where
        if before.p_value is None:
            assert after is before
        else:
            assert after.p_value == pytest.approx(next(expected))
            assert after.significant == (after.p_value <= 0.05)


def test_operators_of_one_call_of_grow_share_what_may_be_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    asked: list[float] = []

    def none(growths: list[dagrow.Growth]) -> list[dagrow.Growth]:
        asked.extend(growth.p_value for growth in growths)
        return []

    monkeypatch.setattr("dagrow.growing._grow.applicable", none)
    for operators in ([AddConnection()], [AddConnection()] * 3):
        dagrow.grow(dagrow.trace(Tokens(), x[:2]), [(x, y)], loss, operators)
    alone, shared = torch.tensor(asked[:3]), torch.tensor(asked[3:]).view(3, 3)
    torch.testing.assert_close(shared, (3 * alone).clamp_max(1).expand(3, 3))


def test_places_where_nothing_is_found_count() -> None:
    """Those that sketches sorted out, and those of other operators."""
    x, y = data()
    dag = dagrow.trace(Tokens(), x[:2])

    def p_values(*operators: dagrow.Operator) -> dict[str, float]:
        growths = dagrow.propose(dag, [(x, y)], loss, operators)
        return {g.where: (g.p_value, upper_tail(g.z)) for g in growths if isinstance(g.operator, AddConnection)}

    every, few = p_values(AddConnection()), p_values(AddConnection(exact=1))
    assert len(every) == 3
    assert len(few) == 1
    ((p_value, alone),) = few.values()
    assert p_value == pytest.approx(min(1, 3 * alone))
    beside = [AddConnection(exact=1), AddNeurons(axes=("one",)), AddNeurons(k=1), AddNeurons(k=1, init="zero")]
    asked = [g for g in dagrow.propose(dag, [(x, y)], loss, beside) if g.p_value is not None]
    expected = truth.closed_testing([upper_tail(g.z) for g in asked], 4)
    assert [g.p_value for g in asked] == pytest.approx(expected)


def test_samples_for_an_error() -> None:
    growth = made({"x": 1.0}, heldout_gain=0.5, heldout_error=0.1, samples=1000)
    assert growth.samples_for(0.2) == 1000
    assert growth.samples_for(0.1) == 4000
    assert growth.samples_for(0.05) == 16000
    assert growth.samples_for(100) == 1
    wrong: list[Any] = [0, -0.1, nan, inf, True, "few", None]
    for value in wrong:
        with pytest.raises(GrowthError, match="number above 0"):
            growth.samples_for(value)
    with pytest.raises(GrowthError, match="without folds"):
        made({"x": 1.0}).samples_for(0.1)
    with pytest.raises(GrowthError, match="more samples"):
        made({"x": 1.0}, heldout_gain=-0.5, heldout_error=0.1, samples=1000).samples_for(0.1)


def drawn(n: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Targets of one function of the inputs, with noise."""
    weights = torch.randn(5, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    x = torch.randn(n, 5, dtype=DOUBLE, generator=generator)
    return [(x, torch.tanh(x @ weights) + 0.5 * torch.randn(n, 3, dtype=DOUBLE, generator=generator))]


def gains(n: int, draws: int, dag: dagrow.Dag) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Kind of growth -> held-out gain, its error, and gain on the samples, of independent draws of samples."""
    operators = [MoveWeights(edges=("2",)), AddNeurons(k=1, axes=("0",)), AddConnection(targets=("2",))]
    found: dict[str, list[tuple[float, float, float]]] = {}
    generator = torch.Generator().manual_seed(n)
    for _ in range(draws):
        for growth in dagrow.propose(dag, drawn(n, generator), loss, operators):
            assert growth.heldout_gain is not None
            assert growth.heldout_error is not None
            values = (growth.heldout_gain, growth.heldout_error, growth.gain)
            found.setdefault(type(growth.operator).__name__, []).append(values)
    return {kind: torch.tensor(values, dtype=DOUBLE).unbind(1) for kind, values in found.items()}


def test_gains_spread_from_draw_to_draw_as_their_errors_say() -> None:
    """And with the number of samples that is suggested for half the error, half as wide."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    dag = dagrow.trace(model, drawn(2, torch.Generator())[0][0])
    few, many = gains(200, 60, dag), gains(800, 60, dag)
    assert len(few) == 3
    for kind, (held, errors, fitted) in few.items():
        assert 0.8 < float(held.std() / errors.mean()) < 1.25, kind
        assert 0.8 < float(fitted.std() / errors.mean()) < 1.25, kind
        gain, error = float(held.mean()), float(errors.mean())
        growth = made({"x": 1.0}, heldout_gain=gain, heldout_error=error, samples=200)
        assert growth.samples_for(error / gain / 2) in (800, 801)
        reached = float(many[kind][0].std() / many[kind][0].mean())
        assert reached == pytest.approx(error / gain / 2, rel=0.25), kind
