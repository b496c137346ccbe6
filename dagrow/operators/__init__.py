"""Ways to grow, one idea a file."""

from dagrow.operators.add_connection import AddConnection
from dagrow.operators.add_layer import AddLayer
from dagrow.operators.add_neurons import AddNeurons
from dagrow.operators.base import Candidate, Operator, Stage
from dagrow.operators.move import MoveWeights
from dagrow.operators.neurons import Proposal, WidenCandidate
from dagrow.operators.places import Place, places
from dagrow.operators.widen import Widen

__all__ = [
    "AddConnection", "AddLayer", "AddNeurons", "Candidate", "MoveWeights", "Operator", "Place", "Proposal", "Stage",
    "Widen", "WidenCandidate", "places",
]  # fmt: skip
