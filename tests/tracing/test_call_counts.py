"""Forwards that call their layers more often for more samples are found out, whatever they count with."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import dagrow
from dagrow.tracing import record
from dagrow.tracing._call_counts import looks_at_samples, mark_calls, samples_of, uses, with_samples

Cut = Callable[[Tensor], Sequence[Tensor]]


class Ghost(nn.Module):
    """A norm that takes a part of the batch at a time."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.cut = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2), cut
        self.up, self.down = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(torch.relu(torch.cat([self.norm(part) for part in self.cut(self.a(x))], 0)))
        return self.down(torch.relu(self.up(h)))


CUTS: list[Cut] = [
    lambda x: x.chunk(math.ceil(x.shape[0] / 8), 0),
    lambda x: x.chunk(-(-x.shape[0] // 8)),
    lambda x: x.split(8),
    lambda x: x.split(128),
    lambda x: torch.tensor_split(x, max(1, x.size(0) // 16)),
    lambda x: [x[i : i + 8] for i in range(0, x.shape[0], 8)],
    lambda x: [x] if len(x) < 9 else x.split(8),
    lambda x: [x] if x.shape[0] < 9 else [x[:8], x[8:]],
]


@pytest.mark.parametrize("cut", CUTS)
def test_a_number_of_calls_that_follows_the_batch(cut: Cut) -> None:
    dag = dagrow.trace(Ghost(cut).eval(), torch.randn(2, 4))
    assert "257 times as many samples: the number of its calls follows the batch size" in str(dag.axis("a").reason)
    assert f"Fixed while tracing: {dag.axis('a').reason}" in str(dag)
    assert dag.axis("up").growable  # what else there is
    with pytest.raises(dagrow.GrowthError, match=r"cannot grow a .the forward uses norm"):
        dagrow.propose(dag, [], lambda: None, [dagrow.AddNeurons(k=1, axes=("a",))])


@pytest.mark.parametrize("cut", [*CUTS[:3], CUTS[6]])
def test_a_graph_that_does_not_hold_for_fewer_samples_says_why(cut: Cut) -> None:
    with pytest.raises(dagrow.TraceError, match="uses norm 3 times for the example"):
        dagrow.trace(Ghost(cut).eval(), torch.randn(20, 4))


def test_a_loop_over_samples_says_so() -> None:
    with pytest.raises(dagrow.TraceError, match="uses norm 2 times for the example and 514 times for 257 times"):
        dagrow.trace(Ghost(lambda x: [row[None] for row in x]).eval(), torch.randn(2, 4))


def test_it_stays_so_after_a_growth() -> None:
    dag = dagrow.trace(Ghost(CUTS[2]).eval(), torch.randn(2, 4))
    batches = [(torch.randn(6, 4), torch.randn(6, 2))]
    (growth,) = dagrow.propose(dag, batches, nn.functional.mse_loss, [dagrow.AddNeurons(k=1, axes=("up",))])
    growth.apply(gamma=0.1)
    assert not dag.axis("a").growable


USUAL: list[Cut] = [
    lambda x: [x],
    lambda x: [torch.cat(x.chunk(2, 1), 1)],
    lambda x: [x.view(x.shape[0], 2, 3).flatten(1)],
    lambda x: [torch.stack(tuple(x.view(-1, 3, 2).permute(1, 0, 2).unbind(0)), 1).flatten(1)],
]


@pytest.mark.parametrize("cut", USUAL)
def test_forwards_that_count_no_samples_are_recorded_once(cut: Cut) -> None:
    program = record(Ghost(cut).eval(), torch.randn(2, 4))
    assert not looks_at_samples(program.graph, 2, program.baked_size)
    assert not any("calls" in node.meta for node in program.graph.nodes)


def test_inputs_with_more_samples_have_no_entries() -> None:
    inputs = (torch.randn(3, 4), {"mask": torch.ones(3, 2, dtype=torch.bool), "scale": torch.ones(5)}), {"n": 3}
    assert samples_of(inputs) == 3
    (x, rest), others = with_samples(inputs, 5)
    assert (x.shape, rest["mask"].shape, rest["scale"].shape) == ((15, 4), (15, 2), (5,))
    assert x.is_meta
    assert rest["mask"].dtype is torch.bool
    assert others == {"n": 3}


def test_calls_that_differ_are_marked() -> None:
    few, many = (record(Ghost(CUTS[2]).eval(), torch.randn(n, 4), verified=False).graph for n in (2, 20))
    assert uses(few) == {"a": 1, "norm": 1, "b": 1, "up": 1, "down": 1}
    assert uses(many)["norm"] == 3
    (said,) = mark_calls(few, many, 10)
    assert "uses norm once for the example and 3 times for 10 times as many samples" in said
    assert [node.target for node in few.nodes if "calls" in node.meta] == ["norm"]
