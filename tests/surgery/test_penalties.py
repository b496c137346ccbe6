"""A penalty on weights in the loss counts in the gain of every growth, and is blamed on nothing else."""

from collections.abc import Callable, Iterator
from typing import Any

import perceptrons
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import dagrow
from dagrow import AddConnection, AddLayer, AddNeurons, GrowthError, LossError, MoveWeights
from dagrow.operators import Operator

Penalty = Callable[[Iterator[Tensor]], Tensor | int]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def squares(weights: Iterator[Tensor]) -> Tensor | int:
    return sum(weight.square().sum() for weight in weights)


def mean_squares_of_what_trains(weights: Iterator[Tensor]) -> Tensor | int:
    return sum(weight.square().mean() for weight in weights if weight.requires_grad)


def magnitudes(weights: Iterator[Tensor]) -> Tensor | int:
    return sum(weight.abs().sum() for weight in weights)


def rows(weights: Iterator[Tensor]) -> Tensor | int:
    return sum(weight.norm(dim=1).sum() for weight in weights if weight.ndim == 2)


def columns(weights: Iterator[Tensor]) -> Tensor | int:
    return sum(weight.norm(dim=0).sum() for weight in weights if weight.ndim == 2)


def orthogonality(weights: Iterator[Tensor]) -> Tensor | int:
    return sum((w @ w.T - torch.eye(len(w)).to(w)).square().sum() for w in weights if w.ndim == 2)


def largest_singular_value(weights: Iterator[Tensor]) -> Tensor | int:
    return sum(torch.linalg.matrix_norm(weight, 2) for weight in weights if weight.ndim == 2)


def stepping(penalty: Penalty, share: float = 0.01) -> Callable[[nn.Module, Any], Tensor]:
    return lambda model, batch: mse_loss(model(batch[0]), batch[1]) + share * penalty(model.parameters())


OPERATORS = [
    MoveWeights(),
    AddNeurons(k=2),
    AddNeurons(k=2, solver="joint"),
    AddNeurons(k=1, init="random"),
    AddNeurons(k=1, init="copy"),
    AddNeurons(k=1, init="gradmax"),
    AddConnection(),
    AddLayer(2),
]
PENALTIES = [
    squares,
    mean_squares_of_what_trains,
    magnitudes,
    rows,
    columns,
    orthogonality,
    largest_singular_value,
]


@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda penalty: penalty.__name__)
def test_the_gain_is_the_slope_of_the_whole_loss(penalty: Penalty, operator: Operator) -> None:
    dag = dagrow.trace(perceptrons.mlp(3, 5, 4, 2), torch.randn(2, 3).double())
    growths = dagrow.propose(dag, perceptrons.data(), step=stepping(penalty), operators=[operator])
    assert growths
    for growth in growths:  # just above 0, as norms and magnitudes of new entries have a kink there
        h, loss = 1e-7, growth.losses()
        slope = (4 * loss(h) - loss(2 * h) - 3 * loss(0.0)) / (2 * h)
        assert -growth.gain == pytest.approx(slope, rel=1e-4, abs=1e-8)
        assert sum(growth.gain_from.values()) == pytest.approx(growth.gain, rel=1e-9, abs=1e-15)
        if growth.gain_from.keys() - {edge.name for edge in dag.edges}:
            assert any("penalty on weights" in note for note in growth.notes) or not growth.neurons


def test_without_a_penalty_there_is_no_note() -> None:
    dag = dagrow.trace(perceptrons.mlp(3, 5, 4, 2), torch.randn(2, 3).double())
    for growth in dagrow.propose(dag, perceptrons.data(), mse_loss, OPERATORS):
        assert not any("penalty" in note for note in growth.notes)
        assert not any("penalty" in place for place in growth.gain_from)


def test_a_penalty_in_a_loss_that_knows_the_model() -> None:
    model = perceptrons.mlp(3, 5, 2)
    dag = dagrow.trace(model, torch.randn(2, 3).double())

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return mse_loss(output, target) + 0.01 * squares(model.parameters())

    (growth,) = dagrow.propose(dag, perceptrons.data(), loss, [AddNeurons(k=2)])
    assert growth.gain == pytest.approx((growth.loss(-1e-5) - growth.loss(1e-5)) / 2e-5, rel=1e-6)


