"""New parameters join the groups that they belong to, in the order of the model, and leave them again."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from optimized import BATCHES, X, Y, net, step
from torch import Tensor, nn
from torch.nn import functional

import dagrow
from dagrow import AddLayer, AddNeurons, Operator


def nested() -> nn.Sequential:
    """The encoder is what grows; its parameters stand before those of the head."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 3)), nn.Linear(3, 3), nn.Linear(3, 2))


def grow(dag: dagrow.Dag, model: nn.Module, operator: Operator, **kwargs: Any) -> dagrow.Receipt:
    def loss(encoder: nn.Module, batch: Any) -> Tensor:
        return functional.mse_loss(model(batch[0]), batch[1])

    return dagrow.propose(dag, BATCHES, operators=[operator], step=loss)[0].apply(0.1, **kwargs)


def groups(model: nn.Module, named: bool) -> list[dict[str, Any]]:
    parts = [[(n, p) for n, p in model.named_parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    return [
        {"params": part if named else [p for _, p in part], "weight_decay": 0.1 * i} for i, part in enumerate(parts)
    ]


@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_each_parameter_is_given_its_own_state_when_it_is_loaded(named: bool, passed: bool, tmp_path: Path) -> None:
    model = nested()
    optimizer = torch.optim.Adam(groups(model, named), 0.01)
    before = [list(group["params"]) for group in optimizer.param_groups]
    step(model, optimizer)
    dag, given = dagrow.trace(model[0], X), {"optimizer": optimizer} if passed else {}
    grow(dag, model, AddLayer(3, nn.Tanh(), targets=("0",)), **given)
    last = grow(dag, model, AddLayer(3, nn.ReLU(), targets=("2",)), **given)
    step(model, optimizer)
    dagrow.save(dag, tmp_path / "net.pt")
    twin = nested()
    dagrow.load(twin[0], tmp_path / "net.pt", X)
    twin.load_state_dict(model.state_dict())
    other = torch.optim.Adam(groups(twin, named), 0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for (name, p), (same, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert name == same
        assert torch.equal(optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"]), name
    for one, its in ((model, optimizer), (twin, other)):
        step(one, its)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    last.undo()
    step(model, optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [6, 5]
    assert [len(b) for b in before] == [4, 4]
    if named:
        assert all(len(group["params"]) == len(group["param_names"]) for group in optimizer.param_groups)
        assert optimizer.param_groups[1]["param_names"][2] == "0.hidden1.fan_in.bias"


def test_new_biases_join_the_biases_of_the_layer_that_they_are_added_to() -> None:
    model = net()
    layers = [{"params": [p], "lr": 0.1 * i} for i, p in enumerate(model.parameters())]
    optimizer = torch.optim.SGD(layers, momentum=0.9)
    dag = dagrow.trace(model, X)
    receipt = dagrow.propose(dag, BATCHES, functional.mse_loss, [AddLayer(2, nn.Tanh(), targets=("2",))])[0].apply(0.1)
    step(model, optimizer)
    new = {name for name in receipt.parameters if name not in {"0.weight", "0.bias", "2.weight", "2.bias"}}
    held = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    assert {held[id(p)] for name, p in model.named_parameters() if name in new and p.ndim == 1} == {3}
    assert {held[id(p)] for name, p in model.named_parameters() if name in new and p.ndim == 2} == {2}


def several(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    return [torch.optim.Rprop(matrices, 0.01), torch.optim.Adam([p for p in model.parameters() if p.ndim < 2])]


@pytest.mark.parametrize("verb", ["apply", "grow", "Grower"])
def test_several_optimizers_are_brought_along_at_once(verb: str) -> None:
    model = net()
    optimizers = several(model)
    for optimizer in optimizers:
        step(model, optimizer)
    before = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    dag, operators = dagrow.trace(model, X), [AddNeurons(k=2), AddLayer(2, nn.Tanh(), targets=("2",))]
    if verb == "apply":
        receipts = [
            dagrow.propose(dag, BATCHES, functional.mse_loss, [operator])[0].apply(0.1, optimizer=optimizers)
            for operator in operators
        ]
    elif verb == "grow":
        receipts = [dagrow.grow(dag, BATCHES, functional.mse_loss, operators, optimizer=optimizers)]
    else:
        grower = dagrow.Grower(dag, functional.mse_loss, operators, optimizer=optimizers)
        receipts = [grower.step(0, BATCHES)]
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    assert all(p.ndim == 2 for group in optimizers[0].param_groups for p in group["params"])
    assert optimizers[0].state[model[0].weight]["step_size"].shape == model[0].weight.shape
    assert optimizers[1].state[model[0].bias]["exp_avg"].shape == model[0].bias.shape
    for receipt in reversed(receipts):
        receipt.undo()
    for optimizer, found in zip(optimizers, before, strict=True):
        assert str(optimizer.state_dict()) == str(found)


def test_one_of_several_that_cannot_follow_refuses_for_all() -> None:
    model = net()
    optimizers = [torch.optim.Adam([model[0].bias]), torch.optim.Adafactor([model[0].weight])]
    for optimizer in optimizers:
        step(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    growth = dagrow.propose(dagrow.trace(model, X), BATCHES, functional.mse_loss, [AddNeurons(k=2)])[0]
    with pytest.raises(dagrow.OptimizerError, match="Adafactor keeps"):
        growth.apply(0.1, optimizer=optimizers)
    assert all(map(torch.equal, before, model.parameters()))
    assert optimizers[0].state[model[0].bias]["exp_avg"].shape == (3,)


@pytest.mark.parametrize("wrong", [[0.1], "adam"])
def test_what_is_no_optimizer_is_named(wrong: Any) -> None:
    dag = dagrow.trace(net(), X)
    with pytest.raises(dagrow.OptimizerError, match="or a list of them"):
        dagrow.grow(dag, BATCHES, functional.mse_loss, optimizer=wrong)


def test_an_optimizer_that_takes_no_new_parameters_says_so_at_its_next_step() -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters())
    dag = dagrow.trace(model, X)
    dagrow.propose(dag, BATCHES, functional.mse_loss, [AddLayer(2, nn.Tanh())])[0].apply(0.1)
    functional.mse_loss(model(X), Y).backward()
    with pytest.warns(UserWarning, match="LBFGS cannot take the new parameters"):
        optimizer.step(lambda: functional.mse_loss(model(X), Y))  # type: ignore[arg-type,return-value]
