"""Which part of a graph new channels reach, and the sizes that it needs."""

import pytest
import torch
from between import Between
from torch import nn

import dagrow
from dagrow.axes import AxisLayout
from dagrow.axes._widened_labels import WidenedLabeller


def widened(model: nn.Module, k: int, example: torch.Tensor) -> tuple[WidenedLabeller, AxisLayout]:
    """The first axis, wider by k units."""
    dag = dagrow.trace(model, example)
    layout = dag.axes[0].layout
    run = WidenedLabeller(dag.program, dag.layers, layout, k, {})
    run.run_reached()
    return run, layout


@pytest.mark.parametrize("k", [1, 3])
def test_every_new_unit_has_labels_of_its_own(k: int) -> None:
    run, layout = widened(Between(lambda m, h: h.relu()), k, torch.randn(2, 3))
    (rows,) = (run.labelling.rows[edge] for edge in layout.rows)
    new = run.is_new(rows)
    assert int(new.sum()) == k
    assert len(rows.unique()) == len(rows) == layout.width + k
    assert torch.equal(run.units_of(run.classes.roots(rows[new])), torch.arange(k))
    assert torch.equal(run.labelling.columns["last"], rows)


def test_new_channels_reach_no_further_than_the_layer_that_reads_them() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    run, _ = widened(model, 1, torch.randn(2, 3))
    assert [node.target for node in run.reached] == ["0", "1"]
    assert (run.reads["2"], run.reads["4"]) == (1, 0)
    assert not run.literals


def test_sizes_that_are_written_into_a_forward_follow() -> None:
    model = Between(lambda m, h: h.view(-1, 4).relu())
    run, _ = widened(model, 2, torch.randn(2, 3))
    assert [args[1:] for args, _ in run.literals.values()] == [(-1, 6)]
