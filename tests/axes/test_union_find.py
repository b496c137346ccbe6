"""Which labels are one class."""

import math

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dagrow.axes import NO_CHANNEL
from dagrow.axes._union_find import UnionFind


def test_a_frozen_class_keeps_its_first_reason() -> None:
    classes = UnionFind()
    classes.fresh(4)
    classes.freeze(torch.tensor([1, NO_CHANNEL]), "first")
    classes.unite(torch.tensor(0), torch.tensor(1))
    classes.freeze(torch.tensor([0]), "second")
    assert [classes.reason(label) for label in range(4)] == ["first", "first", None, None]


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
