"""What becomes of a model with new paths: in files, copies and compiled, with optimizers."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from wired import Net, images, loss

import dagrow
from dagrow import AddConnection, AddLayer, AddNeurons, GrowthError, OptimizerError, StoreError
from dagrow.testing import snapshot
from dagrow.testing._snapshots_and_slopes import same

GROWTHS = (AddConnection(), AddLayer(2, nn.Tanh()), AddNeurons(k=1), AddConnection(rank=1), AddLayer(3, nn.GELU()))


def several(dag: dagrow.Dag, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Five growths deep, new parts among what grows."""
    for operator in GROWTHS:
        dagrow.propose(dag, batches, loss, [operator])[0].apply(0.3)


def test_the_grown_model_is_still_the_users(net) -> None:
    model, batches = net
    dag, x = dagrow.trace(model, batches[0][0][:2]), batches[0][0]
    keys = set(model.state_dict())
    several(dag, batches)
    assert dag.model is model
    assert type(model).__name__ == "Net"
    assert isinstance(model, Net)
    assert keys < set(model.state_dict())
    assert torch.equal(model.twice(x), 2 * model(x))
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        assert dagrow.trace(other, x[:2]).edges == dag.edges
    assert len(dag.network().edges) == len(dag.edges)
    assert all(edge.name in str(dag) for edge in dag.edges)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_grown_model_compiles(net, backend: str) -> None:
    model, batches = net
    several(dagrow.trace(model, batches[0][0][:2]), batches)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    assert torch.allclose(compiled(batches[0][0]), model(batches[0][0]), atol=1e-12)


def test_the_grown_model_can_be_exported(net) -> None:
    model, batches = net
    several(dagrow.trace(model, batches[0][0][:2]), batches)
    exported = torch.export.export(model, (batches[0][0],)).module()
    assert torch.allclose(exported(batches[0][0]), model(batches[0][0]), atol=1e-12)


def test_files_hold_new_layers(net, tmp_path) -> None:
    model, batches = net
    fresh, x = copy.deepcopy(model), batches[0][0]
    dag = dagrow.trace(model, x[:2])
    dagrow.propose(dag, batches, loss, [AddConnection()])[0].apply(0.3)
    halfway = copy.deepcopy(model)
    several(dag, batches)
    dagrow.save(dag, tmp_path / "grown.pt")
    for start in (fresh, halfway, copy.deepcopy(model)):
        found = dagrow.load(start, tmp_path / "grown.pt", x[:2])
        assert torch.equal(start(x), model(x))
        assert found.edges == dag.edges
    other = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    with pytest.raises(StoreError, match="does not take the new layers"):
        dagrow.load(other, tmp_path / "grown.pt", x[:2])
    assert len(other) == 3


def test_a_layer_of_ones_own_cannot_be_saved(net, tmp_path) -> None:
    model, batches = net

    class Own(nn.Tanh):
        pass

    dag = dagrow.trace(model, batches[0][0][:2])
    dagrow.propose(dag, batches, loss, [AddLayer(2, Own())])[0].apply(0.1)
    with pytest.raises(StoreError, match="a new layer of type Own cannot be saved"):
        dagrow.save(dag, tmp_path / "grown.pt")


