"""Choosing: a plan keeps to its budget, counts what growths share once, and follows its policy."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from math import e, inf, nan
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
    ByLineSearch,
    Growth,
    GrowthError,
    MoveWeights,
    Policy,
    RoundRobin,
)
from dagrow.growing._planning import greedy_plan
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


def test_policies_value_what_they_say() -> None:
    large, cheap = made({"x": 4.0}, 100, flops=10, where="a"), made({"y": 1.0}, 10, flops=100, where="b")
    assert dagrow.plan([cheap, large], policy=ByGain())[0] is large
    assert dagrow.plan([cheap, large], policy=ByGainPerParameter())[0] is cheap
    assert dagrow.plan([cheap, large], policy=ByGainPerFlop())[0] is large
    assert ByGainPerFlop().values([made({"x": 1.0}), made({"x": 0.0})], large.objective, ()) == [inf, 0.0]


def test_round_robin_takes_the_place_that_grew_longest_ago() -> None:
    found = [made({to: gain}, where=to) for to, gain in (("a", 3.0), ("b", 2.0), ("c", 1.0), ("d", 0.5))]
    plan = greedy_plan(found, Budget(), RoundRobin(), found[0].objective, ["b", "a", "b"])
    assert [g.where for g in plan] == ["c", "d", "a", "b"]
    plan = greedy_plan(found, Budget(), RoundRobin(), found[0].objective, ["a", "c", "b"])
    assert [g.where for g in plan] == ["d", "a", "c", "b"]


@dataclass(frozen=True)
class Narrowest(Policy):
    """One's own."""

    fault: Any = None

    def values(self, growths: Sequence[Growth], judge: Any, past: Sequence[str]) -> Sequence[float]:
        return [1 / growth.neurons for growth in growths] if self.fault is None else self.fault


def test_a_policy_of_ones_own() -> None:
    wide, narrow = made({"x": 3.0}, neurons=5, where="a"), made({"y": 1.0}, neurons=1, where="b")
    assert dagrow.plan([wide, narrow], policy=Narrowest()) == [narrow, wide]
    assert dagrow.plan([wide, narrow], policy=Narrowest([-1.0, 2.0])) == [narrow]
    for fault in ([1.0], [nan, 1.0]):
        with pytest.raises(GrowthError, match="one number for each"):
            dagrow.plan([wide, narrow], policy=Narrowest(fault))


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
    assert one.within(other).holds(found[0]) == (one.holds(found[0]) and other.holds(found[0]))


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


def test_a_line_search_finds_the_same_falls_whatever_the_units_of_activations() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 5, dtype=torch.float64)
    y = torch.tanh(x @ torch.randn(5, 6).double()) @ torch.randn(6, 3).double()
    operators = [AddNeurons(k=1, ridge=0.0, folds=1), dagrow.AddConnection(ridge=0.0, folds=1)]
    found = []
    for scale in (1.0, 8.0):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double()
        with torch.no_grad():
            model[2].weight.mul_(scale)
            model[2].bias.mul_(scale)
            model[4].weight.div_(scale)
        growths = dagrow.propose(dagrow.trace(model, x), [(x, y)], nn.functional.mse_loss, operators)
        values = ByLineSearch().values(growths, growths[0].objective, ())
        assert all(0 < value < growths[0].loss(0.0) for value in values)
        found.append({(g.where, g.neurons): (value, g.gain) for g, value in zip(growths, values, strict=True)})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 3
    ratios = [[b / a for a, b in zip(found[0][at], found[1][at], strict=True)] for at in found[0]]
    assert all(fall == pytest.approx(1, rel=0.01) for fall, _ in ratios)
    assert max(gain for _, gain in ratios) / min(gain for _, gain in ratios) == pytest.approx(64)


def test_a_line_search_never_takes_what_lowers_the_loss_nowhere() -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 3)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    operators = [AddNeurons(k=1, folds=1), AddNeurons(k=1, init="zero")]
    learned = (x[:, :1] * x[:, 1:2]).sign()
    fitted, kept = dagrow.propose(dagrow.trace(model, x), [(x, learned)], nn.functional.mse_loss, operators)
    best = model(x).detach()  # no growth can do better than that
    judge = fitted.objective.with_batches([(x, best)], "validation")
    assert ByLineSearch().values([fitted, kept], judge, ()) == [-inf, 0.0]
    assert dagrow.plan([fitted, kept], policy=ByLineSearch()) == [fitted, kept]


