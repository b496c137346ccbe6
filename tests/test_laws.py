"""Every law over the zoo: drawn models times drawn operators, then fixed awkward models, then wrong operators."""

import dataclasses
import functools
import math
import os
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import nn
from zoo import KINKED, SMOOTH, Normed, Plan, Split, Stage, Stream, Tied, TwoProducers, built, case_of, plans

import dagrow
from dagrow import AddNeurons, GrowthError, MoveWeights, testing
from dagrow.operators import Candidate, Objective, Operator, Steps
from dagrow.testing import Case, check_operator
from dagrow.testing._snapshots_and_slopes import derivative, kink

EXAMPLES = int(os.environ.get("LAW_EXAMPLES", "0"))  # more than CI's, and other ones each time
LAW = settings(
    max_examples=EXAMPLES or 3,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),  # plans are short as they are drawn
    suppress_health_check=list(HealthCheck),
)
OPERATORS: tuple[Operator, ...] = (
    MoveWeights(),
    MoveWeights(ridge=0.0, folds=1),
    AddNeurons(k=2),
    AddNeurons(),
    AddNeurons(k=1, folds=1),
    AddNeurons(k=2, folds=1, solver="joint"),
    AddNeurons(k=2, solver="joint"),
    AddNeurons(k=2, folds=1, solver="unprojected"),
    AddNeurons(k=1, folds=1, paired=True),
    AddNeurons(k=2, solver="joint", paired=True),
    AddNeurons(k=2, init="random_features"),
    AddNeurons(k=1, init="random"),
    AddNeurons(k=2, init="gradmax"),
    AddNeurons(k=2, init="copy"),
    AddNeurons(k=2, init="zero"),
)


def holds(law: testing.Law, operator: Operator, case: Case) -> None:
    dag = case.copy()
    assume(isinstance(operator, MoveWeights) or any(axis.growable for axis in dag.axes))
    offset = any(isinstance(module, (nn.Sigmoid, nn.Softplus)) for module in dag.model.modules())
    assume(not (offset and getattr(operator, "init", "") == "gradmax"))  # refused: a zero does not stay zero
    law(operator, case)


@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
@pytest.mark.parametrize("law", testing.LAWS, ids=lambda law: law.__name__)
@given(plan=plans())
@LAW
def test_a_law_over_the_zoo(law: testing.Law, plan: Plan, operator: Operator) -> None:
    holds(law, operator, built(plan))


@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
@pytest.mark.parametrize("law", [testing.preservation, testing.slope, testing.descent], ids=lambda law: law.__name__)
@given(plan=plans(norms=("before", "after"), depth=2))
@LAW
def test_a_law_of_goals_measured_in_train_mode(law: testing.Law, plan: Plan, operator: Operator) -> None:
    stages = tuple(dataclasses.replace(stage, dropout=0.0) for stage in plan.stages)
    holds(law, operator, built(dataclasses.replace(plan, stages=stages, mode="train")))


FIXED = {
    "residual stream": (lambda: Stream(), (3,)),
    "residual stream of tokens": (lambda: Stream(width=3, hidden=2, depth=1), (2, 3)),
    "sizes written into view": (lambda: Split(), (3,)),
    "two producers, three consumers": (lambda: TwoProducers(), (3,)),
    "width one": (lambda: nn.Sequential(nn.Linear(1, 1), nn.SELU(), nn.Linear(1, 1)), (1,)),
    "tokens side by side": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)), (2, 3)),
}


@pytest.mark.parametrize("operator", [MoveWeights(), AddNeurons(k=2), AddNeurons(k=3, folds=1, solver="joint")])
@pytest.mark.parametrize("name", FIXED)
def test_all_laws_on_awkward_models(name: str, operator: Operator) -> None:
    make, shape = FIXED[name]
    torch.manual_seed(0)
    check_operator(operator, [case_of(make(), *shape)])


@pytest.mark.parametrize("operator", [MoveWeights(), AddNeurons(), AddNeurons(k=2, paired=True)])
def test_the_check_for_users(operator: Operator) -> None:
    check_operator(operator)


