"""Sizes in a forward, as a wider axis needs them."""

import torch
from zoo import Split

import dagrow


def test_a_view_that_splits_features_into_tokens() -> None:
    dag = dagrow.trace(Split(), torch.randn(2, 3))
    axis = dag.axis("up")
    assert axis.width == 8
    assert axis.layout.rows["up"][0].tolist() == [0, 8, 16, 24]
    widening = dag.widening(axis, 1)
    assert widening.rows["up"].new.tolist() == [[8, 17, 26, 35]]
    assert [args[1:] for args, _ in widening.literals.values()] == [(-1, 4, 9)]
    token = dag.axis("token")
    assert token.layout.columns["head"].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert dag.widening(token, 1).columns["head"].new.tolist() == [[2, 5, 8, 11]]
