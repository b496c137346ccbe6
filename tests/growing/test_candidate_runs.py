"""The steps of candidates: what they need is measured together, and what they may not do is refused."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import dagrow
from dagrow import AddNeurons, GrowthError
from dagrow.growing import _candidate_runs
from dagrow.operators import Candidate, Cost, Dag, Draft, Edge, Growth, Needs, Objective, Operator, OutputGoal, Steps

X, Y = torch.randn(40, 3), torch.randn(40, 2)


def traced() -> Dag:
    return dagrow.trace(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), X)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs are measured in each pass."""
    counts: list[int] = []
    measure = _candidate_runs.measure

    def counted(dag: Dag, objective: Objective, pairs: Sequence[Any], **kwargs: Any) -> Any:
        counts.append(len(pairs))
        return measure(dag, objective, pairs, **kwargs)

    monkeypatch.setattr(_candidate_runs, "measure", counted)
    return counts


@dataclass(frozen=True)
class Patient(Operator):
    """Measures a goal as often as it is told to, at each edge more often than at the one before."""

    folds: int = 1

    def candidates(self, dag: Dag) -> list[Candidate]:
        return [Candidate(edge.name, partial(self.steps, dag, edge, n)) for n, edge in enumerate(dag.edges)]

    def steps(self, dag: Dag, edge: Edge, times: int, objective: Objective) -> Steps:
        goal, gain = OutputGoal(edge.name), 0.0
        for _ in range(times):
            moments = yield Needs([(goal, goal)])
            gain += float(moments[goal, goal].trace())
        change = Draft(dag).change()
        return Growth(self, edge.name, 0, gain, {}, Cost(), change=change, dag=dag, objective=objective)


def test_steps_of_all_candidates_share_passes(passes: list[int]) -> None:
    growths = dagrow.propose(traced(), [(X, Y)], nn.functional.mse_loss, [Patient()])
    assert {growth.where for growth in growths} == {"0", "2", "4"}
    assert passes == [2, 1]  # the first asks for nothing


def test_previews_that_change_no_layer_in_common_share_passes(passes: list[int]) -> None:
    dagrow.propose(traced(), [(X, Y)], nn.functional.mse_loss, [AddNeurons(k=1, folds=1)])
    assert len(passes) == 2
    passes.clear()
    dagrow.propose(traced(), [(X, Y)], nn.functional.mse_loss, [AddNeurons(k=1)])
    assert len(passes) == 3  # and one for scores


def test_candidates_that_are_returned_are_gone_on_with(passes: list[int]) -> None:
    @dataclass(frozen=True)
    class Best(Patient):
        def candidates(self, dag: Dag) -> list[Candidate]:
            return [Candidate("all", lambda _: self.best(super(Best, self).candidates(dag)), tests=3)]

        def best(self, candidates: list[Candidate]) -> Steps:
            yield Needs([])
            return candidates[1:]

    growths = dagrow.propose(traced(), [(X, Y)], nn.functional.mse_loss, [Best()])
    assert {growth.where for growth in growths} == {"2", "4"}
    assert passes == [0, 2, 1]


def returned(*_: object) -> Any:
    yield Needs([])
    return 3


def yielded(*_: object) -> Any:
    yield [(OutputGoal("0"), OutputGoal("0"))]


@dataclass(frozen=True)
class Odd(Operator):
    steps: Callable[..., Any] = field(repr=False)

    def candidates(self, dag: Dag) -> list[Candidate]:
        return [Candidate("there", self.steps)]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (lambda _: None, "are a NoneType, not a generator"),
        (yielded, "yield a list"),
        (returned, "return a int"),
    ],
)
def test_steps_that_are_none(steps: Callable[..., Any], message: str) -> None:
    with pytest.raises(GrowthError, match=rf"Odd\(\): the steps of its candidate at there {message}; write"):
        dagrow.propose(traced(), [(X, Y)], nn.functional.mse_loss, [Odd(steps)])
