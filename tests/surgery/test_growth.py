"""Receipts: where new entries are, copies that follow, and what can be undone."""

import copy

import pytest
import torch
from normed_net import BATCHES, X, Y, assert_same, grow, setting, state
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

import dagrow
from dagrow import AddNeurons, GrowthError


def test_the_receipt_says_where_new_entries_are() -> None:
    model, dag = setting()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    receipt = grow(dag, init="zero")
    for name, new in receipt.parameters.items():
        if name not in before:
            continue
        value = model.get_parameter(name).detach()
        for dim, positions in new.items():
            value = value.index_select(dim, torch.tensor([i for i in range(value.shape[dim]) if i not in positions]))
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_is_carried_along(use_buffers: bool) -> None:
    model, dag = setting()
    ema = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def train() -> None:
        model.train()
        optimizer.zero_grad()
        functional.mse_loss(model(X), Y).backward()
        optimizer.step()
        scheduler.step()
        ema.update_parameters(model)

    train()
    old = {name: t.clone() for name, t in ema.module.state_dict().items()}
    ids = list(map(id, ema.module.parameters()))
    receipt = dagrow.grow(
        dag, BATCHES, functional.mse_loss, [AddNeurons(k=2, init="random"), AddNeurons(k=1)], optimizer=optimizer
    )
    assert len(receipt.parts) == 2
    receipt.carry(ema.module)
    assert list(map(id, ema.module.parameters())) == ids
    for part in receipt.parts[:1]:
        for name, new in part.parameters.items():
            assert set(new) <= {0, 1}
            assert ema.module.state_dict()[name].shape == model.state_dict()[name].shape
    corner = ema.module.state_dict()["a.weight"][:3]
    assert torch.equal(corner, old["a.weight"])
    for _ in range(3):
        train()
    assert ema.module.eval()(X).shape == Y.shape


def test_new_entries_of_a_copy_are_those_of_the_growth() -> None:
    model, dag = setting()
    twin = copy.deepcopy(model)
    receipt = grow(dag, "b")
    receipt.carry(twin)
    for name, new in receipt.parameters.items():
        for dim, positions in new.items():
            index = torch.tensor(positions)
            assert torch.equal(
                twin.state_dict()[name].index_select(dim, index), model.state_dict()[name].index_select(dim, index)
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_copy_follows_the_whole_growth(dtype: torch.dtype) -> None:
    """Moves of old entries and new layers too: a copy of the model as it was becomes the model as it is."""
    model, _ = setting()
    model = model.to(dtype)
    x, y = X.to(dtype), Y.to(dtype)
    twin, frozen = copy.deepcopy(model).double(), copy.deepcopy(model).requires_grad_(False)
    operators = [dagrow.MoveWeights(folds=1), AddNeurons(k=2, axes=("b",), folds=1), dagrow.AddLayer(2, folds=1)]
    receipt = dagrow.grow(dagrow.trace(model, x), [(x, y)], functional.mse_loss, operators)
    assert len(receipt.parts) == 3
    for one in (twin, frozen):
        receipt.carry(one)
        assert one.state_dict().keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.allclose(one.state_dict()[name], value.to(one.state_dict()[name].dtype), rtol=1e-5, atol=1e-6)
    assert {p.dtype for p in twin.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in frozen.parameters())


def test_an_average_moves_as_the_model_moves() -> None:
    model, dag = setting()
    average = copy.deepcopy(model)
    with torch.no_grad():
        for p in average.parameters():
            p.add_(0.01 * torch.randn_like(p))
    before, found = state(average), {name: p.detach().clone() for name, p in model.named_parameters()}
    receipt = dagrow.propose(dag, BATCHES, functional.mse_loss, [dagrow.MoveWeights(folds=1)])[0].apply(0.7)
    receipt.carry(average)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, found[name])}
    assert moved
    for name, p in average.named_parameters():
        assert torch.allclose(p - before[name][1], model.get_parameter(name) - found[name], atol=1e-6), name


def test_a_copy_that_is_none_is_refused() -> None:
    model, dag = setting()
    twin, other = copy.deepcopy(model), nn.Linear(3, 3)
    receipt = grow(dag)
    receipt.carry(twin)
    before = state(twin)
    with pytest.raises(GrowthError, match="in order"):
        receipt.carry(twin)
    with pytest.raises(GrowthError, match="is no copy"):
        receipt.carry(other)
    assert_same(before, state(twin))


def test_undo_out_of_order_and_twice() -> None:
    model, dag = setting()
    first, second = grow(dag), grow(dag, "b")
    before = state(model)
    with pytest.raises(GrowthError, match="reverse order"):
        first.undo()
    assert_same(before, state(model))
    second.undo()
    with pytest.raises(GrowthError, match="already"):
        second.undo()
    first.undo()
