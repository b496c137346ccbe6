"""Where what a producer writes arrives at a consumer."""

import copy

import pytest
import torch
from torch import Tensor, nn
from zoo import Plan, Split, Stage, Stream, built

import dagrow
from dagrow import AddNeurons
from dagrow.graph import Axis, Dag, Edge, PositionMap
from dagrow.graph._position_map import position_maps


def position_map(dag: Dag, axis: Axis, producer: Edge, consumer: Edge) -> PositionMap | None:
    return position_maps(dag, axis.layout, producer, [consumer])[0][consumer.name]


def test_a_residual_stream_arrives_at_those_after_it() -> None:
    dag = dagrow.trace(Stream(4, 3, 2), torch.randn(2, 3))
    stream = dag.axis("embed+downs.0+downs.1")
    last = next(p for p in stream.producers if p.name == "downs.1")
    assert position_map(dag, stream, last, dag.edge("ups.0")) is None
    assert position_map(dag, stream, last, dag.edge("head")).is_identity


def test_a_concatenation_with_itself_arrives_twice() -> None:
    case = built(Plan((Stage(kind="cat_self", width=3),), inputs=3, tokens=0))
    dag = dagrow.trace(case.model, case.batches[0][0])
    axis = dag.axis("parts.0.up")
    assert position_map(dag, axis, dag.edge("parts.0.up"), dag.edge("head")).index.tolist() == [[0, 0]]


def test_a_view_that_splits_features_into_tokens_arrives_at_each() -> None:
    dag = dagrow.trace(Split(), torch.randn(2, 3))
    axis = dag.axis("up")
    assert position_map(dag, axis, dag.edge("up"), dag.edge("token")).index.tolist() == [[0], [1], [2], [3]]


class Padded(nn.Module):
    """A shortcut that pads channels with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.relu(self.second(h) + nn.functional.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))))


@pytest.mark.parametrize("solver", ["svd", "als"])
def test_a_shortcut_that_pads_channels(solver: str) -> None:
    torch.manual_seed(0)
    model, x = Padded().double(), torch.randn(4, 3, 10, 10).double()
    dag, batches = dagrow.trace(model, x[:2]), [(x, torch.randn(4, 2, 4, 4).double())]
    for growth in dagrow.propose(dag, batches, nn.MSELoss(), [AddNeurons(k=1, solver=solver, folds=1)]):
        assert growth.gain == pytest.approx((growth.loss(-1e-5) - growth.loss(1e-5)) / 2e-5, rel=1e-4)


UNITS = {
    "group norm": [nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 3, 1)],
    "groups": [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 1)],
    "reduction": [
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 2, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(2, 3, 1, padding=1),
    ],
    "multiplier": [
        nn.Conv2d(3, 2, 3, padding=1),
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(4, 3, 1),
    ],
}


@pytest.mark.parametrize("solver", ["svd", "als", "joint"])
@pytest.mark.parametrize("layers", UNITS.values(), ids=UNITS)
def test_channels_of_a_unit_are_no_twins(layers: list[nn.Module], solver: str) -> None:
    torch.manual_seed(0)
    model, x = copy.deepcopy(nn.Sequential(*layers)).double(), torch.randn(40, 3, 6, 6).double()
    y = x.tanh().roll(1, 1)
    dag, width = dagrow.trace(model, x[:2]), model[-1].in_channels
    dagrow.propose(dag, [(x, y)], nn.MSELoss(), [AddNeurons(k=2, solver=solver)])[0].apply(0.1)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    fan_in = torch.cat([model[0].weight.detach().flatten(1), model[0].bias.detach()[:, None]], 1)
    assert fan_in.norm(dim=1).min() > 0.01  # none is dead
    new = model[:-1](x).detach()[:, width:].transpose(0, 1).flatten(1)
    assert len(new) in (2, 4, 8)  # two units of one, two or four channels
    assert new.std(1).min() > 0.01
    alike = torch.corrcoef(new).abs() - torch.eye(len(new))
    assert alike.max() < 0.95
