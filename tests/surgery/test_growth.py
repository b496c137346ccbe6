"""Receipts: where new entries are, copies that follow, and what can be undone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

import dagrow
from dagrow import AddNeurons, GrowthError

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
Y = torch.stack([X[:, 0] * X[:, 1], X[:, 2].abs()], 1)
BATCHES = [(X, Y)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.tanh(self.norm(self.a(x))).view(-1, 3))))


def setting() -> tuple[Net, Any]:
    torch.manual_seed(0)
    model = Net()
    return model, dagrow.trace(model, X)


def grow(dag: Any, axis: str = "a", k: int = 2, init: Any = "optimal", **kwargs: Any) -> dagrow.Receipt:
    operator = AddNeurons(k=k, init=init, axes=(axis,), ridge=1e-3, folds=1)
    return dagrow.propose(dag, BATCHES, functional.mse_loss, [operator])[0].apply(0.5, **kwargs)


def state(model: nn.Module) -> dict[str, Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found: dict[str, Any] = {n: (id(t), t.detach().clone(), t.grad) for n, t in tensors.items()}
    sizes = {n: {k: v for k, v in vars(m).items() if isinstance(v, int)} for n, m in model.named_modules()}
    return {**found, "sizes": sizes, "class": type(model)}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, tuple):
            assert value[0] == b[key][0]
            assert torch.equal(value[1], b[key][1]), key
            assert value[2] is b[key][2]
        else:
            assert value == b[key]


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
