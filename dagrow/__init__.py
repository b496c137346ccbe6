"""dagrow grows PyTorch networks where they are too small, in closed form, during training.

It takes a model, batches and a loss: :func:`trace` reads off the model which widths can grow, :func:`bottlenecks` and
:func:`propose` measure where weights cannot follow the loss's gradient and what could be added there, :func:`grow`
adds it to the model itself, with its optimizer. :class:`Grower` and :func:`fit` do so along a training. Ways to grow of
your own need ``dagrow.operators`` and ``dagrow.testing``; layers that dagrow does not know, ``dagrow.layers``. This
face holds nothing of its own: it is what the rooms below give to users.

>>> import dagrow, torch
>>> from torch import nn
>>> _ = torch.manual_seed(0)
>>> x = torch.randn(256, 3)
>>> batches = [(x, x[:, :1] * x[:, 1:2])]  # inputs with targets; a DataLoader does as well
>>> model = nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 1))
>>> dag = dagrow.trace(model, x)
>>> [(axis.name, axis.width, axis.growable) for axis in dag.axes]
[('0', 1, True), ('2', 1, False)]
>>> growth, *_ = dagrow.propose(dag, batches, nn.functional.mse_loss, [dagrow.AddNeurons(k=2)])
>>> growth.where, growth.neurons, growth.significant
('0', 2, True)
>>> receipt = dagrow.grow(dag, batches, nn.functional.mse_loss, [dagrow.AddNeurons(k=2)])
>>> receipt.loss_after < receipt.loss_before, model[0].out_features
(True, 3)
"""

from dagrow._version import __version__
from dagrow.errors import (
    BatchError,
    DagrowError,
    FigureError,
    GrowthError,
    HistoryError,
    LimitError,
    LossError,
    OptimizerError,
    StoreError,
    TraceError,
)
from dagrow.graph import Axis, Dag, Edge, trace
from dagrow.growing import (
    AfterEpoch,
    AnnealAfterGrowing,
    Bottleneck,
    Bottlenecks,
    Budget,
    ByGain,
    ByGainPerFlop,
    ByGainPerParameter,
    ByLineSearch,
    EveryEpochs,
    Grower,
    History,
    LossReached,
    NoImprovement,
    NothingToAdd,
    OnBottleneck,
    OnPlateau,
    Policy,
    RoundRobin,
    Schedule,
    ShortTraining,
    Situation,
    StopRule,
    Tangent,
    bottlenecks,
    enlarge,
    fit,
    grow,
    plan,
    propose,
    tangent,
)
from dagrow.operators import AddConnection, AddLayer, AddNeurons, MoveWeights, Operator, RemoveNeurons
from dagrow.pictures import Grown, Record
from dagrow.surgery import Growth, Receipt, load, save

__all__ = [
    "AddConnection",
    "AddLayer",
    "AddNeurons",
    "AfterEpoch",
    "AnnealAfterGrowing",
    "Axis",
    "BatchError",
    "Bottleneck",
    "Bottlenecks",
    "Budget",
    "ByGain",
    "ByGainPerFlop",
    "ByGainPerParameter",
    "ByLineSearch",
    "Dag",
    "DagrowError",
    "Edge",
    "EveryEpochs",
    "FigureError",
    "Grower",
    "Grown",
    "Growth",
    "GrowthError",
    "History",
    "HistoryError",
    "LimitError",
    "LossError",
    "LossReached",
    "MoveWeights",
    "NoImprovement",
    "NothingToAdd",
    "OnBottleneck",
    "OnPlateau",
    "Operator",
    "OptimizerError",
    "Policy",
    "Receipt",
    "Record",
    "RemoveNeurons",
    "RoundRobin",
    "Schedule",
    "ShortTraining",
    "Situation",
    "StopRule",
    "StoreError",
    "Tangent",
    "TraceError",
    "__version__",
    "bottlenecks",
    "enlarge",
    "fit",
    "grow",
    "load",
    "plan",
    "propose",
    "save",
    "tangent",
    "trace",
]
