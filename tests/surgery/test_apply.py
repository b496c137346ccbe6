"""Parameters keep their identity through growth and undo, whoever holds them."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

import dagrow
from dagrow import AddConnection, AddLayer, AddNeurons, GrowthError, MoveWeights
from dagrow.testing._snapshots_and_slopes import same, snapshot

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


@pytest.mark.parametrize("init", ["optimal", "zero", "copy", "gradmax", "random"])
def test_identity_and_undo_bit_for_bit(init: str) -> None:
    model, dag = setting()
    functional.mse_loss(model(X), Y).backward()
    before, shown = state(model), str(dag)
    receipts = [grow(dag, axis, init=init) for axis in ("a", "b", "a")]
    assert {n: id(p) for n, p in model.named_parameters()} == {n: before[n][0] for n, _ in model.named_parameters()}
    assert model.a.out_features == model.norm.num_features == model.b.in_features == 7
    for receipt in reversed(receipts):
        receipt.undo()
    assert_same(before, state(model))
    assert str(dag) == shown


def test_moves_are_undone_bit_for_bit() -> None:
    model, dag = setting()
    before = state(model)
    receipt = dagrow.propose(dag, BATCHES, functional.mse_loss, [MoveWeights(folds=1)])[0].apply()
    assert not torch.equal(model.state_dict()[f"{receipt.where}.weight"], before[f"{receipt.where}.weight"][1])
    receipt.undo()
    assert_same(before, state(model))


def test_gradients_are_padded_with_zeros() -> None:
    model, dag = setting()
    functional.mse_loss(model(X), Y).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    receipt = grow(dag)
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert p.grad.shape == p.shape
        new = receipt.parameters.get(name, {})
        for dim, positions in new.items():
            assert not p.grad.index_select(dim, torch.tensor(positions)).any()
        old = p.grad
        for dim, positions in new.items():
            old = old.index_select(dim, torch.tensor([i for i in range(p.shape[dim]) if i not in positions]))
        assert torch.equal(old, before[name])


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


def test_a_loss_that_is_still_alive_is_refused_by_torch_or_right() -> None:
    """Its graph holds weights that are no more; those that did not grow still get their old gradients."""
    model, dag = setting()
    model.eval()
    loss = functional.mse_loss(model(X), Y)
    kept = functional.mse_loss(model.a(X)[:, :2], Y)  # needs no weight that grows
    reference = torch.autograd.grad(kept, model.a.bias, retain_graph=True)[0]
    grow(dag, "b", init="zero")
    with pytest.raises(RuntimeError, match=r"inplace operation|shape|size"):
        loss.backward()
    model.zero_grad()
    kept.backward()
    assert torch.equal(model.a.bias.grad, reference)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_gradient_hooks_go_on_with_the_new_shape(kind: str) -> None:
    model, dag = setting()
    seen: list[Any] = []
    for p in model.parameters():
        functional.mse_loss(model(X), Y).backward()  # so that accumulators exist
        getattr(p, kind)(lambda t: seen.append(tuple(t.shape)))
    receipt = grow(dag)
    seen.clear()
    model.zero_grad()
    functional.mse_loss(model(X), Y).backward()
    assert sorted(seen) == sorted(tuple(p.shape) for p in model.parameters())
    receipt.undo()
    seen.clear()
    model.zero_grad()
    functional.mse_loss(model(X), Y).backward()
    assert sorted(seen) == sorted(tuple(p.shape) for p in model.parameters())


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) * 2


def test_wrappers_and_compiled_models_follow() -> None:
    torch._dynamo.reset()
    model, dag = setting()
    model.eval()
    wrapper, compiled = Wrapper(model), torch.compile(model, backend="eager")
    compiled(X)
    receipt = grow(dag, "b")
    assert torch.equal(compiled(X), model(X))
    assert torch.equal(wrapper(X), 2 * model(X))
    assert torch.equal(torch.compile(model, backend="eager")(X), model(X))
    receipt.undo()
    assert torch.equal(compiled(X), model(X))
    torch._dynamo.reset()


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


def test_frozen_parameters_stay_frozen() -> None:
    model, dag = setting()
    model.a.weight.requires_grad_(False)
    grow(dag)
    assert not model.a.weight.requires_grad
    assert model.b.weight.requires_grad


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


def test_a_copied_model_grows_alone() -> None:
    model, dag = setting()
    grow(dag)
    twin = copy.deepcopy(model)
    grow(dagrow.trace(twin, X), "b")
    assert (model.b.out_features, twin.b.out_features) == (4, 6)


OPERATORS = {
    "a width": AddNeurons(k=2, axes=("0",), folds=1),
    "the next width": AddNeurons(k=2, axes=("2",), folds=1),
    "a move": MoveWeights(edges=("2",), folds=1),
    "a connection": AddConnection(targets=("4",), folds=1),
    "a layer": AddLayer(3, targets=("4",), folds=1),
}


def chain() -> tuple[nn.Sequential, dagrow.Dag]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    return model, dagrow.trace(model, X)


def grown_by(dag: dagrow.Dag, name: str) -> dagrow.Receipt:
    return dagrow.propose(dag, BATCHES, functional.mse_loss, [OPERATORS[name]])[0].apply(0.5)


@pytest.mark.parametrize("later", OPERATORS)
@pytest.mark.parametrize("earlier", OPERATORS)
def test_a_later_growth_through_another_dag_is_undone_first(earlier: str, later: str) -> None:
    model, dag = chain()
    untouched = snapshot(dag)
    first = grown_by(dag, earlier)
    between = snapshot(dag)
    second = grown_by(dagrow.trace(model, X), later)
    before = snapshot(dag)
    with pytest.raises(GrowthError, match="reverse order"):
        first.undo()
    same(before, snapshot(dag), "a refused undo")
    second.undo()
    same(between, snapshot(dag), "undone through the other dag")
    dag.check()
    first.undo()
    same(untouched, snapshot(dag), "undone")


def test_a_later_growth_that_nobody_can_undo_stays_in_place() -> None:
    model, dag = chain()
    first = grown_by(dag, "a width")
    grown_by(dagrow.trace(model, X), "the next width")
    gc.collect()
    before = snapshot(dag)
    with pytest.raises(GrowthError, match="reverse order"):
        first.undo()
    same(before, snapshot(dag), "a refused undo")


@pytest.mark.parametrize("name", OPERATORS)
def test_a_dag_knows_that_its_model_was_grown_through_another(name: str) -> None:
    model, dag = chain()
    growth = dagrow.propose(dag, BATCHES, functional.mse_loss, [OPERATORS["a width"]])[0]
    receipt = grown_by(dagrow.trace(model, X), name)
    before = snapshot(dag)
    for verb in (
        dag.check,
        lambda: growth.apply(0.1),
        lambda: dagrow.propose(dag, BATCHES, functional.mse_loss, [AddConnection()]),
    ):
        with pytest.raises(GrowthError, match=r"through another dag.*trace the model again"):
            verb()
    same(before, snapshot(dag), "a refused growth")
    receipt.undo()
    growth.apply(0.1)


def test_a_dag_knows_that_a_growth_was_undone_through_another() -> None:
    model, dag = chain()
    receipt = grown_by(dag, "a move")
    other = dagrow.trace(model, X)
    receipt.undo()
    with pytest.raises(GrowthError, match="through another dag"):
        other.check()
    dag.check()


def test_copies_have_no_receipts() -> None:
    model, dag = chain()
    receipt = grown_by(dag, "a connection")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(dag).model):
        other = dagrow.trace(twin, X)
        assert not other.applied
        grown_by(other, "a width")
    receipt.undo()


def test_growths_keep_no_model_alive() -> None:
    model, dag = chain()
    receipt, gone = grown_by(dag, "a layer"), weakref.ref(model)
    del model, dag, receipt
    gc.collect()
    assert gone() is None
