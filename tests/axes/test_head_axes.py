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


def test_a_width_of_heads_grows_in_every_head_or_by_a_head() -> None:
    dag = dagrow.trace(Heads(), torch.randn(5, 4))
    channel, head = dag.axis("a[0]"), dag.axis("a[1]")
    assert channel.layout.rows["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert head.layout.rows["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    for axis, new, sizes in [(channel, [[3, 7]], (-1, 2, 4)), (head, [[6, 7, 8]], (-1, 3, 3))]:
        plan = dag.widening(axis, 1)
        assert plan.rows["a"].new.tolist() == plan.columns["b"].new.tolist() == new
        assert [args[1:] for args, _ in plan.literals.values()] == [sizes]
