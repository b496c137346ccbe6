"""Hooks see every call of a layer, whether it is a module or a function, and are gone afterwards."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dagrow
from dagrow.statistics import LayerHooks
from dagrow.statistics._hooks import ForwardProbe


class Mixed(nn.Module):
    """A layer that is a module, and one that is a function called with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.weight = nn.Linear(3, 4), nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(torch.tanh(self.first(x)), self.weight)


def test_every_layer_is_seen_and_its_output_may_be_replaced() -> None:
    model, x, seen = Mixed(), torch.randn(5, 3), {}
    dag = dagrow.trace(model, x)

    def observer(name: str, inputs: Tensor, output: Tensor) -> Tensor | None:
        seen[name] = inputs, output
        return 2 * output if name == "weight" else None

    expected = model(x)
    with LayerHooks(model, [dag.layer(edge.name) for edge in dag.edges], observer):
        doubled = model(x)
    assert torch.equal(doubled, 2 * expected)
    assert set(seen) == {"first", "weight"}
    assert torch.equal(seen["first"][0], x)
    assert torch.equal(seen["weight"][0], torch.tanh(seen["first"][1]))
    assert torch.equal(seen["weight"][1], expected)
    seen.clear()
    assert torch.equal(model(x), expected)
    assert not seen


def test_hooks_of_others_stay_where_an_observer_fails() -> None:
    model, x, calls = Mixed(), torch.randn(5, 3), []
    dag = dagrow.trace(model, x)
    model.first.register_forward_hook(lambda *_: calls.append("theirs"))

    def observer(name: str, inputs: Tensor, output: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), LayerHooks(model, [dag.layer("first")], observer):
        model(x)
    model(x)
    assert calls == ["theirs"]


def test_whether_the_own_forward_ran() -> None:
    model, x = Mixed(), torch.randn(5, 3)
    with ForwardProbe(model) as probe:
        model.first(x)
        assert not probe.ran
        model(x)
        assert probe.ran
    assert "forward" not in vars(model)


def test_a_layer_is_known_by_the_parameter_that_is_there_now() -> None:
    """By its transpose as well, in a list, or in a keyword; not where another one is meant."""
    model, x, seen = Mixed(), torch.randn(5, 4), []
    dag = dagrow.trace(model, torch.randn(5, 3))
    first = model.weight
    with LayerHooks(model, [dag.layer("weight")], lambda name, inputs, output: seen.append((name, inputs))):
        model.weight = nn.Parameter(torch.zeros(2, 4))
        functional.linear(x, first)
        assert not seen
        functional.linear(input=x, weight=model.weight)
        torch.mm(x, model.weight.T)
        torch.einsum("ni, oi -> no", [x, model.weight])
        torch.zeros_like(model.weight)
    assert [name for name, _ in seen] == ["weight"] * 3
    assert all(inputs is x for _, inputs in seen)
