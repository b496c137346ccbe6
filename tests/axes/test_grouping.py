"""Which channels grow together, where new ones land, and how they arrive."""

import math

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import LAW
from torch import Tensor, nn
from zoo import Plan, Split, Stage, Stream, Tied, Twice, TwoProducers, built, plans

import dagrow
from dagrow.axes import NO_CHANNEL
from dagrow.axes._union_find import UnionFind
from dagrow.statistics import position_map
from dagrow.testing import try_axis


def plan_dag(**stage) -> dagrow.Dag:
    case = built(Plan((Stage(**stage),), inputs=3, tokens=0))
    return dagrow.trace(case.model, case.batches[0][0])


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
    last = next(p for p in stream.producers if p.name == "downs.1")
    assert position_map(dag, stream, last, dag.edge("ups.0")) is None
    assert position_map(dag, stream, last, dag.edge("head")).aligned


def test_several_producers_and_consumers() -> None:
    dag = dagrow.trace(TwoProducers(), torch.randn(2, 3))
    assert summary(dag)["left+right"] == (4, ("readers.0", "readers.1", "readers.2"), True)


def test_a_concatenation_with_itself_has_two_columns_per_unit() -> None:
    dag = plan_dag(kind="cat_self", width=3)
    axis = dag.axis("parts.0.up")
    assert axis.layout.columns["head"].tolist() == [[0, 3], [1, 4], [2, 5]]
    landing = dag.widening(axis, 2).columns["head"]
    assert landing.old.tolist() == [0, 1, 2, 5, 6, 7]
    assert landing.new.tolist() == [[3, 8], [4, 9]]
    assert position_map(dag, axis, dag.edge("parts.0.up"), dag.edge("head")).index.tolist() == [[0, 0]]


def test_a_concatenation_with_the_input_keeps_the_input_in_its_place() -> None:
    dag = plan_dag(kind="cat_input", width=2)
    landing = dag.widening(dag.axis("parts.0.up"), 1).columns["head"]
    assert (landing.old.tolist(), landing.new.tolist()) == ([0, 1, 3, 4, 5], [[2]])


def test_a_gate_grows_both_halves() -> None:
    dag = plan_dag(kind="gate", width=2)
    axis = dag.axis("parts.0.up")
    assert axis.layout.rows["parts.0.up"].tolist() == [[0, 2], [1, 3]]
    widening = dag.widening(axis, 1)
    assert widening.rows["parts.0.up"].new.tolist() == [[2, 5]]
    assert widening.columns["head"].new.tolist() == [[2]]


def test_a_view_that_splits_features_into_tokens() -> None:
    dag = dagrow.trace(Split(), torch.randn(2, 3))
    axis = dag.axis("up")
    assert axis.width == 8
    assert axis.layout.rows["up"][0].tolist() == [0, 8, 16, 24]
    widening = dag.widening(axis, 1)
    assert widening.rows["up"].new.tolist() == [[8, 17, 26, 35]]
    assert [args[1:] for args, _ in widening.literals.values()] == [(-1, 4, 9)]
    assert position_map(dag, axis, dag.edge("up"), dag.edge("token")).index.tolist() == [[0], [1], [2], [3]]
    token = dag.axis("token")
    assert token.layout.columns["head"].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert dag.widening(token, 1).columns["head"].new.tolist() == [[2, 5, 8, 11]]


def test_riders_of_a_channel() -> None:
    dag = plan_dag(kind="scale", width=2, norm="before")
    axis = dag.axis("parts.0.up")
    neutral = {rider.name: rider.neutral for rider in axis.riders}
    assert set(neutral) == {"parts.0.between.0.norm", "parts.0.scale", "parts.0.shift"}
    assert (neutral["parts.0.scale"], neutral["parts.0.shift"]) == (1.0, 0.0)


def test_weights_of_two_names_do_not_grow() -> None:
    dag = dagrow.trace(Tied(), torch.randn(2, 3))
    frozen = {p.name for axis in dag.axes if not axis.growable for p in axis.producers}
    assert {"inner", "twin"} <= frozen
    assert all(axis.reason for axis in dag.axes if not axis.growable)


