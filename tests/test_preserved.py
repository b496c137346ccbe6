"""Growth that the graph cannot see to be wrong is refused when it is applied, in both modes, with nothing changed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance import Made
from torch import Tensor, nn

import dagrow
from dagrow import GrowthError, TraceError

X = torch.randn(4, 6, dtype=torch.float64)


def made(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    torch.manual_seed(0)
    return Made(forward, {"a": nn.Linear(6, 8), "b": nn.Linear(8, 3), **parts}).double().eval()


def counting(m: Any, x: Tensor) -> Any:
    h = m.a(x).view(-1, m.n, 4)
    if m.training:
        h = h * m.n
    return m.b(h.flatten(1))


def scaling(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    return m.b(h * m.scale if m.training else h)


def assisted(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    return (m.b(h), m.aux(h)) if m.training else m.b(h)


def picking(m: Any, x: Tensor) -> Any:
    return m.b(m.acts[m.n](m.a(x).view(-1, m.n, 4)).flatten(1))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (made(counting, n=2), "its output would change in training"),
        (
            made(picking, n=2, acts=nn.ModuleList([nn.ReLU(), nn.Tanh(), nn.GELU(), nn.SiLU(), nn.ELU()])),
            "would change",
        ),
    ],
)
def test_a_growth_that_would_change_the_function_is_refused(model: nn.Module, why: str) -> None:
    before = copy.deepcopy(model.state_dict())
    dag = dagrow.trace(model, X)
    batches = [(X, torch.zeros(4, 3, dtype=torch.float64))]
    axis = next(axis.name for axis in reversed(dag.axes) if axis.growable)
    operator = dagrow.AddNeurons(k=2, axes=(axis,), init="zero")
    with pytest.raises(GrowthError, match=why):
        dagrow.propose(dag, batches, nn.functional.mse_loss, [operator])[0].apply(0.0)
    assert not model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def looping(m: Any, x: Tensor) -> Any:
    h = m.a(x).view(x.shape[0], -1, 2, 4).relu().flatten(2)
    return m.b((h * 2 if x.shape[1] > 5 else h).mean(1))


def halved(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x).view(x.shape[0], -1, 2, 4).relu().flatten(2).sum(1) * (1 / x.shape[1]))


def unbound(m: Any, x: Tensor) -> Any:
    first, *_, last = m.a(x).view(x.shape[0], -1, 2, 4).relu().flatten(2).unbind(1)
    return m.b(first + last)


@pytest.mark.parametrize("forward", [looping, halved, unbound])
def test_a_written_forward_refuses_sizes_that_it_does_not_hold_for(forward: Callable[..., Any]) -> None:
    model, x = made(forward), torch.randn(4, 5, 6, dtype=torch.float64)
    dag = dagrow.trace(model, x)
    axis = next(axis.name for axis in dag.axes if axis.growable)
    batches = [(x, torch.zeros(4, 3, dtype=torch.float64))]
    operator = dagrow.AddNeurons(k=2, axes=(axis,), init="zero")
    before = model(x)
    dagrow.propose(dag, batches, nn.functional.mse_loss, [operator])[0].apply(0.0)
    assert torch.allclose(model(x), before)
    assert model(torch.randn(3, 5, 6, dtype=torch.float64)).shape == (3, 3)
    with pytest.raises(TraceError, match="holds only where"):
        model(torch.randn(2, 7, 6, dtype=torch.float64))
    again = copy.deepcopy(model)
    assert torch.equal(again(x), model(x))


def placing(m: Any, x: Tensor) -> Any:
    place = m.place if x.shape[0] == m.place.shape[0] else m.place.expand(x.shape[0], -1, -1)
    return m.b(m.a(x + place).view(x.shape[0], -1, 2, 4).relu().flatten(2).mean(1))


def test_a_comparison_that_makes_no_difference_does_not_count() -> None:
    model, x = made(placing, place=nn.Parameter(torch.randn(1, 5, 6))), torch.randn(4, 5, 6, dtype=torch.float64)
    dag = dagrow.trace(model, x)
    batches = [(x, torch.zeros(4, 3, dtype=torch.float64))]
    axis = next(axis.name for axis in dag.axes if axis.growable)
    before = model(x[:1])
    operator = dagrow.AddNeurons(k=2, axes=(axis,), init="zero")
    dagrow.propose(dag, batches, nn.functional.mse_loss, [operator])[0].apply(0.0)
    assert torch.allclose(model(x[:1]), before)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (made(scaling, scale=nn.Parameter(torch.rand(8))), "scale, which is used in training only"),
        (made(assisted, aux=nn.Linear(8, 3)), "aux, which is used in training only"),
    ],
)
def test_what_is_used_in_the_other_mode_only_freezes_the_axis_that_it_shares(model: nn.Module, why: str) -> None:
    axis = dagrow.trace(model, X).axis("a")
    assert not axis.growable
    assert why in str(axis.reason)
    assert dagrow.trace(model.train(), X).axis("a").growable


def test_what_is_used_in_neither_mode_freezes_nothing() -> None:
    model = made(lambda m, x: m.b(m.a(x)), idle=nn.Linear(8, 8))
    assert dagrow.trace(model, X).axis("a").growable


def test_a_part_of_its_own_in_the_other_mode_freezes_nothing() -> None:
    model = made(
        lambda m, x: m.b(m.a(x)) + (m.c(m.aux(x)) if m.training else 0), aux=nn.Linear(6, 4), c=nn.Linear(4, 3)
    )
    assert dagrow.trace(model, X).axis("a").growable
