"""Where each part of a dag is drawn, and when it came."""

import pytest
import torch
from histories import grown_history
from torch import Tensor, nn

import dagrow
from dagrow import History
from dagrow.growing._recording import snapshot_of
from dagrow.pictures import Activation, Link, Snapshot
from dagrow.pictures._graph_layout import graph_layout

history = pytest.fixture(scope="module")(grown_history)


def test_a_picture_tells_when_what_was_added(history: History) -> None:
    found = graph_layout(history.snapshots)
    (bar,) = (bar for bar in found.bars if bar.label == "a")
    assert bar.stages[0] == (None, 2)
    grown = {record.epoch: record.widths["a"] for record in history}
    assert all(grown[epoch] == width for epoch, width in bar.stages[1:] if epoch is not None)
    assert bar.width == history[-1].widths["a"]
    assert [bar.stages for bar in found.bars if bar.label == "input"] == [((None, 5),)]
    for arrow in found.arrows:
        assert found.bars[arrow.source].x < found.bars[arrow.target].x
        assert arrow.since is None


def test_a_layer_that_came_later_has_its_epoch() -> None:
    ends = (Activation("x", "input", 3), Activation("h", "a", 2), Activation("y", "output", 1))
    links = (Link("a", "Linear", "x", "h", 8), Link("b", "Linear", "h", "y", 3))
    later = (*links, Link("new", "Linear", "x", "y", 3))
    found = graph_layout([Snapshot(None, ends, links, {}), Snapshot(4, ends, later, {})])
    assert {arrow.edge: arrow.since for arrow in found.arrows} == {"a": None, "b": None, "new": 4}
    assert [(bar.x, bar.y) for bar in found.bars] == [(0, 0.0), (1, 0.0), (2, 0.0)]


def test_places_do_not_collide(history: History) -> None:
    block = nn.ModuleList([nn.Linear(4, 3) for _ in range(3)])

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ways, self.outs = block, nn.ModuleList([nn.Linear(3, 2) for _ in range(3)])

        def forward(self, x: Tensor) -> list[Tensor]:
            return [out(torch.relu(way(x))) for way, out in zip(self.ways, self.outs, strict=True)]

    found = graph_layout([snapshot_of(dagrow.trace(Wide(), torch.randn(2, 4)))])
    places = [(bar.x, bar.y) for bar in found.bars]
    assert len(set(places)) == len(places) == 5
    assert found.lanes == 3