def scaled(scale: float) -> tuple[dagrow.Dag, list[Any], Any]:
    """A small network, its data, and a loss times a scale."""
    torch.manual_seed(1)
    x = torch.randn(300, 5, dtype=torch.float64)
    y = torch.tanh(x @ torch.randn(5, 6).double()) @ torch.randn(6, 3).double()
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return dagrow.trace(model, x[:2]), [(x, y)], lambda output, target: scale * nn.functional.mse_loss(output, target)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e7])
def test_the_scale_of_the_loss_makes_no_difference_to_a_plan(scale: float) -> None:
    operators = [AddNeurons(k=1), dagrow.AddConnection(), dagrow.AddLayer(3, nn.Tanh())]
    found = []
    for times in (1.0, scale):
        growths = dagrow.propose(*scaled(times), operators)
        falls = ByLineSearch().values(growths, growths[0].objective, ())
        found.append(
            (
                {(g.operator, g.where): fall / times for g, fall in zip(growths, falls, strict=True)},
                [(g.operator, g.where) for g in dagrow.plan(growths, Budget(growths=4))],
            )
        )
    (one, plan), (other, plan_of_other) = found
    assert len(one) > 10
    assert one == pytest.approx(other, rel=1e-6)
    assert plan == plan_of_other


@pytest.mark.parametrize("scale", [1e-6, 1e7])
def test_the_scale_of_the_loss_makes_no_difference_to_grow(scale: float) -> None:
    one, other = (dagrow.grow(*scaled(times), [AddNeurons(k=1)]) for times in (1.0, scale))
    assert one.where == other.where
    assert one.loss_after == pytest.approx(other.loss_after / scale, rel=1e-6)


def test_amplitudes_at_which_the_loss_overflows_are_not_chosen() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 3)
    batches = [(x, torch.poisson((x[:, :1] + x[:, 1:2] * x[:, 2:]).exp().clamp(max=50)))]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.poisson_nll_loss(1e3 * output, target)

    dag = dagrow.trace(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)), x[:2])
    with torch.no_grad():
        dag.model[2].weight.mul_(1e-3)
        dag.model[2].bias.zero_()
    growth = dagrow.propose(dag, batches, loss, [dagrow.AddLayer(4)])[0]
    with pytest.raises(dagrow.LossError, match="the loss is inf"):
        growth.loss(1e6)
    receipt = dagrow.grow(dag, batches, loss, [dagrow.AddLayer(4)])
    assert 0 < receipt.gamma < 1e6
    assert receipt.loss_after < receipt.loss_before


@pytest.mark.parametrize("junk", [None, [None], ["a"], [1j], [nan], [], 7])
def test_a_policy_that_gives_no_numbers_is_told_so(junk: Any) -> None:
    @dataclass(frozen=True)
    class Junk(Policy):
        def values(self, growths: Any, judge: Any, past: Any) -> Any:
            return junk

    with pytest.raises(GrowthError, match="give one number for each"):
        dagrow.plan([made({"x": 1.0})], policy=Junk())


def test_what_the_budget_excludes_is_not_valued() -> None:
    @dataclass(frozen=True)
    class Counting(Policy):
        def values(self, growths: Any, judge: Any, past: Any) -> Any:
            assert [growth.where for growth in growths] == ["small"]
            return [1.0]

    growths = [made({"x": 1.0}, 9, where="large"), made({"x": 1.0}, 2, where="small")]
    assert dagrow.plan(growths, Budget(parameters=5), Counting()) == growths[1:]


def test_line_search_is_what_chooses_by_default() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 5, dtype=torch.float64)
    y = torch.tanh(x @ torch.randn(5, 6).double()) @ torch.randn(6, 3).double()
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        model[2].weight.mul_(30)
        model[4].weight.div_(30)
    dag = dagrow.trace(model, x)
    growths = dagrow.propose(dag, [(x, y)], nn.functional.mse_loss, [AddNeurons(k=1, ridge=0.0, folds=1)])
    by_fall, by_slope = (dagrow.plan(growths, policy=policy) for policy in (ByLineSearch(), ByGain()))
    assert by_fall[0] is not by_slope[0]
    assert dagrow.plan(growths)[0] is by_fall[0]
    defaults = (inspect.signature(function).parameters["policy"].default for function in (dagrow.Grower, dagrow.fit))
    assert [*defaults, dagrow.ShortTraining().first] == [ByLineSearch()] * 3
