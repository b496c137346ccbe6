"""Messages name the user's line, and no line of who asked for the trace."""

import inspect

from forwards import made, mlp
from torch import nn, randn

import dagrow
from dagrow.tracing import record


def test_a_node_has_the_line_of_forward_that_made_it() -> None:
    def forward(self: nn.Module, x):
        return x.relu()

    line = inspect.getsourcelines(forward)[1] + 1
    (node,) = (node for node in record(made(forward), randn(3, 4)).graph.nodes if node.op == "call_method")
    assert node.meta["source"] == f"test_source_lines.py:{line}"


def test_the_line_that_asks_for_a_trace_is_none_of_forward() -> None:
    layers = [node for node in dagrow.trace(mlp(), randn(3, 4)).program.graph.nodes if node.op == "call_module"]
    assert {node.meta["source"] for node in layers} == {"unknown line"}
