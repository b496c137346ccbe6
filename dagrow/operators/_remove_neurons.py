"""``RemoveNeurons``: a hidden axis without the units that are needed least."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

from dagrow.errors import GrowthError, NoPlaceError, check_whole
from dagrow.graph import Axis, Dag
from dagrow.operators._base import Candidate, Operator, check_names
from dagrow.operators.neurons import Removal, Score, remove_units
from dagrow.solvers import REFIT_RIDGES


@dataclass(frozen=True)
class RemoveNeurons(Operator):
    """Takes from hidden axes the units that are needed least, and refits what their consumers read of the others.

    A consumer with weights ``W`` reads features ``b``, with ``G = E b b^T``. Without the units S it reads ``b_R``, the
    constant of its bias among them, and its other weights move by

        Delta = argmin E|W_S b_S - Delta b_R|^2 = W_S G_SR G_RR^-1                                  (8)

    Units go one after the other, each the one by which least more of what all consumers write is lost. The growth is
    the way there, ``W + gamma (-W_S, Delta)``; its ``gain`` is minus the slope of the loss on it. It is applied at
    gamma = 1 only, where the units are gone. ``heldout_gain`` is minus the predicted rise of the loss, with Delta
    fitted on the other folds. Parameters stay the same objects, only narrower.

    Args:
        k: units per axis, exactly; None takes as many as go at a predicted rise that is no more than its standard
            error, possibly none: dead ones, doubled ones, and those that the others stand in for.
        axes: names of the axes to consider; by default all that can grow, that a layer reads and that keep a unit.
        score: what says which units go. ``"refit"``: what is lost once the others stand in for them. As rivals, and
            without a refit: ``"magnitude"``, the sum of the magnitudes of their fan-in weights; ``"taylor"``, the mean
            over samples of ``|<v, W_u b_u>|``, by how much the loss changes, to first order, as they become zero.
        ridge: of Delta, relative to each feature's second moment; None chooses it by cross-validation.
        folds: folds of the cross-validation; 1 for none, and then no ridge unless given.

    Raises (from ``candidates``):
        GrowthError: an axis that was asked for cannot lose so many units, or none can, however wide.

    Source: LeCun et al. 1990 (Optimal Brain Damage); Hassibi and Stork 1993 (Optimal Brain Surgeon); He et al. 2017
    (least squares); Li et al. 2017 (magnitudes); Molchanov et al. 2017 (Taylor). The prediction is this package's own.
    """

    k: int | None = None
    axes: tuple[str, ...] | None = None
    score: Score = "refit"
    ridge: float | None = None
    folds: int = 4

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise GrowthError(
                f"RemoveNeurons(score={self.score!r}) is not one of {', '.join(map(repr, get_args(Score)))}."
            )
        check_whole("RemoveNeurons", 1, none="as many as go for nothing", k=self.k)
        self.check_regularisation(self.ridge)
        if self.k is None and self.folds == 1:
            raise GrowthError(
                "RemoveNeurons(k=None) needs folds of at least 2: it is the predicted rise on samples that were left "
                "out that decides. Give k=."
            )
        check_names(self, "axes")

    @property
    def least_neurons(self) -> int:
        return -(self.k or 1)

    def candidates(self, dag: Dag) -> Sequence[Candidate]:
        ridges = (self.ridge,) if self.ridge is not None else REFIT_RIDGES if self.folds > 1 else (0.0,)
        removals = [Removal(self, dag, axis, self.k, self.score, ridges) for axis in self._axes(dag)]
        return [Candidate(each.axis.name, partial(remove_units, each), tests=0) for each in removals]

    def _axes(self, dag: Dag) -> list[Axis]:
        if self.axes is not None:
            axes = [dag.axis(name) for name in self.axes]
            obstacles = [f"{axis.name} ({why})" for axis in axes if (why := self._obstacle(axis))]
            if obstacles:
                raise GrowthError(
                    f"{self!r} cannot take units from {', '.join(obstacles)}; leave it out of axes=, or give another k."
                )
            return axes
        if all(map(self._obstacle_at_any_width, dag.axes)):
            growable = [f"{axis.name}: {self._obstacle(axis)}" for axis in dag.axes if axis.growable]
            raise NoPlaceError(f"no axis can lose units{': ' if growable else ''}{'; '.join(growable)}:\n{dag}")
        return [axis for axis in dag.axes if not self._obstacle(axis)]

    def _obstacle(self, axis: Axis) -> str | None:
        """Why units of the axis cannot go, or None."""
        least = axis.layout.least
        is_narrow = axis.width - (self.k or 1) < least
        too_narrow = f"it is {axis.width} wide, and {least} have to stay" if is_narrow else None
        return self._obstacle_at_any_width(axis) or too_narrow

    @staticmethod
    def _obstacle_at_any_width(axis: Axis) -> str | None:
        if not axis.growable:
            return str(axis.reason)
        if not axis.consumers:
            return "no layer reads it: its channels meet in a product of two layers, where nothing can be refitted"
        if axis.elsewhere:
            return f"nothing is known of what {', '.join(axis.elsewhere)} read there, which only other examples run"
        if axis.shared:
            return f"no closed form holds for it: {axis.shared}"
        return None