def test_beside_a_sum_over_samples_a_penalty_counts_once_a_batch() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        return mse_loss(model(batch[0]), batch[1], reduction="sum") + squares(model.parameters())

    dag = dagrow.trace(perceptrons.mlp(3, 5, 2), torch.randn(2, 3).double())
    for growth in dagrow.propose(dag, perceptrons.data(70), step=step, operators=OPERATORS[:2], reduction="sum"):
        assert growth.gain == pytest.approx((growth.loss(-1e-5) - growth.loss(1e-5)) / 2e-5, rel=1e-6)


def test_what_is_applied_has_the_loss_that_was_predicted() -> None:
    batches = perceptrons.data()
    dag, step = dagrow.trace(perceptrons.mlp(3, 5, 2), batches[0][0][:2]), stepping(squares, 1e-4)
    receipt = dagrow.grow(dag, batches, step=step, operators=[MoveWeights(), AddNeurons(k=2)])
    assert len(receipt.parts) == 2
    assert receipt.loss_after < receipt.loss_before
    with torch.no_grad():
        after = sum(float(step(dag.model, batch)) * len(batch[0]) for batch in batches) / 60
    assert receipt.loss_after == pytest.approx(after, rel=1e-12)


def test_frozen_weights_pay_no_penalty_that_asks_what_trains() -> None:
    model = perceptrons.mlp(3, 5, 2).requires_grad_(False)
    dag, step = dagrow.trace(model, torch.randn(2, 3).double()), stepping(mean_squares_of_what_trains)
    (growth,) = dagrow.propose(dag, perceptrons.data(), step=step, operators=[AddNeurons(k=2)])
    assert growth.gain == pytest.approx((growth.loss(-1e-5) - growth.loss(1e-5)) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("operator", [MoveWeights(), AddNeurons(k=1), AddNeurons(k=1, init="copy")], ids=repr)
def test_parameters_that_a_step_keeps_for_itself(operator: Operator) -> None:
    model = perceptrons.mlp(3, 5, 2)
    dag, kept = dagrow.trace(model, torch.randn(2, 3).double()), [*model.parameters()]

    def step(model: nn.Module, batch: Any) -> Tensor:
        return mse_loss(model(batch[0]), batch[1]) + 0.01 * squares(iter(kept))

    with pytest.raises(LossError, match=r"by a reference that it keeps.*model.parameters\(\)"):
        dagrow.propose(dag, perceptrons.data(), step=step, operators=[operator])


@pytest.mark.parametrize("init", ["optimal", "copy"])
def test_a_step_that_reads_hidden_activations_is_named(init: str) -> None:
    def step(model: Any, batch: Any) -> Tensor:
        h = model[:2](batch[0])
        return mse_loss(model[2:](h), batch[1]) + 0.1 * h.abs().mean()

    dag = dagrow.trace(perceptrons.mlp(3, 5, 2), torch.randn(2, 3).double())
    with pytest.raises(GrowthError, match=r"does not call the model itself reads hidden activations or weights"):
        dagrow.propose(dag, perceptrons.data(), step=step, operators=[AddNeurons(k=1, init=init)])


def test_hidden_activations_beside_the_output_are_no_part_of_the_slope() -> None:
    seen: list[Tensor] = []
    model = perceptrons.mlp(3, 5, 2)
    model[1].register_forward_hook(lambda *at: seen.append(at[2]))

    def step(model: nn.Module, batch: Any) -> Tensor:
        return mse_loss(model(batch[0]), batch[1]) + 0.1 * seen.pop().abs().mean()

    dag = dagrow.trace(model, torch.randn(2, 3).double())
    seen.clear()
    (growth,) = dagrow.propose(dag, perceptrons.data(), step=step, operators=[AddNeurons(k=2)])
    assert growth.gain == pytest.approx((growth.loss(-1e-5) - growth.loss(1e-5)) / 2e-5, rel=1e-6)
