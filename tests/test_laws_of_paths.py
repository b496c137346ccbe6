"""Every law for new connections and new layers, over drawn models and drawn images."""

import forms
import images
import pytest
import zoo
from hypothesis import assume, given
from test_laws import LAW, checks
from torch import nn

from dagrow import AddConnection, AddLayer, testing
from dagrow.operators import Operator
from dagrow.operators.paths import path_sites
from dagrow.testing import Case

OPERATORS: tuple[Operator, ...] = (
    AddConnection(),
    AddConnection(folds=1),
    AddConnection(rank=1),
    AddConnection(kernel=2, rank=2, folds=1),
    AddLayer(2, nn.Tanh()),
    AddLayer(3, folds=1),
)


def holds(law: testing.Law, operator: Operator, case: Case, most: int) -> None:
    dag = case.copy()
    assume(dag.unwritable is None and path_sites(dag, known=isinstance(operator, AddLayer)))
    with forms.by_rows(most):
        law(operator, case)


@pytest.mark.parametrize(("law", "operator"), checks(OPERATORS))
@given(plan=zoo.plans(), most=forms.MOST)
@LAW
def test_a_law_over_the_zoo(law: testing.Law, plan: zoo.Plan, operator: Operator, most: int) -> None:
    holds(law, operator, zoo.stepping(law, zoo.built(plan), plan.seed), most)


@pytest.mark.parametrize(("law", "operator"), checks(OPERATORS))
@given(plan=images.plans(), most=forms.MOST)
@LAW
def test_a_law_over_images(law: testing.Law, plan: images.Plan, operator: Operator, most: int) -> None:
    case = images.built(plan)
    assume(case is not None)
    holds(law, operator, zoo.stepping(law, case, plan.seed), most)
