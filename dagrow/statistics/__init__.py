"""One pass over the user's batches: from a dag and a loss to the moments that every closed form is computed from.

An :class:`Objective` is the user's loss on the user's batches, or on samples that are drawn from them at random,
:class:`DrawnSamples`. :func:`measure` runs the model on them with hooks at its layers, forward and back to
pre-activations, and sums products of pairs of features in folds of samples. A :class:`Feature` names rows that a batch
leaves: what a layer reads (:class:`InputFeatures`), where the loss wants its output to go (:class:`OutputGoal`), what
new layers would compute, how all that arrives elsewhere. Features are the keys of the moments. Scores of single samples
are features, too. Models, gradients, modes and random states are left as they were found. Nothing here knows what the
moments are for: no operator, and no writing to a model.

>>> import torch
>>> from torch import nn
>>> import dagrow
>>> from dagrow.statistics import InputFeatures, Objective, OutputGoal, measure
>>> x = torch.linspace(-1, 1, 40).double()[:, None]
>>> model = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1)).double()
>>> _ = nn.init.ones_(model[0].weight), nn.init.zeros_(model[0].bias)
>>> objective = Objective(model, [(x, x.abs())], nn.functional.mse_loss)
>>> reads, goal = InputFeatures("2"), OutputGoal("2")  # of the last layer
>>> m = measure(dagrow.trace(model, x), objective, [(reads, reads), (reads, goal), (goal, goal)])
>>> m.samples, m.folds, m[reads, goal].shape
(40, 4, torch.Size([2, 1]))
>>> move = torch.linalg.solve(m[reads, reads], m[reads, goal])  # the best move of its weights
>>> bottleneck = float(m[goal, goal] - m[reads, goal].T @ move)  # what it cannot follow
>>> f"{bottleneck:.4f}"
'0.3498'
"""

from dagrow.statistics._backward import gradients_of
from dagrow.statistics._batches import is_noted, is_of_own_class, sample_count
from dagrow.statistics._drawn_samples import DrawnSamples, drawn
from dagrow.statistics._features import (
    Feature,
    InputFeatures,
    NewChannels,
    NormInputs,
    Norms,
    Ones,
    OutputGoal,
    ResidualGoal,
    Squares,
    Stacked,
)
from dagrow.statistics._gradient_check import BesideOutputsError
from dagrow.statistics._heldout_scores import (
    DirectionScore,
    DirectionTarget,
    FitScore,
    SampleScores,
    fan_out_score,
    move_score,
)
from dagrow.statistics._hooks import ForwardProbe, LayerHooks
from dagrow.statistics._kept_captures import KeptCaptures
from dagrow.statistics._limits import PassTooLongError
from dagrow.statistics._measure import measure
from dagrow.statistics._objective import Objective
from dagrow.statistics._options import Groups, MeasureOptions, Reduction, Samples
from dagrow.statistics._patch_products import patch_gram
from dagrow.statistics._path_features import ActivationGoal, Hidden, MeanInputs, PatchInputs
from dagrow.statistics._shifted_features import MovedFeatures, PulledGoal, TapFeatures
from dagrow.statistics._steps import Loss, Step
from dagrow.statistics._unit_effects import UnitEffects
from dagrow.tracing import bind

__all__ = [
    "ActivationGoal",
    "BesideOutputsError",
    "DirectionScore",
    "DirectionTarget",
    "DrawnSamples",
    "Feature",
    "FitScore",
    "ForwardProbe",
    "Groups",
    "Hidden",
    "InputFeatures",
    "KeptCaptures",
    "LayerHooks",
    "Loss",
    "MeanInputs",
    "MeasureOptions",
    "MovedFeatures",
    "NewChannels",
    "NormInputs",
    "Norms",
    "Objective",
    "Ones",
    "OutputGoal",
    "PassTooLongError",
    "PatchInputs",
    "PulledGoal",
    "Reduction",
    "ResidualGoal",
    "SampleScores",
    "Samples",
    "Squares",
    "Stacked",
    "Step",
    "TapFeatures",
    "UnitEffects",
    "bind",
    "drawn",
    "fan_out_score",
    "gradients_of",
    "is_noted",
    "is_of_own_class",
    "measure",
    "move_score",
    "patch_gram",
    "sample_count",
]
