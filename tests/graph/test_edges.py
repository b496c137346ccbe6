"""Edges and axes as values: shapes, what may move, names."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dagrow
from dagrow.graph._edges import replaced_in


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 4, (2, 1)), nn.ConvTranspose2d(3, 4, (2, 1))], ids=["plain", "transposed"]
)
def test_weights_are_seen_as_outputs_by_inputs(layer: nn.Module) -> None:
    edge = dagrow.trace(nn.Sequential(layer), torch.rand(2, 3, 5, 5)).edge("0")
    view = edge.matrix(layer.weight)
    assert view.shape == (4, 3, 2, 1)
    assert view.data_ptr() == layer.weight.data_ptr()


def test_what_an_edge_holds_and_what_may_move() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    model[0].bias.requires_grad_(False)
    first, second = dagrow.trace(model, torch.rand(2, 3)).edges
    assert (list(first.parameters()), first.bias, first.trainable) == (["weight", "bias"], True, False)
    assert (list(second.parameters()), second.bias, second.trainable) == (["weight"], False, True)
    assert second.path("weight") == "1.weight"


class Called(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 3))
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(functional.linear(x, self.weight).relu())


def test_a_layer_that_was_replaced_is_not_in_place() -> None:
    model = Called()
    edges = dagrow.trace(model, torch.rand(2, 3)).edges
    assert [*replaced_in(edges, model)] == []
    model.last, model.weight = nn.Linear(4, 2), nn.Parameter(torch.rand(4, 3))
    assert [*replaced_in(edges, model)] == [*edges]


def test_axes_of_the_same_producers_are_told_apart_by_a_number() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.left, self.right = nn.Linear(3, 6), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.both(x).split(3, 1)
            return self.left(left.relu()) + self.right(right.tanh())

    axes = dagrow.trace(Halves(), torch.rand(2, 3)).axes
    assert [axis.name for axis in axes if "both" in axis.name] == ["both[0]", "both[1]"]
    assert [[edge.name for edge in axis.consumers] for axis in axes[:2]] == [["left"], ["right"]]
