"""Comparisons of sizes whose other branch raises belong to the model: they speak in its own words."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dagrow
from dagrow import GrowthError

torch.manual_seed(0)
X = torch.randn(40, 5, 4).double()
BATCHES = [(X, torch.randn(40, 5, 2).double())]


class Net(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.a, self.b = function, nn.Linear(4, 8), nn.Linear(8, 2)
        self.width, self.longest = 8, 6
        self.double()

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def asserting(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    assert h.shape[-1] == 8, "eight wide"
    return m.b(h.relu())


def raising(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    if h.size(-1) != m.width:
        raise ValueError(f"{h.shape[-1]} wide, not {m.width}")
    return m.b(h.relu())


def checking(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    torch._check(h.size(-1) == 8, lambda: "checked: eight")
    return m.b(h.relu())


def torch_asserting(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    torch._assert(h.size(-1) <= 8, "at most eight")
    return m.b(h.relu())


def dividing(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    assert h.shape[-1] % 4 == 0
    return m.b(h.relu())


def counting(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    if h.numel() != x.shape[0] * x.shape[1] * 8:
        raise KeyError("entries")
    return m.b(h.relu())


def of_layer(m: Any, x: Tensor) -> Any:
    if m.a.out_features != 8:
        raise ValueError("the layer is wider")
    return m.b(m.a(x).relu())


def with_a_literal(m: Any, x: Tensor) -> Any:
    h = m.a(x).view(x.shape[0], -1, 8)
    assert h.shape[-1] == 8, "eight wide"
    return m.b(h.relu())


def helped(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    _check_width(h, 8)
    return m.b(h.relu())


def _check_width(h: Tensor, width: int) -> None:
    if h.shape[-1] != width:
        raise TypeError("helper says no")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (asserting, "AssertionError: eight wide"),
        (raising, "ValueError: 9 wide, not 8"),
        (checking, "RuntimeError: checked: eight"),
        (torch_asserting, "AssertionError: at most eight"),
        (dividing, "AssertionError: assert"),
        (counting, "KeyError: 'entries'"),
        (of_layer, "ValueError: the layer is wider"),
        (with_a_literal, "AssertionError: eight wide"),
        (helped, "TypeError: helper says no"),
    ],
)
def test_an_axis_whose_width_the_model_refuses_says_what_the_model_says(function: Any, words: str) -> None:
    reason = str(dagrow.trace(Net(function), X[:2]).axis("a").reason)
    assert f"the model's forward would raise {words}" in reason
    assert "[test_guards.py:" in reason


class Symbolic(nn.Module):
    """Its forward asks for the width of a layer, and can be followed without an example."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.a, self.b = width, nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        if self.a.out_features > self.width:
            raise ValueError("too wide")
        return self.b(self.a(x).relu())


def test_without_an_example_a_comparison_that_comes_out_otherwise_asks_for_one() -> None:
    assert "give trace example inputs" in str(dagrow.trace(Symbolic(8)).axis("a").reason)
    assert "ValueError: too wide" in str(dagrow.trace(Symbolic(8), torch.randn(2, 4)).axis("a").reason)
    assert dagrow.trace(Symbolic(9)).axis("a").growable


