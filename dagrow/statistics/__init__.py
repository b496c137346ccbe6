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
from dagrow.statistics._heldout_scores import DirectionScore, FitScore, SampleScores, agreement, move_agreement
from dagrow.statistics._hooks import LayerHooks
from dagrow.statistics._measure import measure
from dagrow.statistics._objective import Loss, NotFiniteError, Objective, Step, samples_of
from dagrow.statistics._patch_products import patch_gram
from dagrow.statistics._path_features import ActivationGoal, Hidden, MeanInputs, Ones, PatchInputs, Squares
from dagrow.statistics._position_map import PositionMap, per_channel, position_map
from dagrow.statistics._shifted_features import MovedFeatures, PulledGoal, TapFeatures
from dagrow.tracing import bind

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
    "agreement",
    "bind",
    "measure",
    "move_agreement",
    "patch_gram",
    "per_channel",
    "position_map",
    "samples_of",
]
