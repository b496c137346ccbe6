"""Optimizer state follows its parameters: old entries bit-equal, new ones as the optimizer begins with them."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimized import BATCHES, OPTIMIZERS, X, Y, grow, net, step, trained
from torch import Tensor, nn
from torch.nn import functional

import dagrow
from dagrow import OptimizerError


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    found = {name: optimizer.state.get(p, {}) for name, p in model.named_parameters()}
    return {name: {k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()} for name, s in found.items()}


def expected(state: Tensor, shape: torch.Size, new: float | Tensor = 0.0) -> Tensor:
    """New entries come last in this model."""
    padded = torch.zeros(shape, dtype=state.dtype) + new
    padded[tuple(slice(0, size) for size in state.shape)] = state
    return padded


def assert_padded(before: dict[str, dict[str, Any]], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for name, parameter in model.named_parameters():
        after = optimizer.state[parameter]
        assert after.keys() == before[name].keys()
        for key, old in before[name].items():
            if isinstance(old, Tensor) and old.ndim:
                new = {"step_size": 0.01, "ax": parameter.detach()}.get(key, 0.0)
                assert torch.equal(after[key], expected(old, parameter.shape, new)), (name, key)
            else:
                assert after[key] == old, (name, key)


@pytest.mark.parametrize("hidden", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_that_is_passed_is_padded_at_once(name: str, hidden: int) -> None:
    model, optimizer, dag = trained(OPTIMIZERS[name], hidden)
    before = states(model, optimizer)
    receipt = grow(dag, optimizer=optimizer)
    assert_padded(before, model, optimizer)
    step(model, optimizer)
    receipt.undo()
    assert states(model, optimizer).keys() == before.keys()
    for parameter in receipt.parameters:
        state, after = before[parameter], states(model, optimizer)[parameter]
        assert all(torch.equal(after[k], v) if isinstance(v, Tensor) else after[k] == v for k, v in state.items())
    step(model, optimizer)


def gradless(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step that moves nothing, but lets the optimizer's state be brought along."""
    optimizer.zero_grad()
    optimizer.step()


@pytest.mark.parametrize("hidden", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_nobody_passed_is_carried_at_its_next_step(name: str, hidden: int) -> None:
    model, optimizer, dag = trained(OPTIMIZERS[name], hidden)
    before = states(model, optimizer)
    grow(dag)
    grow(dag, 1).undo()
    grow(dag, 3)
    gradless(model, optimizer)
    assert_padded(before, model, optimizer)
    step(model, optimizer)


def test_state_of_an_undone_growth_goes_with_it() -> None:
    """Momentum of neurons that were undone must not be inherited by others that take their places."""
    model, optimizer, dag = trained(OPTIMIZERS["adam"])
    receipt = grow(dag)
    step(model, optimizer)
    before = {name: {k: v for k, v in state.items()} for name, state in states(model, optimizer).items()}
    receipt.undo()
    grow(dag)
    gradless(model, optimizer)
    momentum = optimizer.state[model[0].weight]["exp_avg"]
    assert torch.equal(momentum[:3], before["0.weight"]["exp_avg"][:3])
    assert not momentum[3:].any()


def test_neurons_in_the_place_of_undone_ones_begin_anew() -> None:
    model, optimizer, dag = trained(OPTIMIZERS["adam"])
    for passed in (True, False):
        growth = dagrow.propose(dag, BATCHES, functional.mse_loss, [dagrow.AddNeurons(k=2, init="random")])[0]
        receipt = growth.apply(0.5, **({"optimizer": optimizer} if passed else {}))
        step(model, optimizer)
        assert optimizer.state[model[0].weight]["exp_avg"][3:].all()
        receipt.undo()
        receipt = grow(dag)
        gradless(model, optimizer)
        assert not optimizer.state[model[0].weight]["exp_avg"][3:].any()
        receipt.undo()


def test_state_from_before_a_growth_is_brought_along_when_it_is_loaded_after_it() -> None:
    model, optimizer, dag = trained(OPTIMIZERS["rprop"])
    saved, before = copy.deepcopy(optimizer.state_dict()), states(model, optimizer)
    receipts = [grow(dag, optimizer=optimizer)]
    for _ in range(2):
        step(model, optimizer)
        optimizer.load_state_dict(copy.deepcopy(saved))
        gradless(model, optimizer)
        for name, parameter in model.named_parameters():
            found = expected(before[name]["step_size"], parameter.shape, 0.01)
            assert torch.equal(optimizer.state[parameter]["step_size"], found)
        optimizer.load_state_dict(copy.deepcopy(saved))
        receipts.append(grow(dag, 1, optimizer=optimizer))
        assert optimizer.state[model[0].weight]["step_size"].shape == model[0].weight.shape
    for receipt in reversed(receipts):
        receipt.undo()
    step(model, optimizer)


def test_state_of_other_parameters_is_refused_when_it_is_loaded() -> None:
    model, optimizer, dag = trained(OPTIMIZERS["adam"])
    grow(dag, optimizer=optimizer)
    other = torch.optim.Adam(reversed(list(model.parameters())))
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(OptimizerError, match="keeps 'exp_avg' of shape"):
        gradless(model, other)


def test_state_follows_an_undo_after_a_step() -> None:
    model, optimizer, dag = trained(OPTIMIZERS["adam"])
    receipt = grow(dag)
    step(model, optimizer)
    after = states(model, optimizer)
    receipt.undo()
    gradless(model, optimizer)
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], after["0.weight"]["exp_avg"][:3])
    assert torch.equal(optimizer.state[model[2].weight]["exp_avg"], after["2.weight"]["exp_avg"][:, :3])
    step(model, optimizer)


