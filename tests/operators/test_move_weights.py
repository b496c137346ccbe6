"""Weights that can be moved, and those that cannot."""

import pytest
import torch
from between import dag_of, data, loss
from small_net import BATCHES, MSE, setting
from torch import Tensor, nn

import dagrow
from dagrow import GrowthError, MoveWeights


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_weights_that_act_at_several_places_are_not_moved() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(3, 3), nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(8, 2)
            self.c.weight = self.b.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(torch.tanh(self.a(x)))
            return self.d(torch.cat([self.b(x), self.c(x)], 1).tanh())

    dag = dag_of(Twice(), 3)
    assert {g.where for g in dagrow.propose(dag, data(3), loss, [dagrow.MoveWeights()])} == {"d"}
    for edge in "abc":
        with pytest.raises(dagrow.GrowthError, match="more than once" if edge == "a" else "is shared with"):
            dagrow.propose(dag, data(3), loss, [dagrow.MoveWeights(edges=(edge,))])
    found = dagrow.bottlenecks(dag, data(3), loss)
    assert set(found) == {"d"}
    assert "a is called more than once" in str(found)


def test_frozen_weights_are_not_moved() -> None:
    model, dag = setting()
    model.requires_grad_(False)
    with pytest.raises(GrowthError, match="requires_grad=False"):
        dagrow.grow(dag, BATCHES, MSE, [MoveWeights(edges=("0",))])
