"""TODO growing."""

from dagrow.growing._bottlenecks import Bottleneck, Bottlenecks, bottlenecks
from dagrow.growing._fit import fit
from dagrow.growing._grow import grow
from dagrow.growing._grower import Grower
from dagrow.growing._history import History
from dagrow.growing._planning import Budget, plan
from dagrow.growing._policies import (
    ByGain,
    ByGainPerFlop,
    ByGainPerParameter,
    ByLineSearch,
    Policy,
    RoundRobin,
    ShortTraining,
)
from dagrow.growing._propose import propose
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
    "Bottleneck",
    "Bottlenecks",
    "Budget",
    "ByGain",
    "ByGainPerFlop",
    "ByGainPerParameter",
    "ByLineSearch",
    "EveryEpochs",
    "Grower",
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
    "bottlenecks",
    "fit",
    "grow",
    "plan",
    "propose",
    "tangent",
]
