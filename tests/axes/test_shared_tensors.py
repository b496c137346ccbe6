"""Tensors that act at several places, and convolutions with groups."""

import torch
from torch import nn
from zoo import Tied

import dagrow


def test_weights_of_two_names_do_not_grow() -> None:
    dag = dagrow.trace(Tied(), torch.randn(2, 3))
    frozen = {p.name for axis in dag.axes if not axis.growable for p in axis.producers}
    assert {"inner", "twin"} <= frozen
    assert all(axis.reason for axis in dag.axes if not axis.growable)


def test_a_convolution_grows_within_its_groups_where_no_group_can_be_added() -> None:
    model = nn.Sequential(
        nn.Conv1d(6, 8, 1, groups=2),
        nn.GELU(),
        nn.Conv1d(8, 6, 3, groups=2, bias=False),
        nn.Flatten(),
        nn.LayerNorm(18),
        nn.Linear(18, 2),
    ).double()
    dag = dagrow.trace(model, torch.randn(4, 6, 5, dtype=torch.float64))
    assert dag.axis("0").width == 4
    assert dag.axis("0").shared == "0 has weights of its own for every group"
    batches = [(torch.randn(8, 6, 5, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64))]
    for init in ("zero", "copy"):
        operators = [dagrow.AddNeurons(k=3, init=init, axes=("0",))]
        (growth,) = dagrow.propose(dag, batches, nn.functional.mse_loss, operators)
        before = model(batches[0][0])
        receipt = growth.apply(0.0)
        assert torch.allclose(model(batches[0][0]), before, atol=1e-12)
        assert (model[0].out_channels, model[2].in_channels, model[2].groups) == (14, 14, 2)
        receipt.undo()
