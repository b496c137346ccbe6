"""Parameters keep their identity through growth and undo, whoever holds them."""

import copy
from typing import Any

import pytest
import torch
from normed_net import BATCHES, X, Y, assert_same, grow, setting, state
from torch import Tensor, nn
from torch.nn import functional

import dagrow
from dagrow import MoveWeights


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


def test_frozen_parameters_stay_frozen() -> None:
    model, dag = setting()
    model.a.weight.requires_grad_(False)
    grow(dag)
    assert not model.a.weight.requires_grad
    assert model.b.weight.requires_grad


def strides(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    tensors = ((p, p.grad, optimizer.state[p]["exp_avg"]) for p in model.parameters())
    return [[t.stride() for t in each if t is not None] for each in tensors]


def test_a_parameter_keeps_its_memory_format_and_so_do_gradient_and_state() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Tanh(), nn.Conv2d(4, 2, 3)]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x, y = torch.randn(6, 3, 8, 8).to(memory_format=torch.channels_last), torch.randn(6, 2, 4, 4)
    optimizer = torch.optim.Adam(model.parameters())
    functional.mse_loss(model(x), y).backward()
    optimizer.step()
    before = strides(model, optimizer)
    dag = dagrow.trace(model, x)
    operators = [dagrow.AddNeurons(k=k, axes=(axis,)) for k, axis in ((2, "0"), (1, "2"))]
    receipts = [
        dagrow.propose(dag, [(x, y)], functional.mse_loss, [op])[0].apply(0.1, optimizer=optimizer) for op in operators
    ]
    for layer in (model[0], model[2], model[4]):
        for tensor in (layer.weight, layer.weight.grad, optimizer.state[layer.weight]["exp_avg"]):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
    for receipt in reversed(receipts):
        receipt.undo()
    assert strides(model, optimizer) == before


def test_a_transposed_weight_stays_one() -> None:
    model, _ = setting()
    model.b.weight = nn.Parameter(torch.randn(3, 4).t())
    grow(dagrow.trace(model, X), "b")
    assert (model.b.weight.shape, model.b.weight.stride()) == ((6, 3), (1, 6))


def test_growing_in_inference_mode_leaves_what_can_be_trained() -> None:
    model, _ = setting()
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        functional.mse_loss(model(X), Y).backward()
        optimizer.step()

    step()
    with torch.inference_mode():
        operators = [dagrow.AddNeurons(k=2, init="random"), dagrow.AddLayer(2)]
        receipt = dagrow.grow(dagrow.trace(model, X), BATCHES, functional.mse_loss, operators, optimizer=optimizer)
    step()
    assert not any(p.is_inference() or p.grad.is_inference() for p in model.parameters())
    with torch.inference_mode():
        receipt.undo()
    step()


class Marked(nn.Parameter):
    """A parameter of a class of one's own."""


def test_a_parameter_keeps_its_class_and_attributes() -> None:
    model, _ = setting()
    model.a.weight = Marked(model.a.weight.detach())
    model.a.weight.no_decay = True
    grow(dagrow.trace(model, X))
    assert type(model.a.weight) is Marked
    assert model.a.weight.no_decay
    assert model.a.weight.shape == (5, 5)


def test_a_copied_model_grows_alone() -> None:
    model, dag = setting()
    grow(dag)
    twin = copy.deepcopy(model)
    grow(dagrow.trace(twin, X), "b")
    assert (model.b.out_features, twin.b.out_features) == (4, 6)
