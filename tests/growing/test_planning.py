"""Choosing: a plan keeps to its budget, counts what growths share once, and follows its policy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from math import e
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dagrow
from dagrow import (
    AddNeurons,
    Budget,
    ByGain,
    ByGainPerFlop,
    ByGainPerParameter,
    Growth,
    GrowthError,
    MoveWeights,
    Policy,
    RoundRobin,
)
from dagrow.surgery import Cost


def made(gain_from: Mapping[str, float], parameters: int = 1, **given: Any) -> Growth:
    """A growth that can be planned, not applied."""
    nothing: Any = None
    rest = {"operator": "op", "where": "here", "neurons": 1, "flops": 0, **given}
    return Growth(
        rest.pop("operator"),
        rest.pop("where"),
        rest.pop("neurons"),
        sum(gain_from.values()),
        gain_from,
        Cost(parameters, rest.pop("flops")),
        change=nothing,
        dag=nothing,
        objective=nothing,
        **rest,
    )


@st.composite
def growths(draw: st.DrawFn, most: int = 6) -> list[Growth]:
    """At different places, on some of three targets."""
    found = []
    for index in range(draw(st.integers(1, most))):
        targets = draw(st.lists(st.sampled_from("xyz"), min_size=1, max_size=3, unique=True))
        parts = {to: draw(st.floats(0.125, 8)) for to in targets}
        cost = {name: draw(st.integers(1, 9)) for name in ("parameters", "flops", "neurons")}
        found.append(made(parts, where=f"place {index}", **cost))
    return found


budgets = st.builds(
    Budget, **{name: st.none() | st.integers(0, 20) for name in ("parameters", "flops", "neurons", "growths")}
)
by_gain = partial(dagrow.plan, policy=ByGain())  # made-up growths have no loss to search
policies = st.sampled_from([ByGain(), ByGainPerParameter(), ByGainPerFlop(), RoundRobin()])  # of made-up growths


def explained(found: Sequence[Growth]) -> float:
    """What a set explains at least: at every target what its best does."""
    targets = {to for growth in found for to in growth.gain_from}
    return sum(max(growth.gain_from.get(to, 0.0) for growth in found) for to in targets)


@given(found=growths(), budget=budgets, policy=policies)
def test_a_plan_keeps_to_its_budget_and_leaves_nothing_out_that_fits_and_is_new(
    found: list[Growth], budget: Budget, policy: Policy
) -> None:
    plan = dagrow.plan(found, budget, policy)
    spent = {
        "parameters": sum(g.cost.parameters for g in plan),
        "flops": sum(g.cost.flops for g in plan),
        "neurons": sum(g.neurons for g in plan),
        "growths": len(plan),
    }
    left = {name: limit - spent[name] for name in spent if (limit := getattr(budget, name)) is not None}
    assert all(rest >= 0 for rest in left.values())
    for growth in set(found) - set(plan):
        fits = Budget(**left).holds(growth)
        assert not fits or explained([*plan, growth]) <= explained(plan) * (1 + 1e-5)


@given(found=growths(), most=st.integers(1, 4))
def test_a_plan_by_gain_comes_close_to_the_best_set_of_its_size(found: list[Growth], most: int) -> None:
    best = max(explained(some) for some in combinations(found, min(most, len(found))))
    assert explained(by_gain(found, Budget(growths=most))) >= (1 - 1 / e) * best


def test_where_nothing_is_shared_gains_add_and_sort() -> None:
    found = [made({to: gain}, where=to) for to, gain in (("x", 1.0), ("y", 3.0), ("z", 2.0))]
    assert [g.where for g in by_gain(found)] == ["y", "z", "x"]


def test_of_growths_that_share_a_target_only_what_exceeds_counts() -> None:
    first, within = made({"x": 3.0}, where="a"), made({"x": 2.9}, where="b")
    beyond, apart = made({"x": 2.9, "y": 0.2}, where="c"), made({"z": 0.5}, where="d")
    assert by_gain([first, within]) == [first]
    assert by_gain([within, beyond, first, apart]) == [beyond, apart, first]
    assert by_gain([made({"x": 3.0}, where="a"), made({"x": 3.0}, where="b")])[1:] == []


def test_expected_gains_count_and_not_those_on_the_samples() -> None:
    fitted, real = made({"x": 9.0}, heldout_gain=0.5, where="a"), made({"x": 1.0}, heldout_gain=0.8, where="b")
    assert by_gain([fitted, real]) == [real]
    noise = made({"y": 9.0}, heldout_gain=-0.1, where="c")
    assert by_gain([fitted, real, noise]) == [real]


def test_of_one_operator_at_one_place_one_growth_is_chosen() -> None:
    small, large = made({"x": 1.0}), made({"y": 2.0})
    assert by_gain([small, large]) == [large]
    other = made({"x": 1.0}, operator="another")
    assert by_gain([small, large, other]) == [large, other]


def test_moves_are_free_and_overlap_with_nothing() -> None:
    move, wider = made({"x": 5.0}, parameters=0, neurons=0), made({"x": 1.0}, operator="wider")
    assert by_gain([wider, move], Budget(growths=1)) == [move, wider]
    assert by_gain([wider, move], Budget(parameters=0)) == [move]
    small = made({"x": 0.5}, parameters=0, neurons=0, where="b")
    assert by_gain([wider, small]) == [wider, small]
    assert dagrow.plan([wider, move], policy=ByGainPerParameter()) == [move, wider]


def test_what_is_no_more_than_chance_or_raises_the_loss_is_left_out() -> None:
    chance, up = made({"x": 5.0}, significant=False), made({"y": -1.0}, where="b")
    assert by_gain([chance, up]) == []
    assert by_gain([]) == []


def test_growths_that_preserve_the_function_come_last_by_gain() -> None:
    zero, fitted = made({"x": 0.0}, preserving=True, where="a"), made({"x": 1.0}, where="b")
    assert by_gain([zero, fitted]) == [fitted, zero]


def test_budgets_and_plans_refuse_what_is_none() -> None:
    for wrong in (-1, 1.5, True, "many"):
        with pytest.raises(GrowthError, match="whole number"):
            Budget(neurons=wrong)  # type: ignore[arg-type]
    for junk in ("abc", [1], None, 7):
        with pytest.raises(GrowthError, match=r"give a list such as dagrow\.propose returns"):
            dagrow.plan(junk)  # type: ignore[arg-type]
    with pytest.raises(GrowthError, match=r"dagrow\.Budget"):
        dagrow.plan([], 100)  # type: ignore[arg-type]
    with pytest.raises(GrowthError, match=r"dagrow\.Policy"):
        dagrow.plan([], policy=ByGain)  # type: ignore[arg-type]


@given(one=budgets, other=budgets, found=growths(1))
def test_the_narrower_of_two_budgets_holds_what_both_hold(one: Budget, other: Budget, found: list[Growth]) -> None:
    assert one.intersect(other).holds(found[0]) == (one.holds(found[0]) and other.holds(found[0]))


class Branches(nn.Module):
    """Two branches that read the same and write side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 1), nn.Linear(5, 1), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([torch.tanh(self.a(x)), torch.tanh(self.b(x))], 1))


