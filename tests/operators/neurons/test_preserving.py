"""New units that leave the function as it is."""

from typing import Any

import pytest
import torch
from perceptrons import data, mlp
from torch import nn
from torch.nn.functional import mse_loss

import dagrow
from dagrow import AddNeurons


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_gradmax_is_refused_where_zero_does_not_stay_zero() -> None:
    dag = dagrow.trace(mlp(3, 2, 2, act=nn.Sigmoid), torch.randn(2, 3).double())
    with pytest.raises(dagrow.DagrowError, match="a zero does not stay zero"):
        dagrow.propose(dag, data(), mse_loss, [AddNeurons(k=1, init="gradmax")])


@pytest.mark.parametrize("init", ["zero", "copy", "gradmax"])
def test_new_units_are_silent_copies_or_blind(init: Any) -> None:
    """They have a fan-in or a fan-out to learn from, and the function is as it was."""
    model, batches = mlp(3, 2, 2), data(n=20)
    ((x, _),) = batches
    before, rows, columns = model(x), model[0].weight.detach().clone(), model[2].weight.detach().clone()
    dag = dagrow.trace(model, x)
    dagrow.propose(dag, batches, mse_loss, [AddNeurons(k=2, init=init)])[0].apply(1.0)
    torch.testing.assert_close(model(x), before)
    new_rows, new_columns = model[0].weight[2:], model[2].weight[:, 2:]
    assert bool(new_rows.any()) == (init != "gradmax")
    assert bool(new_columns.any()) == (init != "zero")
    if init == "copy":
        source = torch.cdist(new_rows, rows).argmin(1)
        assert torch.equal(new_rows, rows[source])
        torch.testing.assert_close(new_columns, columns[:, source] / 2)  # of two units, each is copied once
