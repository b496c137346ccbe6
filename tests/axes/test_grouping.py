"""Which channels grow together."""

import torch
from torch import nn
from zoo import Stream, TwoProducers

import dagrow


def summary(dag: dagrow.Dag) -> dict[str, tuple[int, tuple[str, ...], bool]]:
    return {a.name: (a.width, tuple(c.name for c in a.consumers), a.growable) for a in dag.axes}


def test_a_chain() -> None:
    dag = dagrow.trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))
    assert summary(dag) == {"0": (4, ("2",), True), "2": (5, ("4",), True), "4": (2, (), False)}
    assert "output" in dag.axis("4").reason


def test_a_residual_stream_is_one_axis_of_many() -> None:
    dag = dagrow.trace(Stream(4, 3, 2), torch.randn(2, 3))
    stream = dag.axis("embed+downs.0+downs.1")
    assert {c.name for c in stream.consumers} == {"ups.0", "ups.1", "head"}
    assert (stream.width, stream.growable) == (4, True)
    assert summary(dag)["ups.0"] == (3, ("downs.0",), True)


def test_several_producers_and_consumers() -> None:
    dag = dagrow.trace(TwoProducers(), torch.randn(2, 3))
    assert summary(dag)["left+right"] == (4, ("readers.0", "readers.1", "readers.2"), True)
