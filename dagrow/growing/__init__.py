"""Growing: where a network is too small, what could be added, which of it under a budget, and when.

It takes a dag, batches and a loss, asks operators for growths, and has surgery apply the chosen ones: once
(:func:`grow`), inside a loop (:class:`Grower`), or with the loop (:func:`fit`). What it does not know is how a growth
is computed or written into a model; what happened it keeps as plain records, which pictures draw.

>>> import torch
>>> from torch.nn import Linear, Sequential, Tanh
>>> from torch.nn.functional import mse_loss
>>> from dagrow.graph import trace
>>> from dagrow.growing import Budget, Grower
>>> from dagrow.operators import AddNeurons
>>> _ = torch.manual_seed(0)
>>> x = torch.randn(200, 3)
>>> model = Sequential(Linear(3, 1), Tanh(), Linear(1, 1))
>>> grower = Grower(trace(model, x), mse_loss, [AddNeurons(k=2)], Budget(neurons=4))
>>> for epoch in range(3):
...     receipt = grower.step(epoch, [(x, x[:, :1] * x[:, 1:2])])
>>> model[0].out_features, grower.over
(5, 'the budget is spent')
"""

from dagrow.growing._annealing import AnnealAfterGrowing
from dagrow.growing._bottlenecks import Bottleneck, Bottlenecks, bottlenecks
from dagrow.growing._enlarge import enlarge
from dagrow.growing._fit import fit
from dagrow.growing._grow import grow
from dagrow.growing._grower import Grower
from dagrow.growing._history import History
from dagrow.growing._left_out import Growths
from dagrow.growing._line_search import best_amplitude
from dagrow.growing._planning import Budget, applicable, plan
from dagrow.growing._policies import (
    ByGain,
    ByGainPerFlop,
    ByGainPerParameter,
    ByLineSearch,
    Policy,
    RoundRobin,
    ShortTraining,
)
from dagrow.growing._propose import corrected, propose
from dagrow.growing._schedules import (
    AfterEpoch,
    EveryEpochs,
    LossReached,
    NoImprovement,
    NothingToAdd,
    OnBottleneck,
    OnPlateau,
    Schedule,
    Situation,
    StopRule,
)
from dagrow.growing._tangent import Tangent, tangent

__all__ = [
    "AfterEpoch",
    "AnnealAfterGrowing",
    "Bottleneck",
    "Bottlenecks",
    "Budget",
    "ByGain",
    "ByGainPerFlop",
    "ByGainPerParameter",
    "ByLineSearch",
    "EveryEpochs",
    "Grower",
    "Growths",
    "History",
    "LossReached",
    "NoImprovement",
    "NothingToAdd",
    "OnBottleneck",
    "OnPlateau",
    "Policy",
    "RoundRobin",
    "Schedule",
    "ShortTraining",
    "Situation",
    "StopRule",
    "Tangent",
    "applicable",
    "best_amplitude",
    "bottlenecks",
    "corrected",
    "enlarge",
    "fit",
    "grow",
    "plan",
    "propose",
    "tangent",
]
