"""The check of operators, as users call it, and wrong operators."""

import dataclasses
from collections.abc import Sequence

import pytest

import dagrow
from dagrow import AddNeurons, MoveWeights, testing
from dagrow.operators import Candidate, Operator, Stage
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
        return [WrongCandidate(self, inner) for inner in AddNeurons(k=1, folds=1).candidates(dag)]


class WrongCandidate(Candidate):
    def __init__(self, operator: Wrong, inner: Candidate) -> None:
        self.operator, self.inner = operator, inner

    def pairs(self):
        return self.inner.pairs()

    def solve(self, moments, objective):
        found = self.inner.solve(moments, objective)
        if not isinstance(found, dagrow.Growth):
            return None if found is None else WrongStage(found, self.operator)
        return found


class WrongStage(Stage):
    def __init__(self, inner, operator: Wrong) -> None:
        self.inner, self.operator = inner, operator
        self.axis, self.widening = inner.axis, inner.widening

    def pairs(self):
        return self.inner.pairs()

    def fill(self, draft) -> None:
        self.inner.fill(draft)

    def solve(self, moments, objective):
        found = self.inner.solve(moments, objective)
        return dataclasses.replace(found, gain=found.gain * self.operator.factor)


def test_an_operator_that_promises_too_much_is_found_out() -> None:
    check_operator(Wrong(factor=1.0), laws=[testing.preservation])
    with pytest.raises(AssertionError, match="slope of Wrong"):
        check_operator(Wrong())
