"""Where new paths can be laid, and where not."""

import pytest
import torch
from torch import Tensor, nn
from wired import DOUBLE, Net, loss

import dagrow
from dagrow import AddConnection, AddLayer, GrowthError
from dagrow.operators.paths import path_sites


def test_cycles_and_what_is_read_already_are_no_candidates(net) -> None:
    model, batches = net
    dag = dagrow.trace(model, batches[0][0][:2])
    assert {link.place for link in path_sites(dag)} == {"x -> two", "x -> three", "one -> three"}
    assert {link.place for link in path_sites(dag, known=True)} == {
        "x -> one",
        "x -> two",
        "x -> three",
        "one -> two",
        "one -> three",
        "two -> three",
    }


class Sides(nn.Module):
    """Two sides, the second of which runs after the first one is read."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.left, self.right, self.first, self.second = (nn.Linear(*s) for s in ((3, 4), (3, 4), (4, 2), (4, 2)))
        self.relu = nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu(self.first(torch.tanh(self.left(x))))
        return a * self.second(torch.tanh(self.right(x.index_select(1, torch.tensor([2, 1, 0])))))


@pytest.mark.parametrize("inplace", [True, False])
def test_what_runs_later_can_be_joined_to_what_ran_before(inplace: bool) -> None:
    """Unless what lies between works in place."""
    torch.manual_seed(0)
    model = Sides(inplace).double()
    x, y = torch.randn(80, 3, dtype=DOUBLE), torch.randn(80, 2, dtype=DOUBLE)
    dag = dagrow.trace(model, x[:2])
    growths = dagrow.propose(dag, [(x, y)], loss, [AddLayer(2, nn.Tanh(), folds=1)])
    assert ("right -> first" in {growth.where for growth in growths}) is not inplace
    for growth in growths:
        slope = (growth.loss(1e-6) - growth.loss(-1e-6)) / 2e-6
        assert -slope == pytest.approx(growth.gain, rel=1e-4, abs=1e-9)
    if not inplace:
        growth = next(growth for growth in growths if growth.where == "right -> first")
        predicted = growth.loss(0.3)
        growth.apply(0.3)
        assert float(loss(model(x), y)) == pytest.approx(predicted, rel=1e-9)


class Trunk(nn.Module):
    """Frozen or without gradients below, in another precision above."""

    def __init__(self, graded: bool, head: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(3, 4).double(), nn.Linear(4, 4).double(), nn.Linear(4, 2).to(head)
        self.graded = graded

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.graded and torch.is_grad_enabled()):
            h = torch.tanh(self.two(torch.tanh(self.one(x))))
        return self.three(h.to(self.three.weight.dtype)).to(x.dtype)


def test_no_path_starts_where_gradients_are_switched_off() -> None:
    x, y = torch.randn(60, 3, dtype=DOUBLE), torch.randn(60, 2, dtype=DOUBLE)
    dag = dagrow.trace(Trunk(False), x[:2])
    assert {link.source.name for link in path_sites(dag, known=True)} <= {dag.edge("three").layer.inputs.name}
    (growth,) = dagrow.propose(dag, [(x, y)], loss, [AddLayer(2, nn.Tanh(), targets=("three",))])
    growth.apply(0.1)
    loss(dag.model(x), y).backward()
    assert all(parameter.grad is not None for parameter in dag.model.hidden1.parameters())


def test_no_path_leads_to_another_precision() -> None:
    x, y = torch.randn(60, 3, dtype=DOUBLE), torch.randn(60, 2, dtype=DOUBLE)
    dag = dagrow.trace(Trunk(True, torch.float32), x[:2])
    assert {link.target.name for link in path_sites(dag)} == {"two"}
    assert dagrow.propose(dag, [(x, y)], loss, [AddLayer(2, nn.Tanh())])


def test_activations_of_one_layer_are_told_apart() -> None:
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(torch.tanh(self.second(torch.sin(h)) + self.second(torch.cos(h))))

    class Split(Waves):
        def __init__(self) -> None:
            super().__init__()
            self.third = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(torch.tanh(self.second(torch.sin(h)) + self.third(torch.cos(h))))

    dag = dagrow.trace(Split(), torch.randn(2, 3))
    places = [link.place for link in path_sites(dag, known=True)]
    assert len(places) == len(set(places))
    assert {"first -> last", "first[1] -> last"} < set(places)


@pytest.mark.parametrize("make", [lambda net: nn.DataParallel(net), lambda net: net.one])
def test_models_that_no_path_can_be_added_to(net, make) -> None:
    model, batches = net
    dag = dagrow.trace(make(model), batches[0][0][:2])
    with pytest.raises(GrowthError, match=r"trace its .module|put it into an nn.Sequential"):
        dagrow.propose(dag, batches, loss, [AddConnection()])


class Hooked(Net):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        return super().forward(x).clamp(-9, 9)


def test_a_forward_that_cannot_be_written_refuses(net) -> None:
    _, batches = net
    dag = dagrow.trace(Hooked().double(), batches[0][0][:2])
    with pytest.raises(GrowthError, match="no new path can be added to this Hooked"):
        dagrow.propose(dag, batches, loss, [AddConnection()])


def test_targets_that_no_path_can_lead_to(net) -> None:
    model, batches = net
    dag = dagrow.trace(model, batches[0][0][:2])
    with pytest.raises(GrowthError, match="no new path can lead to one"):
        dagrow.propose(dag, batches, loss, [AddConnection(targets=("one",))])
    with pytest.raises(GrowthError, match="there is no edge 'four'"):
        dagrow.propose(dag, batches, loss, [AddConnection(targets=("four",))])
