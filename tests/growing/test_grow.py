"""The verbs: losses, inputs and batches in every form give the same growth."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dagrow
from dagrow import AddNeurons, MoveWeights

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 4, generator=GENERATOR).double()
Y = X[:, :2] * X[:, 2:]
BATCHES = [(X, Y)]
OPERATORS = [MoveWeights(ridge=1e-3), AddNeurons(k=2, ridge=1e-3)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.double()

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        h = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return h if scale is None else h * scale


def traced(example: Any = X) -> Any:
    return dagrow.trace(Net(), example)


def mean(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).sum(1).mean()


def split(size: int, x: Tensor = X, y: Tensor = Y) -> list[Any]:
    return list(zip(x.split(size), y.split(size), strict=True))


def test_the_losses_of_a_receipt_are_those_of_the_model() -> None:
    dag = traced()
    with torch.no_grad():
        before = float(mean(dag.model(X), Y))
    receipt = dagrow.grow(dag, BATCHES, mean, OPERATORS)
    assert receipt.loss_before == pytest.approx(before, rel=1e-12)
    assert receipt.loss_after == pytest.approx(float(mean(dag.model(X), Y).detach()), rel=1e-9)
    assert receipt.drop == pytest.approx(sum(part.drop for part in receipt.parts))
    assert str(receipt)


def test_the_line_search_is_on_the_validation_batches() -> None:
    held_out = [(X[:20], Y[:20])]
    dag = traced()
    receipt = dagrow.grow(dag, split(20), mean, OPERATORS, validation=held_out)
    with torch.no_grad():
        assert receipt.loss_after == pytest.approx(float(mean(dag.model(X[:20]), Y[:20])), rel=1e-9)
    spoilt = dagrow.grow(traced(), BATCHES, mean, OPERATORS, validation=[(X, 2 * Net()(X).detach() - Y)])
    assert spoilt.loss_after <= spoilt.loss_before


def test_nothing_is_added_where_nothing_is_to_be_gained() -> None:
    dag = traced()
    target = dag.model(X).detach()
    count = dag.parameter_count()
    receipt = dagrow.grow(dag, [(X, target + 1e-30)], mean, [AddNeurons()])
    assert (receipt.neurons, receipt.gamma, dag.parameter_count()) == (0, 0.0, count)
    assert "nothing added" in str(receipt)
    receipt.undo()


def test_proposals_print_and_are_sorted() -> None:
    growths = dagrow.propose(traced(), BATCHES, mean, OPERATORS)
    held = [growth.heldout_gain for growth in growths]
    assert held == sorted(held, reverse=True)
    assert all("gain" in str(growth) for growth in growths)


def test_bottlenecks_are_a_mapping_that_prints() -> None:
    found = dagrow.bottlenecks(traced(), BATCHES, mean)
    assert set(found) == {"a", "b", "c"}
    values = [found[name].bottleneck for name in found]
    assert values == sorted(values, reverse=True)
    assert all(0 <= b.share <= 1 for b in found.values())
    assert "bottleneck" in str(found)
    assert found.samples == 60


def test_one_operator_needs_no_list() -> None:
    assert dagrow.grow(traced(), BATCHES, mean, AddNeurons(k=1, ridge=1e-3)).neurons == 1  # type: ignore[arg-type]


def test_a_growth_at_half_its_amplitude() -> None:
    dag = traced()
    growth = dagrow.propose(dag, BATCHES, mean, OPERATORS[1:])[0]
    predicted = growth.loss(0.25)
    receipt = growth.apply(0.25)
    assert receipt.loss_after == pytest.approx(predicted, rel=1e-12)
    assert float(functional.mse_loss(dag.model(X), Y).detach()) * 2 == pytest.approx(predicted, rel=1e-9)
