"""Brute force against loops and numpy."""

import numpy as np
import pytest
import torch
from perceptrons import mlp
from torch import nn

import dagrow
from dagrow.testing._brute_force import regressed, targets_of
from dagrow.testing._cases import squared_error


@pytest.mark.parametrize("twins", [0, 2])
def test_what_a_regression_explains(twins: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(20, 4).double(), torch.randn(20, 3).double()
    x = torch.cat([x * torch.tensor([1.0, 1e4, 1e-4, 1.0]).double(), 3 * x[:, :twins]], 1)
    unit = (x / x.norm(dim=0)).numpy()
    expected = unit @ np.linalg.lstsq(unit, y.numpy(), rcond=1e-7)[0]
    np.testing.assert_allclose(regressed(x, y).numpy(), expected, atol=1e-10)
    assert not regressed(x[:, :0], y).any()


def test_the_goal_of_a_linear_layer_is_what_the_loss_wants() -> None:
    torch.manual_seed(0)
    model, x = mlp(3, 2), torch.randn(20, 3).double()
    y = torch.randn(20, 2).double()
    dag = dagrow.trace(model, x[:2])
    (growth,) = dagrow.propose(dag, [(x[:7], y[:7]), (x[7:], y[7:])], squared_error, [dagrow.MoveWeights(folds=1)])
    (target,) = targets_of(growth, [(x[:7], y[:7]), (x[7:], y[7:])], squared_error, "eval")
    goal = (y - model(x)).detach()
    reads = torch.cat([x, torch.ones(20, 1).double()], 1)
    assert target.samples == 20
    assert target.energy == pytest.approx(float(goal.square().sum()) / 20)
    torch.testing.assert_close(target.wanted, goal - regressed(reads, goal))
    torch.testing.assert_close(target.written, regressed(reads, goal))  # the best move
    assert target.fall(target.wanted) == pytest.approx(float(target.wanted.square().sum()) / 20)


def test_new_features_are_what_the_new_units_compute() -> None:
    torch.manual_seed(0)
    model, x = mlp(3, 2, 2), torch.randn(20, 3).double()
    y = torch.randn(20, 2).double()
    dag = dagrow.trace(model, x[:2])
    growth = dagrow.propose(dag, [(x, y)], squared_error, [dagrow.AddNeurons(k=2, folds=1)])[0]
    (target,) = targets_of(growth, [(x, y)], squared_error, "eval")
    tensors = growth.change.tensors(model, 1.0)
    hidden = nn.functional.linear(x, tensors["0.weight"][2:], tensors["0.bias"][2:]).tanh()
    torch.testing.assert_close(target.new, hidden - hidden.mean(0))
    slope = growth.change.slope
    torch.testing.assert_close(target.written, hidden @ slope["2.weight"][:, 2:].T + slope["2.bias"])
    assert target.offered is None  # a tanh is not linear
