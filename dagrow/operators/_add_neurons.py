"""``AddNeurons``: new neurons on a hidden axis."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from dagrow.errors import SEEDS, GrowthError, NoPlaceError, check_whole
from dagrow.graph import Axis, Dag
from dagrow.operators._base import Candidate, Operator, Steps, check_names
from dagrow.operators.neurons import (
    OPEN,
    ByAxis,
    NeuronSettings,
    NewUnits,
    Place,
    Proposal,
    add_copies,
    add_gradmax,
    add_zero,
    by_axis,
    drawn,
    fit_fan_out,
    places,
    propose_along,
    propose_directions,
)
from dagrow.solvers import Moments, neuron_ridges
from dagrow.statistics import Objective

Solver = Literal["sequential", "svd", "als", "joint", "unprojected"]
Init = Literal["optimal", "random_features", "random", "gradmax", "copy", "zero"]
PRESERVING = {"gradmax": add_gradmax, "copy": add_copies, "zero": add_zero}


@dataclass(frozen=True)
class AddNeurons(Operator):
    """Widens hidden axes by the neurons that explain most of their consumers' bottleneck.

    Args:
        k: neurons per axis, exactly; None takes as many as the held-out gain supports, possibly none. Where linear
            theory holds fewer directions than k (it holds as many as the consumers have outputs), the rest are
            random features.
        solver: ``"sequential"``, or by its other name ``"svd"``, explains ``v_perp`` with ``svd(P^-1/2 N)``; between
            convolutions that is optimal for a bound, as the taps of a kernel overlap, and ``"als"`` goes on from there
            by alternating least squares on the exact second moments. ``"joint"`` regresses what the consumers
            read out of the new features as well and moves their weights along (exact when the consumers read the same
            features), ``"unprojected"`` explains ``v`` itself.
        init: ``"optimal"``; ``"random_features"`` (random fan-in, fitted fan-out); ``"random"`` (random fan-in and a
            random fan-out of the norm of the fitted one); ``"gradmax"`` (zero fan-in, the fan-out with the largest
            gradient); ``"copy"`` (Net2Net: neurons are split in two); ``"zero"`` (random fan-in, zero fan-out). The
            last three do not change the function.
        paired: adds (alpha, omega) and (-alpha, -omega), 2k neurons.
        axes: names of the axes to consider; by default all that can grow and that a layer reads. The width of queries
            and keys, which no layer reads, grows with ``init="zero"``: random queries, zero keys.
        ridge: relative to each feature's second moment; None chooses it by cross-validation.
        folds: folds of the cross-validation; 1 for none, and then no ridge unless given.
        seed: of random draws.

    Raises (from ``candidates``):
        GrowthError: an axis that was asked for cannot grow, or nothing can.

    Source: Verbockhaven and Charpiat, "Neural Architecture Growth using Tangent Space"; GradMax: Evci et al. 2022;
    Net2Net: Chen et al. 2016.
    """

    k: int | None = None
    solver: Solver = "sequential"
    init: Init = "optimal"
    paired: bool = False
    axes: tuple[str, ...] | None = None
    ridge: float | None = None
    folds: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, options in (("solver", get_args(Solver)), ("init", get_args(Init))):
            if getattr(self, name) not in options:
                raise GrowthError(
                    f"AddNeurons({name}={getattr(self, name)!r}) is not one of {', '.join(map(repr, options))}."
                )
        check_whole("AddNeurons", 1, none="as many as are worth it", k=self.k)
        check_whole("AddNeurons", 0, SEEDS, seed=self.seed)
        self.check_regularisation(self.ridge)
        if self.k is None and (self.folds == 1 or self.init not in ("optimal", "random_features")):
            raise GrowthError(
                "AddNeurons(k=None) needs folds of at least 2 and a fitted init: "
                "it is the held-out gain that decides. Give k=."
            )
        check_names(self, "axes")

    @property
    def least_neurons(self) -> int:
        return (self.k or 1) * (2 if self.paired and self.init not in PRESERVING else 1)

    def candidates(self, dag: Dag) -> Sequence[Candidate]:
        axes = self._axes(dag)
        if self.init in PRESERVING:
            assert self.k is not None
            add, k = PRESERVING[self.init], self.k
            units = [NewUnits(self, dag, axis, k, self.seed) for axis in axes]
            return [Candidate(new.axis.name, partial(add, new), tests=0) for new in units]
        options = [place for axis in axes for place in places(dag, axis)]
        if self.init == "optimal":
            options = [place.split_channels() for place in options]
        tests = 1 if self.k is None else 0  # chance is asked about only if the number of neurons is open
        shared = by_axis(project=self.solver != "unprojected")
        return [Candidate(place.axis.name, partial(self._add, place, shared), tests) for place in options]

    def _add(self, place: Place, shared: ByAxis, objective: Objective) -> Steps:
        """Directions, by linear theory or at random, and the fan-out that is fitted to what they compute."""
        settings = NeuronSettings(
            self,
            place,
            neuron_ridges(self.ridge, self.folds),
            self.k,
            joint=self.solver == "joint",
            project=self.solver != "unprojected",
            alternating=self.solver == "als",
            fan="random" if self.init == "random" else "fitted",
            paired=self.paired,
            seed=self.seed,
            by_axis=shared,
        )
        by_theory = self.init == "optimal"
        proposal = yield from propose_directions(settings) if by_theory else propose_along(place, self._drawn)
        return (yield from fit_fan_out(settings, proposal, objective))

    def _drawn(self, m: Moments, place: Place) -> Proposal:
        return drawn(place, self.k or OPEN, self.seed)

    def _axes(self, dag: Dag) -> list[Axis]:
        if self.axes is None:
            growable = [axis for axis in dag.axes if axis.growable]
            axes = [axis for axis in growable if not self._obstacle(axis)]
            if not axes:
                causes = [f" with init={self.init!r}", *filter(None, map(self._obstacle, growable))]
                raise NoPlaceError(f"no axis can grow{': '.join(causes) if growable else ''}:\n{dag}")
            return axes
        axes = [dag.axis(name) for name in self.axes]
        frozen = [f"{axis.name} ({axis.reason})" for axis in axes if not axis.growable]
        if frozen:
            raise GrowthError(f"cannot grow {', '.join(frozen)}; leave it out of axes=.")
        obstacles = [why for axis in axes if (why := self._obstacle(axis))]
        if obstacles:
            raise GrowthError(f"AddNeurons(init={self.init!r}): {'; '.join(obstacles)}, or leave it out of axes=.")
        return axes

    def _obstacle(self, axis: Axis) -> str | None:
        """Why this init does not fit the axis, and which do; or None. Random directions stand in for the optimal."""
        why = None if self.init == "optimal" and "random" in axis.inits else axis.other_inits.get(self.init)
        return why and f"{axis.name}: {why}. Give init={' or '.join(map(repr, axis.inits))}"
