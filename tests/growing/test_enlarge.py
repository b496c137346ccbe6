"""A trained model made larger in one call: which widths, under which budget, and what stays as it was."""

from typing import Any

import pytest
import torch
from normed_net import BATCHES, X, Y, setting
from test_left_out import attending, otherwise_called
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import dagrow
from dagrow import Budget, GrowthError
from dagrow.testing import snapshot
from dagrow.testing._snapshots_and_slopes import same


def widths(dag: Any) -> dict[str, int]:
    return {axis.name: axis.width for axis in dag.axes if axis.growable}


def loss_of(model: nn.Module) -> float:
    with torch.no_grad():
        return float(mse_loss(model.eval()(X), Y))


@pytest.mark.parametrize(("factor", "expected"), [(None, (6, 8)), (1.5, (5, 6)), (3.0, (9, 12)), (1.17, (4, 5))])
def test_every_width_grows_by_the_factor_and_the_loss_does_not_rise(
    factor: float | None, expected: tuple[int, int]
) -> None:
    model, dag = setting()
    before = loss_of(model)
    receipt = dagrow.enlarge(dag, BATCHES, mse_loss, factor)
    assert tuple(widths(dag).values()) == expected
    assert receipt.neurons == sum(expected) - 7
    assert {part.where for part in receipt.parts} == {"a", "b"}
    assert receipt.loss_before == pytest.approx(before, rel=1e-6)
    assert receipt.loss_after == pytest.approx(loss_of(model), rel=1e-5)
    assert receipt.loss_after <= receipt.loss_before


@pytest.mark.parametrize("limit", ["parameters", "flops", "neurons"])
@pytest.mark.parametrize("amount", [30, 100, 400])
def test_a_budget_is_held_and_used(limit: str, amount: int) -> None:
    _, dag = setting()

    def counts() -> dict[str, int]:
        return {
            "parameters": dag.parameter_count(),
            "flops": dag.flop_count(),
            "neurons": sum(widths(dag).values()),
        }

    before = counts()
    dagrow.enlarge(dag, BATCHES, mse_loss, budget=Budget(**{limit: amount}))
    added = counts()[limit] - before[limit]
    assert 0.5 * amount < added <= amount


@pytest.mark.parametrize("limit", ["parameters", "flops"])
@pytest.mark.parametrize("amount", [200, 1_000, 10_000])
def test_a_budget_is_held_where_widths_multiply(limit: str, amount: int) -> None:
    """As heads and their size do. FLOPs are counted as growths tell them."""
    dag, batches = attending()
    receipt = dagrow.enlarge(dag, batches, mse_loss, budget=Budget(**{limit: amount}))
    growths = [part.growth for part in receipt.parts if part.growth is not None]
    assert 0.2 * amount < sum(getattr(growth.cost, limit) for growth in growths) <= amount


def test_a_budget_is_held_where_widths_add_up() -> None:
    torch.manual_seed(0)
    dag = dagrow.trace(Joined(), X)
    before = dag.parameter_count()
    dagrow.enlarge(dag, BATCHES, mse_loss, budget=Budget(parameters=150))
    assert 75 < dag.parameter_count() - before <= 150


