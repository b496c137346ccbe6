"""TODO operators."""

from dagrow.operators._add_connection import AddConnection
from dagrow.operators._add_layer import AddLayer
from dagrow.operators._add_neurons import AddNeurons
from dagrow.operators._base import Candidate, Operator, Stage
from dagrow.operators._move_weights import MoveWeights
from dagrow.operators._widen import Widen
from dagrow.operators.neurons import Place, Proposal, WidenCandidate, places

__all__ = [
    "AddConnection",
    "AddLayer",
    "AddNeurons",
    "Candidate",
    "MoveWeights",
    "Operator",
    "Place",
    "Proposal",
    "Stage",
    "Widen",
    "WidenCandidate",
    "places",
]
