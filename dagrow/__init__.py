"""dagrow grows PyTorch networks where they are too small, in closed form, during training."""

from dagrow.budget import Budget
from dagrow.dag import Axis, Dag, Edge, trace
from dagrow.errors import BatchError, DagrowError, GrowthError, LossError, OptimizerError, StoreError, TraceError
from dagrow.figures import FigureError
from dagrow.fitting import fit
from dagrow.grow import Bottleneck, Bottlenecks, bottlenecks, grow, propose
from dagrow.grower import Grower
from dagrow.growth import Growth, Receipt
from dagrow.history import History, HistoryError
from dagrow.operators import AddConnection, AddLayer, AddNeurons, MoveWeights, Operator
from dagrow.permutation import PermutationTest, permutation_test
from dagrow.planning import plan
from dagrow.policies import ByGain, ByGainPerFlop, ByGainPerParameter, ByLineSearch, Policy, RoundRobin
from dagrow.records import Grown, Record
from dagrow.schedules import (
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
from dagrow.short_training import ShortTraining
from dagrow.store import load, save
from dagrow.tangent import Tangent, tangent

__all__ = [
    "AddConnection", "AddLayer", "AddNeurons", "AfterEpoch", "Axis", "BatchError", "Bottleneck", "Bottlenecks",
    "Budget", "ByGain", "ByGainPerFlop", "ByGainPerParameter", "ByLineSearch", "Dag", "DagrowError", "Edge",
    "EveryEpochs", "FigureError", "Grower", "Grown", "Growth", "GrowthError", "History", "HistoryError",
    "LossError", "LossReached", "MoveWeights", "NoImprovement", "NothingToAdd", "OnBottleneck", "OnPlateau",
    "Operator", "OptimizerError", "PermutationTest", "Policy", "Receipt", "Record", "RoundRobin", "Schedule",
    "ShortTraining", "Situation", "StopRule", "StoreError", "Tangent", "TraceError", "bottlenecks", "fit", "grow",
    "load", "permutation_test", "plan", "propose", "save", "tangent", "trace",
]  # fmt: skip
