"""TODO statistics."""

from dagrow.statistics._features import (
    Feature,
    InputFeatures,
    NewChannels,
    NormInputs,
    OutputGoal,
    ResidualGoal,
    Stacked,
)
from dagrow.statistics._heldout_scores import DirectionScore, FitScore, SampleScores, fan_out_score, move_score
from dagrow.statistics._hooks import LayerHooks
from dagrow.statistics._measure import measure
from dagrow.statistics._objective import Loss, NotFiniteError, Objective, Step, sample_count
from dagrow.statistics._path_features import ActivationGoal, Hidden, MeanInputs, Ones, PatchInputs, Squares
from dagrow.statistics._position_map import PositionMap, per_channel, position_map
from dagrow.statistics._shifted_features import MovedFeatures, PulledGoal, TapFeatures

__all__ = [
    "ActivationGoal",
    "DirectionScore",
    "Feature",
    "FitScore",
    "Hidden",
    "InputFeatures",
    "LayerHooks",
    "Loss",
    "MeanInputs",
    "MovedFeatures",
    "NewChannels",
    "NormInputs",
    "NotFiniteError",
    "Objective",
    "Ones",
    "OutputGoal",
    "PatchInputs",
    "PositionMap",
    "PulledGoal",
    "ResidualGoal",
    "SampleScores",
    "Squares",
    "Stacked",
    "Step",
    "TapFeatures",
    "fan_out_score",
    "measure",
    "move_score",
    "per_channel",
    "position_map",
    "sample_count",
]
