"""dagrow grows PyTorch networks where they are too small, in closed form, during training."""

from dagrow.dag import Axis, Dag, Edge, trace
from dagrow.errors import BatchError, DagrowError, GrowthError, LossError, OptimizerError, StoreError, TraceError
from dagrow.grow import Bottleneck, Bottlenecks, bottlenecks, grow, propose
from dagrow.growth import Growth, Receipt
from dagrow.operators import AddConnection, AddLayer, AddNeurons, MoveWeights, Operator
from dagrow.store import load, save
from dagrow.tangent import Tangent, tangent

__all__ = [
    "AddConnection", "AddLayer", "AddNeurons", "Axis", "BatchError", "Bottleneck", "Bottlenecks", "Dag", "DagrowError",
    "Edge", "Growth", "GrowthError", "LossError", "MoveWeights", "Operator", "OptimizerError", "Receipt", "StoreError",
    "Tangent", "TraceError", "bottlenecks", "grow", "load", "propose", "save", "tangent", "trace",
]  # fmt: skip
