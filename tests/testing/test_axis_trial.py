"""Trying out axes: at once where that is possible, and with the same result as one by one."""

import pytest
import torch
from torch import Tensor, nn

import dagrow
from dagrow.layers import OperationRule
from dagrow.testing._axis_trial import _Trial, try_axes, try_axis

INPUTS = [torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (5, 3)]


class Paths(nn.Module):
    """Eight hidden layers side by side, some of which are not what they seem.

    Attributes:
        mixing: paths with an operation that the tests tell lies about.
        cut: paths that no gradient passes.
    """

    def __init__(self, mixing: tuple[int, ...] = (), cut: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.ModuleList(nn.Linear(4, 3) for _ in range(8))
        self.second = nn.ModuleList(nn.Linear(3, 2) for _ in range(8))
        self.mixing, self.cut = mixing, cut

    def forward(self, x: Tensor) -> Tensor:
        total = x[:, :2]
        for i, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            h = torch.relu(first(x))
            y = second(torch.special.softmax(h, -1) if i in self.mixing else h)
            total = total + (y.detach() if i in self.cut else y)
        return total


@pytest.mark.parametrize("wrong", [{}, {"mixing": (2,)}, {"cut": (5,)}, {"mixing": (0, 3, 7), "cut": (1, 6)}])
def test_all_at_once_finds_what_one_by_one_finds(
    wrong: dict[str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lie = OperationRule((torch.special.softmax,), "pointwise")
    dag = dagrow.trace(Paths(**wrong).double(), INPUTS[0], rules=[lie])
    alone = {axis.name: try_axis(dag, axis.name, INPUTS) for axis in dag.axes if axis.growable}
    tried: list[int] = []
    one = _Trial.of
    monkeypatch.setattr(_Trial, "of", lambda self, axes: tried.append(len(axes)) or one(self, axes))  # type: ignore[func-returns-value]
    assert try_axes(dag, INPUTS) == alone
    expected = {
        f"first.{i}": "the output changes"
        if i in wrong.get("mixing", ())
        else "no gradient reaches the new entries"
        if i in wrong.get("cut", ())
        else None
        for i in range(8)
    }
    assert alone == expected
    assert tried[0] == 8
    assert len(tried) == 1 or wrong


def test_units_that_are_dead_for_one_sign_are_tried_with_the_other() -> None:
    """A rectifier behind positive inputs passes a unit, or its negative, or a part of each."""
    inputs = [x.abs() for x in INPUTS]
    model = Paths().double()
    for layer in model.first:
        nn.init.zeros_(layer.bias)
    assert set(try_axes(dagrow.trace(model, inputs[0]), inputs, k=1).values()) == {None}