class Positioned(nn.Module):
    """Adds what a small network makes of the positions, as relative position biases do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.rand(5, 2))
        self.near, self.far = nn.Linear(2, 7), nn.Linear(7, 6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x + self.far(self.near(self.positions).relu())).relu()).mean(1)


def test_layers_that_read_no_samples_are_left_out_of_closed_forms() -> None:
    dag = dagrow.trace(Positioned(), torch.randn(4, 5, 6))
    assert dag.axis("near").growable
    assert dag.axis("near").shared == "near reads a constant, not the samples"
    batches = [(torch.randn(8, 5, 6), torch.randn(8, 2))]
    operators = [dagrow.AddNeurons(k=1), dagrow.MoveWeights()]
    where = {growth.where for growth in dagrow.propose(dag, batches, nn.functional.mse_loss, operators)}
    assert {"up", "down"} <= where
    assert not any("near" in name or "far" in name for name in where)
    (growth,) = dagrow.propose(
        dag, batches, nn.functional.mse_loss, [dagrow.AddNeurons(k=1, init="zero", axes=("near",))]
    )
    assert growth.where == "near"


def test_a_convolution_grows_within_its_groups_where_no_group_can_be_added() -> None:
    model = nn.Sequential(
        nn.Conv1d(6, 8, 1, groups=2),
        nn.GELU(),
        nn.Conv1d(8, 6, 3, groups=2, bias=False),
        nn.Flatten(),
        nn.LayerNorm(18),
        nn.Linear(18, 2),
    ).double()
    dag = dagrow.trace(model, torch.randn(4, 6, 5, dtype=torch.float64))
    assert dag.axis("0").width == 4
    assert dag.axis("0").shared == "0 has weights of its own for every group"
    batches = [(torch.randn(8, 6, 5, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64))]
    for init in ("zero", "copy"):
        operators = [dagrow.AddNeurons(k=3, init=init, axes=("0",))]
        (growth,) = dagrow.propose(dag, batches, nn.functional.mse_loss, operators)
        before = model(batches[0][0])
        receipt = growth.apply(0.0)
        assert torch.allclose(model(batches[0][0]), before, atol=1e-12)
        assert (model[0].out_channels, model[2].in_channels, model[2].groups) == (14, 14, 2)
        receipt.undo()


def test_a_layer_that_is_called_twice_grows_for_both_calls() -> None:
    dag = dagrow.trace(Twice(), torch.randn(2, 3))
    axis = dag.axis("first+again")
    assert axis.growable
    assert axis.shared == "again is called more than once"
    assert try_axis(dag, axis.name, [torch.randn(2, 3), torch.randn(4, 3)], tolerance=1e-5) is None
    batches = [(torch.randn(8, 3), torch.randn(8, 2))]
    for init in ("zero", "copy"):
        (growth,) = dagrow.propose(dag, batches, nn.functional.mse_loss, [dagrow.AddNeurons(k=1, init=init)])
        assert growth.where == axis.name
    for axes in (None, (axis.name,)):
        with pytest.raises(dagrow.GrowthError, match=r"again is called more than once\. Give init='zero' or 'copy'"):
            dagrow.propose(dag, batches, nn.functional.mse_loss, [dagrow.AddNeurons(k=1, axes=axes)])


def test_a_frozen_class_keeps_its_first_cause() -> None:
    classes = UnionFind()
    classes.fresh(4)
    classes.freeze(torch.tensor([1, NO_CHANNEL]), "first")
    classes.unite(torch.tensor(0), torch.tensor(1))
    classes.freeze(torch.tensor([0]), "second")
    assert [classes.cause(label) for label in range(4)] == ["first", "first", None, None]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([[0], [1]], [[2, 3]], [0, 0, 0, 0, 4, 5]),
        ([[0], [1]], [[NO_CHANNEL, 2]], [0, 0, 0, 3, 4, 5]),
        ([[NO_CHANNEL], [5]], [[3, 4]], [0, 1, 2, 3, 3, 3]),
        ([[[0, 1]], [[2, 3]]], [[4, 5], [4, 5], [4, 1]], [0, 1, 0, 1, 0, 1]),
    ],
)
def test_labels_meet_crosswise(a: list, b: list, expected: list[int]) -> None:
    classes = UnionFind()
    classes.fresh(6)
    classes.unite(torch.tensor(a), torch.tensor(b))
    assert classes.roots(torch.arange(6)).tolist() == expected


@given(data=st.data())
@settings(max_examples=200, derandomize=True, deadline=None, database=None)
def test_labels_that_meet_become_one_class_however_they_are_laid_out(data: st.DataObject) -> None:
    full = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    sides = []
    for _ in range(2):
        shape = [data.draw(st.sampled_from((1, size))) for size in full][data.draw(st.integers(0, len(full))) :]
        labels = st.integers(data.draw(st.sampled_from((NO_CHANNEL, 0))), 29)
        entries = data.draw(st.lists(labels, min_size=math.prod(shape), max_size=math.prod(shape)))
        sides.append(torch.tensor(entries).reshape(shape))
    classes, slow = UnionFind(), nx.Graph()
    slow.add_nodes_from(classes.fresh(30).tolist())
    pairs = zip(*(side.flatten().tolist() for side in torch.broadcast_tensors(*sides)), strict=True)
    slow.add_edges_from((a, b) for a, b in pairs if NO_CHANNEL not in (a, b))
    classes.unite(*sides)
    expected = {label: min(met) for met in nx.connected_components(slow) for label in met}
    assert classes.roots(torch.arange(30)).tolist() == [expected[label] for label in range(30)]


@given(plan=plans())
@LAW
def test_every_growable_axis_widens_and_every_other_one_says_why(plan: Plan) -> None:
    case = built(plan)
    dag = dagrow.trace(case.model, case.batches[0][0])
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    for axis in dag.axes:
        assert axis.growable == (axis.reason is None)
        if not axis.growable:
            with pytest.raises(dagrow.GrowthError):
                dag.widening(axis, 1)
            continue
        widening = dag.widening(axis, 2)
        for places in (widening.rows, widening.columns):
            for landing in places.values():
                landed = sorted([*landing.old.tolist(), *landing.new.flatten().tolist()])
                assert landed == list(range(landing.size))
                assert landing.old.tolist() == sorted(landing.old.tolist())
                assert len(landing.new) == 2
    assert all(torch.equal(value, case.model.state_dict()[key]) for key, value in before.items())