class Joined(nn.Module):
    """What two layers write is read side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 3), nn.Linear(3, 4), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).tanh()
        return self.c(torch.cat([a, self.b(a).tanh()], 1))


@pytest.mark.parametrize("neurons", [1, 3])
def test_a_few_neurons_for_wide_layers(neurons: int) -> None:
    model = nn.Sequential(nn.Linear(5, 3_000), nn.Tanh(), nn.Linear(3_000, 2))
    dag = dagrow.trace(model, X)
    assert dagrow.enlarge(dag, BATCHES, mse_loss, 900.0, budget=Budget(neurons=neurons)).neurons == neurons


def test_widths_without_a_closed_form_grow_too() -> None:
    dag, batches = attending()
    before = widths(dag)
    receipt = dagrow.enlarge(dag, batches, mse_loss)
    assert widths(dag) == {name: 2 * width for name, width in before.items()}
    assert any("optimal" not in axis.inits for axis in dag.axes if axis.growable)
    assert {part.where for part in receipt.parts} == set(before)


def test_the_smaller_one_of_factor_and_budget_counts() -> None:
    _, dag = setting()
    dagrow.enlarge(dag, BATCHES, mse_loss, 1.5, budget=Budget(neurons=1_000))
    assert tuple(widths(dag).values()) == (5, 6)


def test_where_no_neuron_lowers_the_loss_there_are_some_that_change_nothing() -> None:
    model, dag = setting()
    with torch.no_grad():
        batches = [(X, model.eval()(X))]
    receipt = dagrow.enlarge(dag, batches, mse_loss)
    assert tuple(widths(dag).values()) == (6, 8)
    assert receipt.loss_after == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        assert float((model.eval()(X) - batches[0][1]).abs().max()) <= 1e-6


def test_the_optimizer_goes_on_and_all_can_be_undone() -> None:
    model, dag = setting()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(3):
        mse_loss(model(X), Y).backward()
        optimizer.step()
        schedule.step()
    before = snapshot(dag, optimizer)
    receipt = dagrow.enlarge(dag, BATCHES, mse_loss, optimizer=optimizer)
    assert optimizer.param_groups[0]["lr"] == 1e-2 / 8
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())
    receipt.undo()
    same(before, snapshot(dag, optimizer), "undoing")
    dagrow.enlarge(dag, BATCHES, mse_loss, optimizer=optimizer)
    loss = mse_loss(model.train()(X), Y)
    loss.backward()
    optimizer.step()
    assert mse_loss(model(X), Y) < loss


def test_a_loader_some_samples_other_batches_and_a_step() -> None:
    _, dag = setting()
    loader = DataLoader(TensorDataset(X.repeat(20, 1), Y.repeat(20, 1)), batch_size=32, shuffle=True)

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return mse_loss(model(batch[0]), batch[1])

    receipt = dagrow.enlarge(dag, loader, step=step, validation=BATCHES, samples="auto", progress=False)
    assert tuple(widths(dag).values()) == (6, 8)
    assert receipt.loss_after <= receipt.loss_before


def test_a_width_that_cannot_grow_is_left_out_and_the_others_grow() -> None:
    dag, batches = attending()
    before = widths(dag)
    receipt = dagrow.enlarge(dag, batches, step=otherwise_called)
    assert any(note.startswith("value") for note in receipt.left_out)
    assert widths(dag)["up"] == 2 * before["up"]
    assert "up" in {part.where for part in receipt.parts}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"factor": 1.0}, "above 1"),
        ({"factor": float("inf")}, "finite"),
        ({"factor": 1.01}, r"factor=1\.01 adds not one neuron to widths of 3 \(a\), 4 \(b\)"),
        ({"budget": Budget(parameters=3)}, "parameters=3.* allows not one neuron"),
        ({"budget": 100}, r"give a dagrow\.Budget"),
        ({"factor": 1e308}, "at most 1000"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))])}, "none of the parameters"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], told: str) -> None:
    _, dag = setting()
    before = snapshot(dag)
    with pytest.raises(dagrow.DagrowError, match=told):
        dagrow.enlarge(dag, BATCHES, mse_loss, **arguments)
    same(before, snapshot(dag), "refusing")


def test_nothing_changes_where_it_does_not_end() -> None:
    _, dag = setting()
    before = snapshot(dag)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if widths(dag)["a"] == 6:
            raise KeyboardInterrupt
        return mse_loss(output, target)

    with pytest.raises(KeyboardInterrupt):
        dagrow.enlarge(dag, BATCHES, loss)
    same(before, snapshot(dag), "an interrupt")


def test_nothing_that_can_grow_is_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 2))
    with pytest.raises(GrowthError, match="no axis can grow"):
        dagrow.enlarge(dagrow.trace(model, X), BATCHES, mse_loss)
