"""Short training picks what training picks, and leaves the user's model alone."""

import copy
import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from test_interrupts import OPERATORS, Setting, differences, loss
from test_planning import made
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

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
    OptimizerError,
    Policy,
    RoundRobin,
    ShortTraining,
)
from dagrow.growing._planning import greedy_plan

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).double()
Y = X[:, :2] * X[:, 2:]
BATCHES = list(zip(X.split(20), Y.split(20), strict=True))


def traced(model: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    return dagrow.trace((model or net).double(), X)


def proposed(dag: Any, *operators: Any) -> list[dagrow.Growth]:
    return dagrow.propose(dag, BATCHES, functional.mse_loss, operators or [AddNeurons(k=2)])


def trained(model: nn.Module, steps: int, lr: float) -> float:
    """By hand: Adam on the batches, round and round."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for at in range(steps):
        x, y = BATCHES[at % len(BATCHES)]
        optimizer.zero_grad()
        functional.mse_loss(model(x), y).backward()
        optimizer.step()
    model.eval()
    return float(functional.mse_loss(model(X), Y).detach())


@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm1d])
def test_values_are_by_how_much_training_ends_lower(norm: Any) -> None:
    """Copies train in train mode, and their losses are those in eval mode."""
    torch.manual_seed(0)
    dag = traced(nn.Sequential(nn.Linear(4, 2), norm(2), nn.Tanh(), nn.Linear(2, 2)).eval())
    for init in ("zero", "copy"):
        growth = proposed(dag, AddNeurons(k=2, init=init, axes=("0",)))[0]
        (value,) = ShortTraining(steps=7, lr=0.05).values([growth], growth.objective, ())
        without = trained(copy.deepcopy(dag.model), 7, 0.05)
        receipt = growth.apply(1.0)
        assert value == pytest.approx(without - trained(copy.deepcopy(dag.model), 7, 0.05), rel=1e-9, abs=1e-12)
        receipt.undo()


def test_a_fitted_growth_is_trained_from_its_best_amplitude() -> None:
    dag = traced()
    (growth, *_) = proposed(dag)
    (value,) = ShortTraining(steps=1, top=1, lr=1e-12).values([growth], growth.objective, ())
    receipt = dagrow.grow(dag, BATCHES, functional.mse_loss, [AddNeurons(k=2, axes=(growth.where,))])
    assert value == pytest.approx(receipt.drop, rel=1e-6)


class Named(dagrow.Policy):
    """First one operator, and others never."""

    def __init__(self, operator: AddNeurons) -> None:
        self.operator = operator

    def values(self, growths: Any, judge: Any, past: Any) -> list[float]:
        return [1.0 if growth.operator == self.operator else -1.0 for growth in growths]


def test_only_those_that_come_first_by_another_policy_are_tried() -> None:
    growths = proposed(traced(), AddNeurons(k=1), AddNeurons(k=2))
    falls = dagrow.ByLineSearch().values(growths, growths[0].objective, ())
    best = growths[falls.index(max(falls))]
    for first, top, expected in (
        (dagrow.ByGain(), 1, growths[:1]),
        (dagrow.ByLineSearch(), 1, [best]),
        (Named(AddNeurons(k=1)), 3, [g for g in growths if g.operator == AddNeurons(k=1)]),
    ):
        policy = ShortTraining(steps=2, top=top, lr=1e-9, first=first)
        values = policy.values(growths, growths[0].objective, ())
        assert [g for g, value in zip(growths, values, strict=True) if value > -float("inf")] == expected
        assert len(dagrow.plan(growths, policy=policy)) == len({g.where for g in expected})


def test_a_growth_that_training_does_not_profit_from_is_not_chosen() -> None:
    """A step along the sign of the gradient that is far too long for more neurons, and less so for fewer."""
    growths = proposed(traced(), AddNeurons(k=30, init="copy", axes=("0",)))
    policy = ShortTraining(steps=1, lr=0.3)
    assert policy.values(growths, growths[0].objective, ())[0] < 0
    assert dagrow.plan(growths, policy=policy) == []


def test_copies_that_diverge_are_worth_nothing() -> None:
    growths = proposed(traced())
    wild = ShortTraining(steps=40, optimizer=torch.optim.SGD, lr=1e200)
    assert set(wild.values(growths, growths[0].objective, ())) == {-float("inf")}
    assert dagrow.plan(growths, policy=wild) == []


def test_the_model_in_training_and_random_numbers_stay_as_they_are() -> None:
    setting = Setting()
    growths = dagrow.propose(setting.dag, setting.loader, loss, OPERATORS)
    before = setting.state()
    policy = ShortTraining(steps=5, lr=0.1)
    first = policy.values(growths, growths[0].objective, ())
    assert not differences(before, setting.state())
    assert policy.values(growths, growths[0].objective, ()) == first
    twice = dagrow.propose(setting.dag, setting.loader, loss, [*OPERATORS[1:], *OPERATORS[1:]])
    one, other = policy.values(twice, twice[0].objective, ())
    assert one == other  # dropout draws the same for all copies
    growths[0].apply(0.5, optimizer=setting.optimizer)
    setting.optimizer.step()


class Uncopied(nn.Module):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.held = nn.Linear(4, 2), nn.Linear(2, 2), (i for i in ())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


def test_refusals_say_what_to_do() -> None:
    for wrong in ({"steps": 0}, {"top": 1.5}, {"lr": "a"}, {"lr": -1.0}, {"seed": 2**70}, {"optimizer": None}):
        with pytest.raises(GrowthError, match=rf"ShortTraining\({next(iter(wrong))}=.*give a"):
            ShortTraining(**wrong)  # type: ignore[arg-type]
    with pytest.raises(GrowthError, match="give a policy"):
        ShortTraining(first=dagrow.ByGain)  # type: ignore[arg-type]
    growths = proposed(traced())
    with pytest.raises(GrowthError, match="cannot make its optimizer"):
        dagrow.plan(growths, policy=ShortTraining(optimizer=torch.optim.Optimizer))
    with pytest.raises(GrowthError, match="comes out as a NoneType"):
        dagrow.plan(growths, policy=ShortTraining(optimizer=lambda parameters, lr: None))  # type: ignore[arg-type]
    with pytest.raises(OptimizerError, match="needs a closure"):
        dagrow.plan(growths, policy=ShortTraining(optimizer=torch.optim.LBFGS))
    with pytest.raises(GrowthError, match="another policy"):
        dagrow.plan(proposed(traced(Uncopied())), policy=ShortTraining())


class Noisy(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples that the user's dataset augments, with numbers from numpy and Python; remembers what it gave."""

    def __init__(self) -> None:
        self.given: list[float] = []

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = X[index] + np.random.rand() + random.random()
        self.given.append(float(x[0]))
        return x, Y[index]


def test_all_copies_see_the_same_samples_in_the_same_order() -> None:
    torch.manual_seed(0)
    dag = traced(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Dropout(0.5), nn.Linear(3, 2)))
    data = Noisy()
    growth = proposed(dag, AddNeurons(k=2, init="copy"))[0]
    growth = replace(growth, objective=growth.objective.with_batches(DataLoader(data, 20, shuffle=True)))
    ShortTraining(steps=9, first=dagrow.ByGain()).values([growth], growth.objective.with_batches(BATCHES), ())
    once, again = data.given[: len(data.given) // 2], data.given[len(data.given) // 2 :]
    assert len(once) >= 180
    assert once == again


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


@pytest.mark.parametrize("junk", [None, [None], ["a"], [1j], [nan], [], 7])
def test_a_policy_that_gives_no_numbers_is_told_so(junk: Any) -> None:
    @dataclass(frozen=True)
    class Junk(Policy):
        def values(self, growths: Any, judge: Any, past: Any) -> Any:
            return junk

    with pytest.raises(GrowthError, match="give one number for each"):
        dagrow.plan([made({"x": 1.0})], policy=Junk())


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