def test_undo_goes_back_through_a_whole_sequence(net) -> None:
    model, batches = net
    dag = dagrow.trace(model, batches[0][0][:2])
    optimizer = torch.optim.Adam(model.parameters())
    loss(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    before, receipts = [snapshot(dag, optimizer)], []
    for operator in GROWTHS:
        receipts.append(dagrow.propose(dag, batches, loss, [operator])[0].apply(0.3, optimizer=optimizer))
        before.append(snapshot(dag, optimizer))
    for receipt in reversed(receipts):
        same(before.pop(), snapshot(dag, optimizer), "undo")
        receipt.undo()
    same(before.pop(), snapshot(dag, optimizer), "undo")


@pytest.mark.parametrize("handed", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop])
def test_new_parameters_are_optimized(net, kind, handed: bool) -> None:
    """They join the group of the layer that they are added to: at once, or at the optimizer's next step."""
    model, batches = net
    groups = [
        {"params": [*model.one.parameters()], "lr": 0.0},
        {"params": [*model.two.parameters()], "lr": 0.1},
        {"params": [*model.three.parameters()], "lr": 0.0},
    ]
    optimizer, dag = kind(groups, lr=0.1), dagrow.trace(model, batches[0][0][:2])
    loss(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    (growth,) = dagrow.propose(dag, batches, loss, [AddConnection(targets=("two",))])
    receipt = growth.apply(0.1, optimizer=optimizer if handed else None)
    (name,) = receipt.parameters
    new = model.get_parameter(name)
    assert any(p is new for p in optimizer.param_groups[1]["params"]) is handed
    before = new.detach().clone()
    loss(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 3, 2]
    assert not torch.equal(new, before)
    receipt.undo()
    loss(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 2]


def test_new_parameters_beside_new_ones_join_at_the_same_step(net) -> None:
    model, batches = net
    optimizer, dag = torch.optim.SGD(model.parameters(), lr=0.1), dagrow.trace(model, batches[0][0][:2])
    for target in ("three", "hidden1.fan_in"):
        dagrow.propose(dag, batches, loss, [AddLayer(2, nn.Tanh(), targets=(target,))])[0].apply(0.1)
    loss(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_an_optimizer_that_takes_no_new_parameters_refuses(net) -> None:
    model, batches = net
    dag = dagrow.trace(model, batches[0][0][:2])
    growth = dagrow.propose(dag, batches, loss, [AddConnection()])[0]
    with pytest.raises(OptimizerError, match="LBFGS cannot take the new parameters x_to_"):
        growth.apply(0.1, optimizer=torch.optim.LBFGS(model.parameters()))
    assert len(list(model.children())) == 3


def test_averages_of_weights_follow(net) -> None:
    model, batches = net
    dag, average = dagrow.trace(model, batches[0][0][:2]), torch.optim.swa_utils.AveragedModel(model)
    receipt = dagrow.propose(dag, batches, loss, [AddConnection()])[0].apply(0.3)
    receipt.carry(average.module)
    assert torch.equal(average.module.x_to_three.weight, model.x_to_three.weight)
    average.update_parameters(model)
    assert torch.allclose(average.module(batches[0][0]), model(batches[0][0]), atol=1e-12)


def test_new_parameters_beside_frozen_ones_are_optimized(net) -> None:
    model, batches = net
    model.two.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    dag = dagrow.trace(model, batches[0][0][:2])
    (growth,) = dagrow.propose(dag, batches, loss, [AddConnection(targets=("two",))])
    growth.apply(0.1, optimizer=optimizer)
    assert any(p is model.x_to_two.weight for p in optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("handed", [True, False])
def test_of_two_optimizers_one_takes_new_parameters(net, handed: bool) -> None:
    model, batches = net
    head = torch.optim.SGD(model.three.parameters(), lr=0.1)
    trunk = torch.optim.SGD([*model.one.parameters(), *model.two.parameters()], lr=0.1)
    dag = dagrow.trace(model, batches[0][0][:2])
    growths = dagrow.propose(dag, batches, loss, [AddConnection(targets=("three",))])
    growths[0].apply(0.1, optimizer=trunk if handed else None)
    loss(model(batches[0][0]), batches[0][1]).backward()
    for optimizer in (trunk, head):
        optimizer.step()
    counts = [len(optimizer.param_groups[0]["params"]) for optimizer in (trunk, head)]
    assert counts == ([5, 2] if handed else [4, 3])


def test_only_copies_from_before_the_growth_follow(net) -> None:
    model, batches = net
    dag, before = dagrow.trace(model, batches[0][0][:2]), copy.deepcopy(model)
    receipt = dagrow.propose(dag, batches, loss, [AddConnection()])[0].apply(0.3)
    receipt.carry(before)
    for other in (before, model, nn.Sequential(nn.Linear(5, 2)).double()):
        children = list(other._modules)
        with pytest.raises(GrowthError, match=r"carry each copy along once|is no copy of the grown model"):
            receipt.carry(other)
        assert list(other._modules) == children


@pytest.mark.parametrize(
    "damage",
    [
        lambda branch: branch.pop(),
        lambda branch: branch[3].update({"": {"type": "Nothing"}}),
        lambda branch: branch[3].update({"": {"type": "Linear", "in_features": 2, "colour": 1}}),
        lambda branch: branch.__setitem__(3, {}),
        lambda branch: branch.__setitem__(0, "forward"),
    ],
)
def test_damaged_files(net, tmp_path, damage) -> None:
    model, batches = net
    fresh, x = copy.deepcopy(model), batches[0][0]
    dag = dagrow.trace(model, x[:2])
    dagrow.propose(dag, batches, loss, [AddConnection()])[0].apply(0.3)
    dagrow.save(dag, tmp_path / "grown.pt")
    content = torch.load(tmp_path / "grown.pt", weights_only=True)
    damage(content["branches"][0])
    torch.save(content, tmp_path / "grown.pt")
    with pytest.raises(StoreError):
        dagrow.load(fresh, tmp_path / "grown.pt", x[:2])
    assert len(fresh._modules) == 3


def test_costs_are_those_of_the_grown_model(net) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for model, batches in (net, images()):
        x = batches[0][0]
        dag = dagrow.trace(model, x[:2])
        for operator in (AddConnection(), AddLayer(2), AddConnection(rank=1)):
            growth = dagrow.propose(dag, batches, loss, [operator])[0]
            with FlopCounterMode(display=False) as before:
                model(x)
            count = dag.parameter_count()
            receipt = growth.apply(0.1)
            with FlopCounterMode(display=False) as after:
                model(x)
            assert growth.cost.parameters == dag.parameter_count() - count
            assert growth.cost.flops * len(x) == after.get_total_flops() - before.get_total_flops()
            receipt.undo()
