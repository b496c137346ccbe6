"""TODO solvers."""

from dagrow.solvers._als import Slotted, alternated
from dagrow.solvers._cross_validation import (
    RIDGES,
    Directed,
    FoldFit,
    fan_out_fits,
    move_fits,
    neuron_ridges,
    validate_directions,
    validate_fan_out,
    validate_move,
    with_cross_validated_ridge,
)
from dagrow.solvers._linalg import add_gram, complete, leading_svd
from dagrow.solvers._moments import FoldSplit, FoldView, Moments, MomentView, Pair, distinct
from dagrow.solvers._regression import (
    Compensation,
    Fit,
    Move,
    Regression,
    best_move,
    directions,
    explained_alone,
    fan_out,
    selected,
)
from dagrow.solvers._significance import LEVEL, Verdict, holm, upper_tail

__all__ = [
    "LEVEL",
    "RIDGES",
    "Compensation",
    "Directed",
    "Fit",
    "FoldFit",
    "FoldSplit",
    "FoldView",
    "MomentView",
    "Moments",
    "Move",
    "Pair",
    "Regression",
    "Slotted",
    "Verdict",
    "add_gram",
    "alternated",
    "best_move",
    "complete",
    "directions",
    "distinct",
    "explained_alone",
    "fan_out",
    "fan_out_fits",
    "holm",
    "leading_svd",
    "move_fits",
    "neuron_ridges",
    "selected",
    "upper_tail",
    "validate_directions",
    "validate_fan_out",
    "validate_move",
    "with_cross_validated_ridge",
]
