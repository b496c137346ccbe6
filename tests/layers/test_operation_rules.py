"""Rules for operations of a user's own, and what a dag says of those that no rule knows."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dagrow
from dagrow.layers import OperationRule
from dagrow.testing import try_axis


class Mystery(nn.Module):
    """Looked into, it sorts; the user knows that it is to be taken as a function of each entry."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sort(-1).values * 0 + x


class Net(nn.Module):
    def __init__(self, between: Any) -> None:
        super().__init__()
        self.a, self.between, self.b = nn.Linear(4, 6), between, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


class Function(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0(x)


class Reversed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fliplr(x)


def dag_of(between: nn.Module, *rules: OperationRule) -> dagrow.Dag:
    torch.manual_seed(0)
    return dagrow.trace(Net(between).double(), torch.randn(4, 4, dtype=torch.float64), rules=rules)


@pytest.mark.parametrize(
    ("between", "rule"),
    [
        (Mystery(), OperationRule((Mystery,), "pointwise")),
        (Function(), OperationRule((torch.special.i0,), "pointwise")),
        (Reversed(), OperationRule((torch.fliplr,), "moves")),
    ],
)
def test_a_rule_for_an_operation_lets_an_axis_grow(between: nn.Module, rule: OperationRule) -> None:
    axis = dag_of(between).axis("a")
    assert not axis.growable
    dag = dag_of(between, rule)
    assert dag.axis("a").growable
    inputs = [torch.randn(n, 4, dtype=torch.float64) for n in (4, 3)]
    if not isinstance(between, Mystery):
        assert try_axis(dag, "a", inputs) is None
    assert copy.deepcopy(dag).axis("a").growable


def test_bad_rules_are_refused() -> None:
    with pytest.raises(dagrow.DagrowError, match="neither 'pointwise' nor 'moves'"):
        OperationRule((torch.relu,), "mixes")  # type: ignore[arg-type]
    with pytest.raises(dagrow.DagrowError, match="give a tuple of functions"):
        OperationRule((3,), "moves")
    with pytest.raises(dagrow.DagrowError, match="EdgeRule, RiderRule or OperationRule"):
        dagrow.trace(nn.Linear(2, 2), torch.ones(1, 2), rules=[torch.relu])  # type: ignore[list-item]


def test_what_no_rule_knows_is_told_with_its_line_and_the_layers_that_it_freezes() -> None:
    coverage = dag_of(Function()).coverage()
    assert coverage.share == 0
    assert coverage.frozen == {"a": 30, "b": 14}
    reason = next(
        why for why in coverage.reasons if "operation special_i0 has no rule [test_operation_rules.py:" in why
    )
    assert "a" in coverage.reasons[reason] or "b" in coverage.reasons[reason]
    assert "operation special_i0 has no rule" in str(coverage).replace("\n", " ")
