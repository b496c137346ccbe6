"""Every law over models with convolutions: drawn hyper-parameters, and everything that may stand between two edges."""

import dataclasses

import forms
import pytest
from hypothesis import assume, given
from images import Plan, built, plans
from test_laws import LAW, OPERATORS, checks, holds
from zoo import stepping

from dagrow import testing
from dagrow.operators import Operator


@pytest.mark.parametrize(("law", "operator"), checks(OPERATORS))
@given(plan=plans(), most=forms.MOST)
@LAW
def test_a_law_over_images(law: testing.Law, plan: Plan, operator: Operator, most: int) -> None:
    case = built(plan)
    assume(case is not None)
    holds(law, operator, stepping(law, case, plan.seed), most)


@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
@pytest.mark.parametrize("law", [testing.preservation, testing.slope, testing.descent], ids=lambda law: law.__name__)
@given(plan=plans(between=("batch", "none")), most=forms.MOST)
@LAW
def test_a_law_of_goals_measured_in_train_mode(law: testing.Law, plan: Plan, operator: Operator, most: int) -> None:
    case = built(dataclasses.replace(plan, mode="train"))
    assume(case is not None)
    holds(law, operator, stepping(law, case, plan.seed), most)
