"""A dag at one time, in plain values."""

import pytest
import torch
from histories import Net, X, Y, grown_history
from torch import nn

import dagrow
from dagrow import History
from dagrow.growing._recording import growable_widths, snapshot_of
from dagrow.pictures._graph_layout import graph_layout

history = pytest.fixture(scope="module")(grown_history)


def test_a_new_path_leaves_names_and_pasts_as_they_are() -> None:
    """What reads an axis by its name goes on with it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    dag = dagrow.trace(model.double(), X[:2])
    first = snapshot_of(dag)
    paths = [dagrow.AddConnection(targets=("2",), folds=1), dagrow.AddLayer(2, nn.Tanh(), folds=1)]
    for operator in paths:
        growths = dagrow.propose(dag, [(X, Y)], nn.functional.mse_loss, [operator])
        next(growth for growth in growths if growth.where == "input -> 2").apply(0.1)
    assert len(dag.axis("2").producers) == 3
    assert growable_widths(dag) == {**first.widths, "hidden1.fan_in": 2}
    (bar,) = (bar for bar in graph_layout([first, snapshot_of(dag, 1)]).bars if bar.label == "2")
    assert bar.stages == ((None, 4),)


def test_snapshots_know_widths_and_ways(history: History) -> None:
    first, last = history.snapshots[0], history.snapshots[-1]
    assert first == snapshot_of(dagrow.trace(Net(), X[:2]))
    assert {link.edge for link in first.links} == {"a", "b", "side", "head"}
    widths = {one.label: one.width for one in last.activations}
    assert widths["a"] == history[-1].widths["a"] > 2
    assert (widths["input"], widths["output"]) == (5, 3)
    assert widths["b, side"] == history[-1].widths["b"] + history[-1].widths["side"]
    assert len(history.snapshots) == 1 + sum(bool(record.grown) for record in history)
