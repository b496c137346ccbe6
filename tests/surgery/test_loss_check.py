"""The loss of a batch shows a width that the graph does not show, and rounding is not taken for it."""

import perceptrons
import pytest
import torch
from between import Between, dag_of, data, loss
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import mse_loss

import dagrow
from dagrow import AddNeurons, GrowthError


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_a_width_that_the_graph_does_not_show_is_caught_by_the_loss() -> None:
    dag = dag_of(Between(lambda m, h: h.tanh() / h.shape[1:].numel()), 3)
    with pytest.raises(dagrow.GrowthError, match="computes something else when first is wider"):
        dagrow.propose(dag, data(3), loss, [dagrow.AddNeurons(k=2)])


class ScaledByWidth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.tanh(h) * h.shape[1:].numel() ** -0.5)


def test_a_width_that_the_forward_computes_with_is_noticed() -> None:
    model = ScaledByWidth().double()
    dag = dagrow.trace(model, torch.randn(2, 3).double())
    with pytest.raises(dagrow.DagrowError, match="computes something else when a is wider"):
        dagrow.propose(dag, perceptrons.data(), mse_loss, [AddNeurons(k=2)])
    assert model.a.out_features == 4


def cancelling(size: float, width: int = 64) -> nn.Module:
    """Every unit is there twice, with fan-outs of opposite signs and a large size, so that rounding shows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 1))
    half, large = width // 2, size * torch.randn(1, width // 2)
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter[half:] = parameter[:half]
        model[2].weight.copy_(torch.cat([large + torch.randn(1, half), -large], 1))
    return model


def test_rounding_is_no_other_function() -> None:
    x = torch.randn(200, 6)
    batches = [(x, torch.sin(x.sum(1, keepdim=True)))]
    dag = dagrow.trace(cancelling(1e5), x)
    for operator in (dagrow.AddNeurons(k=3), dagrow.AddNeurons(k=3, init="copy")):
        growth = dagrow.propose(dag, batches, functional.mse_loss, [operator])[0]
        growth.apply(1e-6)
    assert dag.model[0].out_features == 70


def test_what_depends_on_the_width_is_refused_where_rounding_is_large_too() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = cancelling(1e3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layers[:2](x)
            return self.layers[2](h * (h.shape[1:].numel() / 64))

    x = torch.randn(200, 6)
    dag = dagrow.trace(Scaled(), x)
    with pytest.raises(GrowthError, match="computes something else"):
        dagrow.propose(dag, [(x, torch.randn(200, 1))], functional.mse_loss, [dagrow.AddNeurons(k=3)])
