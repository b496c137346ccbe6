"""The conformance kit for operators and rules of one's own.

Takes an operator and models (or a :class:`Case`: a model in float64 with batches and a loss), and raises AssertionError
where one of eleven laws does not hold: that a growth changes nothing at gamma = 0, that the loss falls as steeply as it
foretells, that nothing explains more, that ``undo`` restores every bit. Each law is a function of its own. Rules of
layers and operations are checked with :func:`try_axis`, which grows an axis and looks whether the function stays. The
slopes and regressions that the laws compare with are brute force and know nothing of the package's moments and solvers.

>>> import torch
>>> from torch import nn
>>> from dagrow import AddNeurons
>>> from dagrow.testing import LAWS, check_operator
>>> model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
>>> check_operator(AddNeurons(k=1), [model])  # raises AssertionError where a law does not hold
>>> [law.__name__ for law in LAWS][:3]
['preservation', 'slope', 'residual']
"""

from dagrow.testing._axis_trial import rounding, try_axes, try_axis
from dagrow.testing._cases import Case
from dagrow.testing._check_operator import LAWS, Law, check_operator
from dagrow.testing._laws import (
    additivity,
    check_descent,
    check_drop,
    check_slope,
    descent,
    invariance,
    optimality,
    preservation,
    residual,
    slope,
)
from dagrow.testing._laws_of_removal import narrowing
from dagrow.testing._laws_of_state import Interruption, atomicity, gentle, regrowth, undoing
from dagrow.testing._snapshots_and_slopes import snapshot

__all__ = [
    "LAWS",
    "Case",
    "Interruption",
    "Law",
    "additivity",
    "atomicity",
    "check_descent",
    "check_drop",
    "check_operator",
    "check_slope",
    "descent",
    "gentle",
    "invariance",
    "narrowing",
    "optimality",
    "preservation",
    "regrowth",
    "residual",
    "rounding",
    "slope",
    "snapshot",
    "try_axes",
    "try_axis",
    "undoing",
]
