"""Where what a producer writes arrives at a consumer."""

import torch
from zoo import Plan, Split, Stage, Stream, built

import dagrow
from dagrow.statistics import position_map


def test_a_residual_stream_arrives_at_those_after_it() -> None:
    dag = dagrow.trace(Stream(4, 3, 2), torch.randn(2, 3))
    stream = dag.axis("embed+downs.0+downs.1")
    last = next(p for p in stream.producers if p.name == "downs.1")
    assert position_map(dag, stream, last, dag.edge("ups.0")) is None
    assert position_map(dag, stream, last, dag.edge("head")).aligned


def test_a_concatenation_with_itself_arrives_twice() -> None:
    case = built(Plan((Stage(kind="cat_self", width=3),), inputs=3, tokens=0))
    dag = dagrow.trace(case.model, case.batches[0][0])
    axis = dag.axis("parts.0.up")
    assert position_map(dag, axis, dag.edge("parts.0.up"), dag.edge("head")).index.tolist() == [[0, 0]]


def test_a_view_that_splits_features_into_tokens_arrives_at_each() -> None:
    dag = dagrow.trace(Split(), torch.randn(2, 3))
    axis = dag.axis("up")
    assert position_map(dag, axis, dag.edge("up"), dag.edge("token")).index.tolist() == [[0], [1], [2], [3]]