def up_to_twelve(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    assert h.shape[-1] <= 12, f"at most 12, got {h.shape[-1]}"
    return m.b(h.relu())


def test_a_width_that_the_model_takes_grows_and_a_larger_one_is_refused() -> None:
    model = Net(up_to_twelve)
    dag = dagrow.trace(model, X[:2])
    with pytest.raises(GrowthError, match=r"axis a cannot grow by 5: .*AssertionError: at most 12, got 13"):
        dag.widening(dag.axis("a"), 5)
    dagrow.propose(dag, BATCHES, functional.mse_loss, [dagrow.AddNeurons(k=4, init="zero")])[0].apply()
    assert type(model) is Net
    assert model.a.out_features == 12


def like_the_layer(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    assert h.shape[-1] == m.a.out_features == m.b.in_features
    return m.b(h.relu())


def like_the_layer_with_a_literal(m: Any, x: Tensor) -> Any:
    h = m.a(x).view(x.shape[0], -1, 8)
    assert h.shape[-1] == m.a.out_features
    return m.b(h.relu())


def like_an_attribute(m: Any, x: Tensor) -> Any:
    h = m.a(x).view(x.shape[0], -1, m.width)
    if h.shape != (*x.shape[:2], m.width):
        raise ValueError("another shape")
    return m.b(h.relu())


@pytest.mark.parametrize("function", [like_the_layer, like_the_layer_with_a_literal, like_an_attribute])
def test_what_follows_the_width_does_not_refuse_it(function: Any) -> None:
    model = Net(function)
    dag = dagrow.trace(model, X[:2])
    before = model(X)
    dagrow.propose(dag, BATCHES, functional.mse_loss, [dagrow.AddNeurons(k=4, init="zero")])[0].apply()
    torch.testing.assert_close(model(X), before)


def too_long(m: Any, x: Tensor) -> Any:
    if x.shape[1] > m.longest:
        raise ValueError(f"at most {m.longest} positions, got {x.shape[1]}")
    return m.b(m.a(x).view(x.shape[0], -1, 8).relu())


def too_long_behind_the_literal(m: Any, x: Tensor) -> Any:
    h = m.a(x).view(x.shape[0], -1, 8).relu()
    if h.shape[1] > m.longest:
        raise KeyError("too long")
    return m.b(h)


def too_long_for_torch(m: Any, x: Tensor) -> Any:
    torch._assert(x.size(1) <= 6, "torch says so")
    return m.b(m.a(x).view(x.shape[0], -1, 8).relu())


def checked_by_torch(m: Any, x: Tensor) -> Any:
    torch._check(x.size(1) <= 6, lambda: f"not {x.size(1)}")
    return m.b(m.a(x).view(x.shape[0], -1, 8).relu())


def narrow(m: Any, x: Tensor) -> Any:
    assert x.size(1) < 7, "a position too many"
    return m.b(m.a(x).view(x.shape[0], -1, 8).relu())


@pytest.mark.parametrize(
    "function", [too_long, too_long_behind_the_literal, too_long_for_torch, checked_by_torch, narrow]
)
@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_written_forward_raises_what_the_users_own_raises(function: Any, copied: Any) -> None:
    model, long = Net(function), torch.randn(2, 9, 4).double()
    with pytest.raises(Exception) as before:  # noqa: PT011
        model(long)
    for _ in range(2):
        dag = dagrow.trace(model, X[:2])
        dagrow.propose(dag, BATCHES, functional.mse_loss, [dagrow.AddNeurons(k=2, init="zero")])[0].apply()
        assert type(model) is not Net
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(type(before.value)) as after:
            copied(model)(long)
        assert (type(after.value), str(after.value)) == (type(before.value), str(before.value))
        assert all(map(torch.equal, state.values(), model.state_dict().values()))


def branching(m: Any, x: Tensor) -> Any:
    h = m.a(x).view(x.shape[0], -1, 8).relu()
    return m.b(h[:, :6] if h.shape[1] > 6 else h)


def test_a_branch_that_raises_nothing_is_refused_or_followed_where_an_example_shows_it() -> None:
    model, long = Net(branching), torch.randn(2, 9, 4).double()
    alone, before = copy.deepcopy(model), model(long)
    operators = [dagrow.AddNeurons(k=2, init="zero")]
    dagrow.propose(dagrow.trace(alone, X[:2]), BATCHES, functional.mse_loss, operators)[0].apply()
    with pytest.raises(dagrow.TraceError, match=r"holds only where .* also="):
        alone(long)
    dagrow.propose(dagrow.trace(model, X[:2], also=[long]), BATCHES, functional.mse_loss, operators)[0].apply()
    torch.testing.assert_close(model(long), before)
    assert model(X).shape == (40, 5, 2)
