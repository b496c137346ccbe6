"""A written forward under autocast: types that forward reads of tensors follow it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dagrow
from dagrow.surgery import Draft
from dagrow.surgery._apply import apply

torch.manual_seed(0)
X = torch.randn(10, 4)


class Net(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.a, self.b = function, nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def hidden(m: Any, x: Tensor) -> Tensor:
    return m.a(x).view(-1, 8).relu()


def back_to_its_type(m: Any, x: Tensor) -> Any:
    h = hidden(m, x)
    y = m.b(h)
    return y.float().softmax(-1).to(y.dtype)


def made_of_its_type(m: Any, x: Tensor) -> Any:
    h = hidden(m, x)
    return torch.ones(x.shape[0], 2, dtype=h.dtype) + m.b(h)


def masked_with_its_least(m: Any, x: Tensor) -> Any:
    y = m.b(hidden(m, x))
    return y.masked_fill(y > 0, torch.finfo(y.dtype).min)


def of_one_type(m: Any, x: Tensor) -> Any:
    return m.b(hidden(m, x)).to(torch.float64)


@pytest.mark.parametrize("function", [back_to_its_type, made_of_its_type, masked_with_its_least, of_one_type])
@pytest.mark.parametrize("traced", [None, torch.bfloat16])
def test_a_written_forward_follows_autocast(function: Any, traced: torch.dtype | None) -> None:
    model, types = Net(function).eval(), (None, torch.bfloat16, torch.float16)

    def outputs() -> list[Tensor]:
        values = []
        for dtype in types:
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None), torch.no_grad():
                values.append(model(X))
        return values

    before = outputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=traced is not None):
        dag = dagrow.trace(model, X)
        axis = dag.axis("a")
        assert axis.growable, axis.reason
    apply(dag, Draft(dag, [(axis, dag.widening(axis, 3))]).change(), 0.0)
    assert type(model) is not Net
    for old, new in zip(before, outputs(), strict=True):
        assert old.dtype == new.dtype
        torch.testing.assert_close(new, old)


def otherwise_under_autocast(m: Any, x: Tensor) -> Any:
    y = m.b(hidden(m, x))
    return y * 2 if torch.is_autocast_enabled("cpu") else y


def test_a_forward_that_does_other_things_under_autocast_is_not_written() -> None:
    axis = dagrow.trace(Net(otherwise_under_autocast), X).axis("a")
    assert "which does other things under autocast" in str(axis.reason)


def failing_under_autocast(m: Any, x: Tensor) -> Any:
    if torch.is_autocast_enabled("cpu"):
        raise RuntimeError("no autocast")
    return m.b(hidden(m, x))


def test_a_forward_that_fails_under_autocast_fails_there_when_it_is_written() -> None:
    model = Net(failing_under_autocast)
    dag = dagrow.trace(model, X)
    apply(dag, Draft(dag, [(dag.axis("a"), dag.widening(dag.axis("a"), 3))]).change(), 0.0)
    model(X)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(dagrow.TraceError, match="traced without autocast"):
        model(X)
