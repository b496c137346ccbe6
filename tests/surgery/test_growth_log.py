"""How parameters have grown is noted while somebody may need it, and not in copies."""

import copy
import gc
import pickle

import pytest
import torch
from optimized import OPTIMIZERS, grow, step, trained
from torch import nn

import dagrow
from dagrow.surgery._growth_log import log_of


def test_the_log_does_not_grow_with_growths_that_are_undone() -> None:
    model, _, dag = trained(OPTIMIZERS["sgd"])
    for k in (1, 2, 1, 2, 1, 2):
        grow(dag, k).undo()
    assert max(len(log.resizes) for log in map(log_of, model.parameters()) if log) <= 6


def test_copies_and_pickles_hold_nothing_of_the_growths_of_their_parameters() -> None:
    model, _, dag = trained(OPTIMIZERS["adam"])
    grow(dag).undo()
    grow(dag)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(log_of(parameter) is None for parameter in twin.parameters())
        step(twin, torch.optim.Adam(twin.parameters()))
    assert b"dagrow" not in pickle.dumps(model)


def grown_model() -> nn.Module:
    torch.manual_seed(0)
    x = torch.randn(20, 3)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    (growth,) = dagrow.propose(dagrow.trace(model, x), [(x, x[:, :1])], nn.MSELoss(), [dagrow.AddNeurons(k=1, folds=1)])
    growth.apply(0.1)
    return model


def test_optimizers_that_are_gone_leave_nothing_in_the_log() -> None:
    model = grown_model()
    for _ in range(3):
        model(torch.ones(2, 3)).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    gc.collect()
    log = log_of(model[0].weight)
    assert log is not None
    assert not log.informed


def test_state_of_an_optimizer_that_slept_follows_through_shapes_that_come_again() -> None:
    """Units go and come, twice: the shapes are those of before, of other units."""
    model, optimizer, dag = trained(OPTIMIZERS["adam"])
    held = optimizer.state[model[0].weight]["exp_avg"].clone()
    units = [0, 1, 2]  # -1 for new ones
    for gone in (0, 1):
        growth = dagrow.surgery.removal(dag, dag.axis("0"), torch.tensor([gone]), {})
        dagrow.surgery._apply.apply(dag, growth, 1.0)
        grow(dag, 1)
        units = [unit for at, unit in enumerate(units) if at != gone] + [-1]
    assert units == [1, -1, -1]
    optimizer.zero_grad()
    optimizer.step()
    now = optimizer.state[model[0].weight]["exp_avg"]
    assert torch.equal(now, torch.stack([held[1], 0 * held[0], 0 * held[0]]))


def test_state_that_was_loaded_since_is_that_of_the_present_units() -> None:
    model, optimizer, dag = trained(OPTIMIZERS["adam"])
    optimizer.zero_grad()
    optimizer.step()
    dagrow.surgery._apply.apply(dag, dagrow.surgery.removal(dag, dag.axis("0"), torch.tensor([0]), {}), 1.0)
    grow(dag, 1)
    step(model, optimizer)
    kept = copy.deepcopy(optimizer.state_dict())
    step(model, optimizer)
    optimizer.load_state_dict(kept)
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], kept["state"][0]["exp_avg"])


def test_state_that_another_optimizer_takes_over_is_that_of_the_present_units() -> None:
    """It was made since units went and came, so that it knows of no others."""
    model, optimizer, dag = trained(OPTIMIZERS["adam"])
    dagrow.surgery._apply.apply(dag, dagrow.surgery.removal(dag, dag.axis("0"), torch.tensor([0]), {}), 1.0)
    grow(dag, 1)
    step(model, optimizer)
    kept = copy.deepcopy(optimizer.state_dict())
    other = type(optimizer)(model.parameters())
    other.load_state_dict(copy.deepcopy(kept))
    other.zero_grad()
    other.step()
    assert kept["state"][0]["exp_avg"].any()
    assert torch.equal(other.state[model[0].weight]["exp_avg"], kept["state"][0]["exp_avg"])


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_goes_on_after_a_growth() -> None:
    for model in (nn.Linear(3, 1), grown_model()):
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.ones(2, 3)).sum().backward()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        torch.compile(optimizer.step, backend="eager")()
        assert not any(map(torch.equal, before, model.parameters()))
