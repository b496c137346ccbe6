"""New units that leave the function as it is."""

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
