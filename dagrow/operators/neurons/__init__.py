"""New channels of an axis: where they can be written, what they look for, and what reads them.

A place is an axis with the producers that write the new channels. Fan-in comes from linear theory or from an operator
of one's own, fan-out from a regression on what the new channels really compute; or both are such that the function
stays the same. All are steps of candidates: they yield what they need measured. Nothing here writes to a model.

>>> import torch
>>> from torch import nn
>>> import dagrow
>>> from dagrow.operators.neurons import places
>>> model = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 3))
>>> dag = dagrow.trace(model, torch.randn(2, 5))
>>> (place,) = places(dag, dag.axis("0"))
>>> [edge.name for edge in place.producers], place.width  # 5 inputs, and the constant 1 of the bias
(['0'], 6)
"""

from dagrow.operators.neurons._axis_moments import ByAxis, by_axis
from dagrow.operators.neurons._fan_in import propose_directions
from dagrow.operators.neurons._fan_out import fit_fan_out
from dagrow.operators.neurons._places import Place, places
from dagrow.operators.neurons._preserving import NewUnits, add_copies, add_gradmax, add_zero
from dagrow.operators.neurons._proposal import OPEN, Proposal, drawn, propose_along
from dagrow.operators.neurons._removal import Removal, Score, remove_units
from dagrow.operators.neurons._settings import NeuronSettings

__all__ = [
    "OPEN",
    "ByAxis",
    "NeuronSettings",
    "NewUnits",
    "Place",
    "Proposal",
    "Removal",
    "Score",
    "add_copies",
    "add_gradmax",
    "add_zero",
    "by_axis",
    "drawn",
    "fit_fan_out",
    "places",
    "propose_along",
    "propose_directions",
    "remove_units",
]
