"""The steps of candidates: what they need is measured together, and what they may not do is refused."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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


class Residual(nn.Module):
    """A stream that three layers write, the first of them behind an activation, and a norm on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1)) for _ in range(2)
        )
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    "operator", [AddNeurons(k=2), AddNeurons(k=2, solver="joint", init="random"), AddNeurons(k=1, solver="als")]
)
def test_places_of_an_axis_are_looked_at_together(operator: AddNeurons, passes: list[int]) -> None:
    """Each as if it were looked at alone, which ``max_seconds`` does."""
    torch.manual_seed(0)
    model, x, y = Residual().double().eval(), torch.randn(40, 2, 6, 6).double(), torch.randn(40, 2).double()
    dag = dagrow.trace(model, x[:2])
    batches, (stream,) = [(x[:24], y[:24]), (x[24:], y[24:])], [axis for axis in dag.axes if len(axis.writings) > 1]
    operator = replace(operator, axes=(stream.name,))

    def proposed(**options: Any) -> tuple[list[Growth], int]:
        passes.clear()
        growths = dagrow.propose(dag, batches, nn.functional.mse_loss, [operator], progress=False, **options)
        return sorted(growths, key=lambda growth: growth.gain), len(passes)

    (together, few), (alone, many) = proposed(), proposed(max_seconds=1e6)
    assert few < many
    assert len(together) == len(alone) == len(stream.writings) == 3
    for one, other in zip(together, alone, strict=True):
        assert (one.gain, one.heldout_gain, one.z) == pytest.approx((other.gain, other.heldout_gain, other.z), rel=1e-7)
        for name in one.change.names:
            tensors = [change.tensors(model, 0.5)[name] for change in (one.change, other.change)]
            torch.testing.assert_close(*tensors, rtol=1e-6, atol=1e-9)


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
