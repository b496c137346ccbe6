"""Widths that are laid out over several dimensions grow along one of them."""

import torch
from torch import Tensor, nn

import dagrow


class Heads(nn.Module):
    """Two heads of three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(-1, 2, 3).relu().flatten(1))


def test_a_width_of_heads_grows_in_every_head() -> None:
    dag = dagrow.trace(Heads(), torch.randn(5, 4))
    axis = dag.axis("a")
    assert axis.growable
    assert axis.layout.rows["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    plan = dag.widening(axis, 1)
    assert plan.rows["a"].new.tolist() == plan.columns["b"].new.tolist() == [[3, 7]]
    assert [args[1:] for args, _ in plan.literals.values()] == [(-1, 2, 4)]