def test_of_branches_that_explain_the_same_one_is_planned() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 5)
    y = torch.tanh(x @ torch.randn(5, 3))
    dag, loss = dagrow.trace(Branches(), x[:2]), nn.functional.mse_loss
    found = dagrow.propose(dag, [(x, y)], loss, [AddNeurons(k=3)])
    assert {growth.where for growth in found} == {"a", "b"}
    assert len(dagrow.plan(found)) == 1
    before = {growth.where: growth.gain for growth in found}
    dagrow.plan(found)[0].apply(1.0)
    again = dagrow.propose(dag, [(x, y)], loss, [AddNeurons(k=3)])
    assert all(growth.gain < 0.5 * before[growth.where] for growth in again)  # what one explains is gone for both


def test_plans_of_real_moves_and_neurons() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 5)
    model = nn.Sequential(nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 3))
    found = dagrow.propose(
        dagrow.trace(model, x[:2]),
        [(x, torch.tanh(x @ torch.randn(5, 3)))],
        nn.functional.mse_loss,
        [MoveWeights(), AddNeurons(k=1)],
    )
    plan = dagrow.plan(found, Budget(neurons=1, growths=1))
    assert sum(growth.neurons for growth in plan) == 1
    assert sum(isinstance(growth.operator, MoveWeights) for growth in plan) == 2


def test_what_the_budget_excludes_is_not_valued() -> None:
    @dataclass(frozen=True)
    class Counting(Policy):
        def values(self, growths: Any, judge: Any, past: Any) -> Any:
            assert [growth.where for growth in growths] == ["small"]
            return [1.0]

    growths = [made({"x": 1.0}, 9, where="large"), made({"x": 1.0}, 2, where="small")]
    assert dagrow.plan(growths, Budget(parameters=5), Counting()) == growths[1:]
