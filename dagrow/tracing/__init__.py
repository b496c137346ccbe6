"""TODO tracing."""

from dagrow.tracing._attribute_int import AttributeInt, AttributePath
from dagrow.tracing._call_forms import run_opened
from dagrow.tracing._dynamic_sizes import DynamicSizes, dynamic_sizes
from dagrow.tracing._forward_codegen import PathRecord, added_paths, unwritable, write_forward
from dagrow.tracing._frontends import record, symbolic
from dagrow.tracing._leaf_modules import is_opaque
from dagrow.tracing._program import Executor, Program, bind, hold_values, tensor_at
from dagrow.tracing._verification import fewer, relax

__all__ = [
    "AttributeInt",
    "AttributePath",
    "DynamicSizes",
    "Executor",
    "PathRecord",
    "Program",
    "added_paths",
    "bind",
    "dynamic_sizes",
    "fewer",
    "hold_values",
    "is_opaque",
    "record",
    "relax",
    "run_opened",
    "symbolic",
    "tensor_at",
    "unwritable",
    "write_forward",
]
