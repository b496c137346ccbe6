"""From a model to a :class:`Program`, the graph of its forward, and from a graph back to a forward.

It takes a user's module and example inputs, runs the module once and writes down what it calls; neither the module nor
the process is changed. It must not know what a layer is to dagrow, which channels it has, or that anything grows: what
changes in a forward that is written anew comes as arguments of nodes.

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
>>> program = record(model, torch.randn(3, 4))
>>> [node.op for node in program.graph.nodes]
['placeholder', 'call_module', 'call_module', 'call_module', 'output']
>>> program.run(torch.randn(5, 4)).shape
torch.Size([5, 2])
>>> write_forward(program, literals={}).__mro__[1].__name__
'Sequential'
"""

from dagrow.tracing._attribute_int import AttributeInt, AttributePath, Trial
from dagrow.tracing._autocast import CAST, autocast_obstacle, device_of
from dagrow.tracing._call_forms import run_decomposed
from dagrow.tracing._dynamic_sizes import DynamicSizes, dynamic_sizes
from dagrow.tracing._fixed_arguments import fixed_arguments, given_number
from dagrow.tracing._forward_codegen import PathRecord, added_paths, unwritable, write_forward
from dagrow.tracing._frontends import raised_otherwise, record, symbolic
from dagrow.tracing._inputs import bind, hold_values
from dagrow.tracing._leaf_modules import is_opaque
from dagrow.tracing._program import Executor, Program, tensor_at
from dagrow.tracing._source_lines import source, statement
from dagrow.tracing._traced_int import Comparison
from dagrow.tracing._verification import relax_guards, two_samples

__all__ = [
    "CAST",
    "AttributeInt",
    "AttributePath",
    "Comparison",
    "DynamicSizes",
    "Executor",
    "PathRecord",
    "Program",
    "Trial",
    "added_paths",
    "autocast_obstacle",
    "bind",
    "device_of",
    "dynamic_sizes",
    "fixed_arguments",
    "given_number",
    "hold_values",
    "is_opaque",
    "raised_otherwise",
    "record",
    "relax_guards",
    "run_decomposed",
    "source",
    "statement",
    "symbolic",
    "tensor_at",
    "two_samples",
    "unwritable",
    "write_forward",
]
