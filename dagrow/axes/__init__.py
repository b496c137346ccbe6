"""Which channels grow together, and what a wider axis changes.

In come the graph of a model's forward and its layers; this room runs the graph on integer labels of channels instead
of numbers. Out go the axes, each a width whose channels must grow together or the reason why it cannot grow, and for
an axis and a number of new units the plan of all that changes: where new rows, columns and entries lie, and which
sizes the forward needs. It reads models and never changes one; it knows nothing of data, losses or growing.

>>> import torch
>>> from torch import nn
>>> from dagrow.layers import DEFAULT_RULES, layer_sites
>>> from dagrow.tracing import record
>>> class Perceptron(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 2)
...
...     def forward(self, x):
...         return self.down(self.up(x).relu())
>>> model = Perceptron()
>>> program = record(model, torch.randn(5, 3))
>>> layers, labelling = labelled(program.graph, model, layer_sites(program.graph, model, DEFAULT_RULES))
>>> for axis in group(labelling):
...     print(*axis.rows, axis.width, axis.reason)
up 4 None
down 2 is an output of the model
>>> plan = widen(program, layers, group(labelling)[0], 2)
>>> plan.rows["up"].new.tolist(), plan.columns["down"].new.tolist()
([[4], [5]], [[4], [5]])
"""

from dagrow.axes._attribute_sizes import changed_attributes
from dagrow.axes._channel_labels import Labelling, Rider
from dagrow.axes._grouping import AxisLayout, group
from dagrow.axes._head_axes import head_axes
from dagrow.axes._index_map import DROPPED, CannotWidenError, IndexMap
from dagrow.axes._label_interpreter import LabelInterpreter, located, name_of
from dagrow.axes._label_tensors import NO_CHANNEL
from dagrow.axes._narrowing import narrow
from dagrow.axes._shared_tensors import labelled
from dagrow.axes._size_rewriting import Arguments
from dagrow.axes._widening import WideningPlan, disjoint, widen

__all__ = [
    "DROPPED",
    "NO_CHANNEL",
    "Arguments",
    "AxisLayout",
    "CannotWidenError",
    "IndexMap",
    "LabelInterpreter",
    "Labelling",
    "Rider",
    "WideningPlan",
    "changed_attributes",
    "disjoint",
    "group",
    "head_axes",
    "labelled",
    "located",
    "name_of",
    "narrow",
    "widen",
]
