"""TODO graph."""

from dagrow.graph._dag import Dag, Rule, trace
from dagrow.graph._edges import Axis, Edge
from dagrow.graph._summary import tables, weight_uses

__all__ = [
    "Axis",
    "Dag",
    "Edge",
    "Rule",
    "tables",
    "trace",
    "weight_uses",
]
