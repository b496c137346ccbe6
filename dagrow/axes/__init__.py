"""TODO axes."""

from dagrow.axes._channel_labels import Labelling, Rider
from dagrow.axes._grouping import AxisLayout, group
from dagrow.axes._head_axes import head_axes
from dagrow.axes._index_map import CannotWidenError, IndexMap
from dagrow.axes._label_interpreter import LabelInterpreter
from dagrow.axes._label_tensors import NO_CHANNEL
from dagrow.axes._shared_tensors import labelled
from dagrow.axes._size_rewriting import Arguments
from dagrow.axes._widening import WideningPlan, disjoint, widen

__all__ = [
    "NO_CHANNEL",
    "Arguments",
    "AxisLayout",
    "CannotWidenError",
    "IndexMap",
    "LabelInterpreter",
    "Labelling",
    "Rider",
    "WideningPlan",
    "disjoint",
    "group",
    "head_axes",
    "labelled",
    "widen",
]
