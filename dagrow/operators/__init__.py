"""Ways to grow: the operators that there are, and all that one of your own needs.

An operator is a small frozen value that names candidates, the places where it could grow. The steps of a candidate are
a generator: it yields what it needs measured, is sent the moments, and returns a growth, or None. Operators read graphs
and moments; they never touch a model, its hooks or parameters, and know nothing of how growths are chosen.

To add neurons along directions of your own, subclass :class:`Widen`. For anything else, subclass :class:`Operator`:

>>> from dataclasses import dataclass
>>> from functools import partial
>>> import torch
>>> from torch import nn
>>> import dagrow
>>> from dagrow.operators import Candidate, Cost, Draft, Growth, InputFeatures, Needs, Operator, OutputGoal
>>> @dataclass(frozen=True)
... class GradientStep(Operator):
...     folds: int = 1
...
...     def candidates(self, dag):
...         return [Candidate(edge.name, partial(self.step, dag, edge)) for edge in dag.edges]
...
...     def step(self, dag, edge, objective):
...         pair = InputFeatures(edge.name, edge.bias), OutputGoal(edge.name)
...         moments = yield Needs([pair])
...         gradient, draft = moments[pair], Draft(dag)
...         draft.move(edge, gradient.T)
...         gain = float(gradient.square().sum())
...         gains, change = {edge.name: gain}, draft.change()
...         return Growth(self, edge.name, 0, gain, gains, Cost(), change=change, dag=dag, objective=objective)
>>> model = nn.Linear(3, 2)
>>> batches = [(torch.randn(20, 3), torch.randn(20, 2))]
>>> receipt = dagrow.grow(dagrow.trace(model, torch.randn(2, 3)), batches, nn.functional.mse_loss, [GradientStep()])
>>> receipt.loss_after < receipt.loss_before
True
"""

from dagrow.graph import Axis, Dag, Edge
from dagrow.operators._add_connection import AddConnection
from dagrow.operators._add_layer import AddLayer
from dagrow.operators._add_neurons import AddNeurons
from dagrow.operators._base import Candidate, Needs, Operator, Preview, Steps
from dagrow.operators._move_weights import MoveWeights
from dagrow.operators._remove_neurons import RemoveNeurons
from dagrow.operators._widen import Widen
from dagrow.operators.neurons import Place, Proposal, places
from dagrow.solvers import Moments, Pair
from dagrow.statistics import InputFeatures, NewChannels, Objective, OutputGoal
from dagrow.surgery import Cost, Draft, Growth

__all__ = [
    "AddConnection",
    "AddLayer",
    "AddNeurons",
    "Axis",
    "Candidate",
    "Cost",
    "Dag",
    "Draft",
    "Edge",
    "Growth",
    "InputFeatures",
    "Moments",
    "MoveWeights",
    "Needs",
    "NewChannels",
    "Objective",
    "Operator",
    "OutputGoal",
    "Pair",
    "Place",
    "Preview",
    "Proposal",
    "RemoveNeurons",
    "Steps",
    "Widen",
    "places",
]
