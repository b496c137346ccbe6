"""Sizes that modules state, and those that they state of something else."""

from typing import Any

import torch
from conformance import Made
from torch import Tensor, fx, nn
from torch.nn import functional
from two_layers import X

import dagrow
from dagrow.axes._attribute_sizes import changed_attributes, with_attributes
from dagrow.tracing import AttributeInt
from dagrow.tracing._attribute_int import AttributeUses


def test_owners_of_functions_keep_what_else_they_state() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return functional.linear(functional.linear(x, m.weight, m.bias).relu(), m.last)

    weight, bias, last = (nn.Parameter(torch.randn(size)) for size in ((8, 6), (8,), (3, 8)))
    parts = {"weight": weight, "bias": bias, "last": last, "in_features": 6, "out_features": 8}
    model = Made(forward, parts).double().eval()
    dag = dagrow.trace(model, X)
    axis = next(axis for axis in dag.axes if axis.growable)
    batches = [(X, torch.zeros(4, 3, dtype=torch.float64))]
    operators = [dagrow.AddNeurons(k=2, init="zero", axes=(axis.name,))]
    dagrow.propose(dag, batches, nn.functional.mse_loss, operators)[0].apply(0.0)
    assert (model.in_features, model.out_features) == (6, 10)
    assert model.weight.shape == (10, 6)


def test_numbers_that_modules_state_are_told_from_others() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    width = AttributeInt(4, ("part", "width", None), AttributeUses())
    node = graph.call_method("view", (x, -1, width, 4))
    arguments = with_attributes((node.args, dict(node.kwargs)), {("part", "width", None): 6})
    assert arguments == ((x, -1, 6, 4), {})
    assert changed_attributes({node: arguments}) == {("part", "width", None): 6}
    assert not changed_attributes({node: ((x, -1, 4, 7), {})})
    assert with_attributes((node.args, {}), {("other", "width", None): 6}) == (node.args, {})
