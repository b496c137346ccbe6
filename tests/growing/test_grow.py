"""The verbs: losses, inputs and batches in every form give the same growth."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from verbs import BATCHES, Net, X, Y, mean, traced

import dagrow
from dagrow import AddNeurons, MoveWeights

OPERATORS = [MoveWeights(ridge=1e-3), AddNeurons(k=2, ridge=1e-3)]


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


def test_one_operator_needs_no_list() -> None:
    assert dagrow.grow(traced(), BATCHES, mean, AddNeurons(k=1, ridge=1e-3)).neurons == 1  # type: ignore[arg-type]


def test_a_growth_at_half_its_amplitude() -> None:
    dag = traced()
    growth = dagrow.propose(dag, BATCHES, mean, OPERATORS[1:])[0]
    predicted = growth.loss(0.25)
    receipt = growth.apply(0.25)
    assert receipt.loss_after == pytest.approx(predicted, rel=1e-12)
    assert float(functional.mse_loss(dag.model(X), Y).detach()) * 2 == pytest.approx(predicted, rel=1e-9)
