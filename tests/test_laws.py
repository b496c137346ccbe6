"""Every law over the zoo: drawn models times drawn operators, then fixed awkward models."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import forms
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import nn
from zoo import KINKED, SMOOTH, Normed, Plan, Split, Stage, Stream, Tied, TwoProducers, built, case_of, plans, stepping

import dagrow
from dagrow import AddNeurons, GrowthError, MoveWeights, RemoveNeurons, testing
from dagrow.errors import NoPlaceError
from dagrow.operators import Operator
from dagrow.testing import Case, check_operator
from dagrow.testing._laws import exact

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
    RemoveNeurons(k=1),
    RemoveNeurons(),
    RemoveNeurons(k=2, folds=1),
    RemoveNeurons(k=1, score="magnitude"),
    RemoveNeurons(k=1, folds=1, score="taylor"),
)


def checks(operators: Sequence[Operator]) -> list[Any]:
    """Every law with every operator. Laws 3 to 5 look at neither ridge nor folds: of operators that differ in nothing
    else they check one."""
    alike = (testing.residual, testing.optimality, testing.additivity)
    distinct: dict[tuple[testing.Law, Operator], Operator] = {}
    for law in testing.LAWS:
        for operator in operators:
            distinct.setdefault((law, exact(operator) if law in alike else operator), operator)
    return [pytest.param(law, operator, id=f"{law.__name__}-{operator!r}") for (law, _), operator in distinct.items()]


def holds(law: testing.Law, operator: Operator, case: Case, most: int) -> None:
    dag = case.copy()
    try:
        operator.candidates(dag)
    except NoPlaceError:
        assume(False)
    offset = any(isinstance(module, (nn.Sigmoid, nn.Softplus)) for module in dag.model.modules())
    assume(not (offset and getattr(operator, "init", "") == "gradmax"))  # refused: a zero does not stay zero
    with forms.by_rows(most):
        law(operator, case)


@pytest.mark.parametrize(("law", "operator"), checks(OPERATORS))
@given(plan=plans(), most=forms.MOST)
@LAW
def test_a_law_over_the_zoo(law: testing.Law, plan: Plan, operator: Operator, most: int) -> None:
    holds(law, operator, stepping(law, built(plan), plan.seed), most)


@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
@pytest.mark.parametrize("law", [testing.preservation, testing.slope, testing.descent], ids=lambda law: law.__name__)
@given(plan=plans(norms=("before", "after"), depth=2), most=forms.MOST)
@LAW
def test_a_law_of_goals_measured_in_train_mode(law: testing.Law, plan: Plan, operator: Operator, most: int) -> None:
    stages = tuple(dataclasses.replace(stage, dropout=0.0) for stage in plan.stages)
    case = built(dataclasses.replace(plan, stages=stages, mode="train"))
    holds(law, operator, stepping(law, case, plan.seed), most)


FIXED = {
    "residual stream": (lambda: Stream(), (3,)),
    "residual stream of tokens": (lambda: Stream(width=3, hidden=2, depth=1), (2, 3)),
    "sizes written into view": (lambda: Split(), (3,)),
    "two producers, three consumers": (lambda: TwoProducers(), (3,)),
    "width one": (lambda: nn.Sequential(nn.Linear(1, 1), nn.SELU(), nn.Linear(1, 1)), (1,)),
    "tokens side by side": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)), (2, 3)),
}


@pytest.mark.parametrize(
    "operator", [MoveWeights(), AddNeurons(k=2), AddNeurons(k=3, folds=1, solver="joint"), RemoveNeurons(k=1)]
)
@pytest.mark.parametrize("name", FIXED)
def test_all_laws_on_awkward_models(name: str, operator: Operator) -> None:
    make, shape = FIXED[name]
    torch.manual_seed(0)
    if name == "width one" and isinstance(operator, RemoveNeurons):  # its only unit has to stay
        with pytest.raises(AssertionError, match="proposes nothing"):
            check_operator(operator, [case_of(make(), *shape)])
        return
    check_operator(operator, [case_of(make(), *shape)])


@pytest.mark.parametrize("activation", SMOOTH + KINKED)
@pytest.mark.parametrize("bias", [True, False])
def test_slope_and_residual_behind_any_activation(activation: str, bias: bool) -> None:
    stage = Stage("dense", 12, activation, bias)  # wide: where all ReLUs are dead, the next one sits on its kink
    case = built(Plan((stage, dataclasses.replace(stage, width=3)), sizes=(21, 30), bias=bias, seed=5))
    check_operator(AddNeurons(k=2, folds=1), [case], [testing.slope, testing.residual, testing.optimality])


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
