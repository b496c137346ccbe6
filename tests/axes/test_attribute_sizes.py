"""Sizes that modules state, and those that they state of something else."""

from typing import Any

import torch
from conformance import Made
from torch import Tensor, nn
from torch.nn import functional
from two_layers import X

import dagrow


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
