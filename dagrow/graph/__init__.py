"""A model as users see it: edges, which are its weighted layers, and axes, which are its hidden widths.

:func:`trace` reads both off a model, together with what cannot grow and why, and gives a :class:`Dag`. All that was
read off lies in one view that never changes; a growth gives the dag another one, and undo gives the old one back. This
room knows nothing of batches and losses, and writes nothing into a model.

>>> import torch
>>> from torch import nn
>>> from dagrow.graph import trace
>>> dag = trace(nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)), torch.ones(4, 5))
>>> [edge.name for edge in dag.edges]
['0', '2']
>>> [(axis.name, axis.width, axis.growable) for axis in dag.axes]
[('0', 3, True), ('2', 2, False)]
>>> dag.flop_count()  # of one sample: a multiplication and an addition for each entry of a weight
42
"""

from dagrow.graph._axes import Axis, Writing
from dagrow.graph._dag import Dag, trace
from dagrow.graph._edges import Edge
from dagrow.graph._owners import check_owners
from dagrow.graph._position_map import PositionMap, per_channel
from dagrow.graph._summary import weight_uses
from dagrow.graph._view import Rule

__all__ = [
    "Axis",
    "Dag",
    "Edge",
    "PositionMap",
    "Rule",
    "Writing",
    "check_owners",
    "per_channel",
    "trace",
    "weight_uses",
]
