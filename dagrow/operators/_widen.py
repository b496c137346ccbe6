"""``Widen``: the base of operators of one's own that add neurons along directions of their choice."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from dagrow.graph import Dag
from dagrow.operators._base import Candidate, Operator, Steps
from dagrow.operators.neurons import (
    ByAxis,
    NeuronSettings,
    Place,
    Proposal,
    by_axis,
    fit_fan_out,
    places,
    propose_along,
)
from dagrow.solvers import Moments, neuron_ridges
from dagrow.statistics import Objective


@dataclass(frozen=True)
class Widen(Operator):
    """Adds neurons to every axis that can grow and that a layer reads; a subclass says in which directions.

    It defines :meth:`propose`. The fan-out ``X = argmin E|v_perp - X h|^2`` is fitted to what the new neurons compute,
    ``h = sigma(alpha^T p)``.

    Args:
        ridge: of that fit, relative to each feature's second moment; None chooses it by cross-validation.
        folds: folds of the cross-validation; 1 for none, and then no ridge unless given.
    """

    ridge: float | None = None
    folds: int = 4

    def __post_init__(self) -> None:
        self.check_regularisation(self.ridge)

    @property
    def least_neurons(self) -> int:
        return 1

    @abstractmethod
    def propose(self, m: Moments, place: Place) -> Proposal | None:
        """Fan-in directions ``alpha [p, k]`` from ``m[place.features, place.features]``, or None for none.

        ``p`` is what ``place.producers`` read, one after the other, then for each channel of a unit again
        (``place.channels``, almost always 1). The constant 1 of a bias comes last in the part of the first producer
        that has one.
        """

    def candidates(self, dag: Dag) -> Sequence[Candidate]:
        axes = [axis for axis in dag.axes if "random" in axis.inits]
        options, shared = [place for axis in axes for place in places(dag, axis)], by_axis(project=True)
        return [Candidate(place.axis.name, partial(self._add_neurons, place, shared)) for place in options]

    def _add_neurons(self, place: Place, shared: ByAxis, objective: Objective) -> Steps:
        proposal = yield from propose_along(place, self.propose, [(place.features, place.features)])
        settings = NeuronSettings(self, place, neuron_ridges(self.ridge, self.folds), by_axis=shared)
        return (yield from fit_fan_out(settings, proposal, objective))
