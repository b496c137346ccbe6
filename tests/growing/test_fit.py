"""A plain training loop that grows: the same as by hand."""

import copy
from typing import Any

import pytest
import torch
from test_grower import BATCHES, HELD, TWO, Never, X, Y, mse, net, traced
from torch import nn
from torch.nn import functional

import dagrow
from dagrow import (
    BatchError,
    Grower,
    LossError,
)


def test_the_optimizer_grows_along() -> None:
    dag = traced()
    optimizer = torch.optim.Adam(dag.model.parameters(), lr=1e-2)
    history = dagrow.fit(dag, BATCHES, mse, TWO, epochs=1, optimizer=optimizer)
    assert history.growths()
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in dag.model.parameters())


def test_several_optimizers_and_schedulers_train_and_grow_along() -> None:
    dag = traced()
    parts = [[p for p in dag.model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    optimizers = [torch.optim.Adam(part, lr=1e-2) for part in parts]
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in optimizers]
    before = [p.detach().clone() for part in parts for p in part]
    history = dagrow.fit(dag, BATCHES, mse, TWO, epochs=1, optimizer=optimizers, scheduler=schedulers)
    assert history.growths()
    held = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    assert all(held[id(p)].state[p]["exp_avg"].shape == p.shape for p in dag.model.parameters())
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [5e-3, 5e-3]
    pairs = zip((p for part in parts for p in part), before, strict=True)
    assert not any(p.shape == found.shape and torch.equal(p, found) for p, found in pairs)
    with pytest.raises(dagrow.DagrowError, match="another optimizer"):
        dagrow.fit(dag, BATCHES, mse, TWO, epochs=1, optimizer=optimizers[0], scheduler=schedulers)


def by_hand(dag: dagrow.Dag, epochs: int, grower: Grower | None, optimizer: torch.optim.Optimizer) -> None:
    for epoch in range(epochs):
        dag.model.train()
        for x, y in BATCHES:
            optimizer.zero_grad()
            mse(dag.model(x), y).backward()
            optimizer.step()
        if grower is not None:
            grower.step(epoch, BATCHES, HELD)


@pytest.mark.parametrize("growing", [False, True])
def test_fit_is_the_plain_loop(growing: bool) -> None:
    fitted, looped = traced(), traced()
    for dag in (fitted, looped):
        dag.model.append(nn.Dropout(0.2))
    fitted, looped = (dagrow.trace(dag.model, X[:2]) for dag in (fitted, looped))
    schedule = dagrow.EveryEpochs(2) if growing else Never()
    one, other = (torch.optim.Adam(dag.model.parameters(), lr=1e-2) for dag in (fitted, looped))
    torch.manual_seed(3)
    history = dagrow.fit(fitted, BATCHES, mse, TWO, schedule=schedule, epochs=4, optimizer=one, validation=HELD)
    torch.manual_seed(3)
    by_hand(looped, 4, Grower(looped, mse, TWO, schedule=schedule, optimizer=other) if growing else None, other)
    assert all(torch.equal(a, b) for a, b in zip(fitted.model.parameters(), looped.model.parameters(), strict=True))
    assert len(history) == 4
    assert bool(history.growths()) == growing


def test_fit_records_the_running_loss_and_restores_the_modes() -> None:
    dag = traced()
    dag.model[1].eval()
    modes = [module.training for module in dag.model.modules()]
    expected = copy.deepcopy(dag.model)
    optimizer, twin = (torch.optim.SGD(m.parameters(), lr=1e-2) for m in (dag.model, expected))
    history = dagrow.fit(dag, BATCHES, mse, TWO, schedule=Never(), epochs=1, optimizer=optimizer)
    losses = []
    for x, y in BATCHES:
        twin.zero_grad()
        value = mse(expected(x), y)
        losses.append(float(value.detach()))
        value.backward()
        twin.step()
    assert history[0].train_loss == pytest.approx(sum(losses) / len(losses))
    assert [module.training for module in dag.model.modules()] == modes


def test_fit_measures_what_it_is_told_to() -> None:
    dag, twin = traced(), traced()
    one, other = (torch.optim.SGD(d.model.parameters(), lr=1e-2) for d in (dag, twin))
    history = dagrow.fit(dag, BATCHES, mse, TWO, epochs=1, optimizer=one, measured=HELD)
    by_hand(twin, 1, None, other)
    expected = float(mse(twin.model(HELD[0][0]), HELD[0][1]).detach())
    assert history[0].grown[0].loss_before == pytest.approx(expected, rel=1e-9)


def test_learning_rates_follow_a_schedule_while_it_grows() -> None:
    dag = traced()
    optimizer = torch.optim.Adam(dag.model.parameters(), lr=1e-2)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    history = dagrow.fit(dag, BATCHES, mse, TWO, epochs=3, optimizer=optimizer, scheduler=cosine)
    assert history.growths()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-2 * (2 - 2**0.5) / 4])
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.9)
    dagrow.fit(dag, BATCHES, mse, TWO, schedule=Never(), epochs=2, optimizer=optimizer, scheduler=plateau)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * (2 - 2**0.5) / 4)


def test_a_loader_that_shuffles_gives_every_epoch_another_order() -> None:
    data, seen = torch.utils.data.TensorDataset(X, Y), []
    loader = torch.utils.data.DataLoader(data, 50, shuffle=True, generator=torch.Generator().manual_seed(3))

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        if model.training:
            seen.append(float(batch[0].sum()))
        return mse(model(batch[0]), batch[1])

    dag = traced()
    optimizer = torch.optim.SGD(dag.model.parameters(), lr=1e-2)
    dagrow.fit(dag, loader, step=step, operators=TWO, schedule=Never(), epochs=2, optimizer=optimizer)
    assert len(set(seen)) == len(seen) == 12


def test_a_step_of_ones_own_trains_and_grows() -> None:
    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.huber_loss(model(batch["x"]), batch["y"])

    dag = traced()
    optimizer = torch.optim.Adam(dag.model.parameters(), lr=1e-2)
    batches = [{"x": x, "y": y} for x, y in BATCHES]
    history = dagrow.fit(dag, batches, step=step, operators=TWO, epochs=2, optimizer=optimizer)
    assert history.growths()


@pytest.mark.parametrize("name", ["validation", "measured"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ([], BatchError, " is empty"),
        (iter(HELD), BatchError, " is a list_iterator"),
        (3, BatchError, " is a int"),
        ([(X[:, :2], Y)], RuntimeError, ", counted from 0"),
        ([(X[:0], Y[:0])], BatchError, ": a batch has no"),
        ((X, Y), BatchError, r": .* \(inputs, target\)"),
        ([(X, Y * torch.inf)], LossError, ": the loss is"),
    ],
)
def test_fit_finds_batches_that_do_not_fit_before_it_trains(
    name: str, wrong: Any, error: type[Exception], message: str
) -> None:
    dag = traced()
    optimizer = torch.optim.SGD(dag.model.parameters(), lr=1e-2)
    with pytest.raises(error, match=f"{name}{message}"):
        dagrow.fit(dag, BATCHES, mse, epochs=1, optimizer=optimizer, **{name: wrong})
    assert all(torch.equal(a, b) for a, b in zip(dag.model.parameters(), net().parameters(), strict=True))