@pytest.mark.parametrize("activation", SMOOTH + KINKED)
@pytest.mark.parametrize("bias", [True, False])
def test_slope_and_residual_behind_any_activation(activation: str, bias: bool) -> None:
    stage = Stage("dense", 12, activation, bias)  # wide: where all ReLUs are dead, the next one sits on its kink
    case = built(Plan((stage, dataclasses.replace(stage, width=3)), sizes=(21, 30), bias=bias, seed=5))
    check_operator(AddNeurons(k=2, folds=1), [case], [testing.slope, testing.residual, testing.optimality])


@dataclasses.dataclass(frozen=True)
class Wrong(Operator):
    """An operator that promises another gain than it has."""

    folds: int = 1
    factor: float = 1.01

    def candidates(self, dag: dagrow.Dag) -> Sequence[Candidate]:
        inner = AddNeurons(k=1, folds=1).candidates(dag)
        return [dataclasses.replace(c, steps=functools.partial(self.steps, c)) for c in inner]

    def steps(self, candidate: Candidate, objective: Objective) -> Steps:
        found = yield from candidate.steps(objective)
        return found and dataclasses.replace(found, gain=found.gain * self.factor)


def test_an_operator_that_promises_too_much_is_found_out() -> None:
    check_operator(Wrong(factor=1.0), laws=[testing.preservation])
    with pytest.raises(AssertionError, match="slope of Wrong"):
        check_operator(Wrong())


@pytest.mark.parametrize("steepness", [1e-3, 1.0, 1e6, 1e12])
def test_slopes_are_measured_where_the_loss_is_steep(steepness: float) -> None:
    found = derivative(lambda gamma: 2 + math.sin(1 + steepness * gamma))
    assert found == pytest.approx(steepness * math.cos(1.0), rel=1e-6)


def test_slopes_are_measured_where_the_loss_soon_saturates() -> None:
    assert derivative(lambda gamma: min((1 - 3e24 * gamma) ** 2, 9.0)) == pytest.approx(-6e24, rel=1e-6)
    assert derivative(lambda gamma: (1 - 3e24 * min(gamma, 1e-24)) ** 2) == pytest.approx(-6e24, rel=1e-6)


@pytest.mark.parametrize("steepness", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("jump", [0.0, 0.4])
def test_a_kink_is_half_of_the_jump_of_the_slope(steepness: float, jump: float) -> None:
    found = kink(lambda gamma: 2 + steepness * (math.sin(1 + gamma) + jump * max(gamma, 0.0)))
    assert found == pytest.approx(steepness * jump / 2, rel=1e-5, abs=1e-7 * max(1.0, steepness))


@pytest.mark.parametrize("seed", range(5))
def test_goals_that_are_zero_but_for_rounding_have_no_drop_to_compare(seed: int) -> None:
    """Before a norm of one unit nothing that is written makes a difference."""
    torch.manual_seed(seed)
    layers = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.LayerNorm(1), nn.Hardtanh(), nn.Linear(1, 3)
    for parameter in layers[3].parameters():
        nn.init.normal_(parameter)
    x, y = torch.randn(24, 3).double(), torch.randint(3, (24,))
    case = Case(nn.Sequential(*layers).double(), [(x[:9], y[:9]), (x[9:], y[9:])], nn.functional.cross_entropy)
    (growth,) = (g for g in case.propose(MoveWeights(ridge=0.0, folds=1), case.copy()) if g.where == "2")
    assert 0 <= growth.drop < 1e-24
    testing.check_drop(growth, case)
    with pytest.raises(AssertionError, match="drop of"):
        testing.check_drop(dataclasses.replace(growth, drop=1e-20), case)


@pytest.mark.parametrize(("make", "reason"), [(Tied, "shared with"), (Normed, "LayerNorm")], ids=lambda x: str(x))
def test_what_cannot_grow_says_why(make, reason: str) -> None:
    dag = dagrow.trace(make(), torch.randn(2, 3))
    refused = [axis.reason for axis in dag.axes if not axis.growable]
    assert any(reason in why for why in refused if why)
    asked = next(axis for axis in dag.axes if axis.reason and reason in axis.reason)
    with pytest.raises(GrowthError, match=reason):
        dagrow.propose(
            dag, [(torch.randn(6, 3), torch.randn(6, 2))], nn.functional.mse_loss, [AddNeurons(axes=(asked.name,))]
        )
