"""Growth that the graph cannot see to be wrong is refused when it is applied, in both modes, with nothing changed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from two_layers import X, made

import dagrow
from dagrow import GrowthError, TraceError
from dagrow.testing import try_axis


def counting(m: Any, x: Tensor) -> Any:
    h = m.a(x).view(-1, m.n, 4)
    if m.training:
        h = h * m.n
    return m.b(h.flatten(1))


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


def dropping(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    return functional.dropout(m.b(h.softmax(-1) if m.training else h), 0.5, m.training)


def reshaping(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    return torch.bernoulli(h.sigmoid()) if m.training else m.b(h)


def crowded(m: Any, x: Tensor) -> Any:
    assert x.shape[0] > 2
    return m.b(m.a(x).softmax(-1) if m.training else m.a(x))


def clamping(m: Any, x: Tensor) -> Any:
    if m.training:
        m.a.weight.data.clamp_(-0.1, 0.1)
    return m.b(m.a(x))


def zero(model: nn.Module, batch: Tensor) -> dagrow.Growth:
    """A growth of the hidden layer."""
    with torch.no_grad():
        target = torch.zeros_like(copy.deepcopy(model).eval()(batch))
    dag = dagrow.trace(model, batch)
    operators = [dagrow.AddNeurons(k=2, init="zero", axes=("a",))]
    return dagrow.propose(dag, [(batch, target)], nn.functional.mse_loss, operators)[0]


@pytest.mark.parametrize("forward", [dropping, reshaping, crowded])
def test_random_numbers_and_batch_sizes_hide_no_change_of_the_other_mode(forward: Callable[..., Any]) -> None:
    model = made(forward)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GrowthError, match="in training"):
        zero(model, X).apply(0.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_the_other_mode_writes_is_not_left_behind() -> None:
    model = made(clamping)
    before = copy.deepcopy(model.state_dict())
    zero(model, X).apply(0.0).undo()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tracing_computes_no_spectral_norm_for_good() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)).train()
    before = copy.deepcopy(model.state_dict())
    dagrow.trace(model, X.float()).check()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_trial_in_training_mode_is_not_misled_by_dropout() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 3)).double().train()
    assert try_axis(dagrow.trace(model, X), "0", [X, X[:3]]) is None