def test_training_goes_on_like_an_optimizer_with_padded_state() -> None:
    """The reference: the same weights and padded state in a model that was built wide."""
    model, optimizer, dag = trained(OPTIMIZERS["adam"])
    before = states(model, optimizer)
    grow(dag)
    wide = net(5)
    wide.load_state_dict(model.state_dict())
    reference = torch.optim.Adam(wide.parameters(), 0.01)
    for name, parameter in wide.named_parameters():
        state = {k: expected(v, parameter.shape) if v.ndim else v.clone() for k, v in before[name].items()}
        reference.state[parameter] = state
    for _ in range(3):
        step(model, optimizer)
        step(wide, reference)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), wide.parameters(), strict=True))


def test_groups_and_schedulers_go_on() -> None:
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.2}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    step(model, optimizer)
    scheduler.step()
    ids = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    grow(dagrow.trace(model, X), optimizer=optimizer)
    step(model, optimizer)
    scheduler.step()
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == ids
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.05]


@pytest.mark.parametrize("hidden", [1, 3])
@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_state_that_cannot_follow_is_refused_before_anything_changes(make: Any, hidden: int) -> None:
    model = net(hidden)
    optimizer = make(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.mse_loss(model(X), Y)
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    dag = dagrow.trace(model, X)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OptimizerError, match=f"{make.__name__} keeps"):
        grow(dag, optimizer=optimizer)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    grow(dag)
    grown = copy.deepcopy(model.state_dict())
    with pytest.raises(OptimizerError, match="Make a new optimizer"):
        optimizer.step(closure)
    assert all(torch.equal(grown[k], v) for k, v in model.state_dict().items())
    fresh = make(model.parameters())
    optimizer = fresh
    fresh.step(closure)
    fresh.step(closure)


def test_an_optimizer_of_another_model_is_left_alone() -> None:
    other = nn.Linear(3, 3)
    optimizer = torch.optim.Adam(other.parameters())
    other(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    before = states(other, optimizer)
    _, _, dag = trained(OPTIMIZERS["adam"])
    grow(dag)
    gradless(other, optimizer)
    assert all(torch.equal(v, states(other, optimizer)[p][k]) for p, s in before.items() for k, v in s.items())


def test_an_optimizer_made_or_loaded_after_growth_steps() -> None:
    model, optimizer, dag = trained(OPTIMIZERS["adam"])
    grow(dag, optimizer=optimizer)
    other = torch.optim.Adam(model.parameters(), 0.01)
    other.load_state_dict(optimizer.state_dict())
    before = states(model, other)
    gradless(model, other)
    assert all(torch.equal(v, states(model, other)[p][k]) for p, s in before.items() for k, v in s.items())
    made = torch.optim.Adagrad(model.parameters())
    grow(dag)
    step(model, made)
    step(model, other)


def test_parameters_that_change_places_after_a_growth_are_carried_too() -> None:
    model, optimizer, dag = trained(OPTIMIZERS["adam"])
    (group,), (first, last) = optimizer.param_groups, (list(model[i].parameters()) for i in (0, 2))
    before = states(model, optimizer)
    grow(dag)
    group["params"] = last
    step(model, optimizer)
    group["params"] = first
    step(model, optimizer)
    assert optimizer.state[model[0].weight]["exp_avg"].shape == model[0].weight.shape
    assert optimizer.state[model[0].weight]["step"] == before["0.weight"]["step"] + 1


def test_a_receipt_that_is_gone_keeps_nothing() -> None:
    _, _, dag = trained(OPTIMIZERS["sgd"])
    for _ in range(3):
        grow(dag)
    kept = grow(dag)
    assert [undo is None for undo in dag.applied[:-2]] == [True, True]
    kept.undo()


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_an_optimizer_that_was_refused_goes_on(make: Any) -> None:
    model = net()
    optimizer = make(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.mse_loss(model(X), Y)
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    with pytest.raises(OptimizerError, match="keeps"):
        grow(dagrow.trace(model, X), optimizer=optimizer)
    optimizer.step(closure)


def test_models_that_grow_in_threads_do_not_disturb_each_other() -> None:
    """Neither those that are growing nor those that are only trained."""
    errors: list[BaseException] = []
    growing = [trained(OPTIMIZERS["adam"]) for _ in range(2)]
    still, other, _ = trained(OPTIMIZERS["adam"])
    done = threading.Event()

    def train() -> None:
        while not done.is_set():
            step(still, other)

    def work(model: nn.Module, optimizer: torch.optim.Optimizer, dag: Any) -> None:
        for _ in range(4):
            grow(dag, 1).undo()
            grow(dag, 1)
            step(model, optimizer)

    def guarded(function: Callable[..., None], *args: Any) -> None:
        try:
            function(*args)
        except BaseException as error:
            errors.append(error)

    trainer = threading.Thread(target=guarded, args=(train,))
    growers = [threading.Thread(target=guarded, args=(work, *setting)) for setting in growing]
    for thread in (trainer, *growers):
        thread.start()
    for thread in growers:
        thread.join()
    done.set()
    trainer.join()
    assert not errors
    for model, optimizer, _ in growing:
        assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())
