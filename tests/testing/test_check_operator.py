"""The check of operators, as users call it, and wrong operators."""

import dataclasses
import functools
from collections.abc import Sequence

import pytest

import dagrow
from dagrow import AddNeurons, MoveWeights, testing
from dagrow.operators import Candidate, Objective, Operator, Steps
from dagrow.testing import check_operator


@pytest.mark.parametrize("operator", [MoveWeights(), AddNeurons(), AddNeurons(k=2, paired=True)])
def test_the_check_for_users(operator: Operator) -> None:
    check_operator(operator)


@dataclasses.dataclass(frozen=True)
class Wrong(Operator):
    """An operator that promises another gain than it has."""

    folds: int = 1
    factor: float = 1.01

    def candidates(self, dag: dagrow.Dag) -> Sequence[Candidate]:
        inner = AddNeurons(k=1, folds=1).candidates(dag)
        return [dataclasses.replace(c, steps=functools.partial(self.steps, c)) for c in inner]

    def steps(self, candidate: Candidate, objective: Objective) -> Steps:
        growth = yield from candidate.steps(objective)
        return growth and dataclasses.replace(growth, gain=growth.gain * self.factor)


def test_an_operator_that_promises_too_much_is_found_out() -> None:
    check_operator(Wrong(factor=1.0), laws=[testing.preservation])
    with pytest.raises(AssertionError, match="slope of Wrong"):
        check_operator(Wrong())
