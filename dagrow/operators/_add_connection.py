"""``AddConnection``: a new linear or convolutional layer from an activation to a pre-activation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from dagrow.errors import check_whole
from dagrow.graph import Dag
from dagrow.operators._base import Candidate, Operator, Steps, check_names
from dagrow.operators.paths import (
    EXACT,
    PathForm,
    PathSite,
    everything,
    filled,
    fit_path,
    path_sites,
    refuse_unwritable,
    screened,
)
from dagrow.solvers import MomentView, Regression, directions, neuron_ridges
from dagrow.statistics import Objective


@dataclass(frozen=True)
class AddConnection(Operator):
    """Joins an earlier activation to a later pre-activation by a new layer: ``X = N^T (P - C S^-1 C^T)^-1``.

    Linear layers join activations with as many positions; convolutions have the stride and the kernel that make one
    grid of the other; from an image to features of a whole sample leads the mean over positions. The gain is
    ``tr(X N)``. Pre-activations that read the activation already are left out, and all that would close a cycle.

    Args:
        rank: of the new weights, as two layers in a row without an activation; None for a single layer.
        kernel: of new convolutions, the least; larger where the grids fit no other way.
        targets: names of the edges whose pre-activations are considered; all by default.
        ridge: relative to each feature's second moment; None chooses it by cross-validation.
        folds: folds of the cross-validation; 1 for none, and then no ridge unless given.
        exact: places that are solved exactly. If there are more, random sketches of the features rank them first.

    Raises (from ``candidates``):
        GrowthError: no forward with a new connection can be written for the model, or a target that was asked for can
            take none.
    """

    rank: int | None = None
    kernel: int = 1
    targets: tuple[str, ...] | None = None
    ridge: float | None = None
    folds: int = 4
    exact: int = EXACT

    def __post_init__(self) -> None:
        check_whole("AddConnection", 1, none="a single layer", rank=self.rank)
        check_whole("AddConnection", 1, kernel=self.kernel, exact=self.exact)
        check_names(self, "targets")
        self.check_regularisation(self.ridge)

    @property
    def least_neurons(self) -> int:
        return self.rank or 0

    def candidates(self, dag: Dag) -> Sequence[Candidate]:
        refuse_unwritable(dag)
        return screened(path_sites(dag, self.kernel, self.targets), self._fit, None, self.exact)

    def _fit(self, site: PathSite, objective: Objective) -> Steps:
        basis, layers = (everything, _single) if self.rank is None else (self._leading, _pair)
        form = PathForm(self, basis, layers, neuron_ridges(self.ridge, self.folds), self.rank or 0)
        return fit_path(site, site.features(site.bias), form, objective)

    def _leading(self, m: MomentView, block: Regression, ridge: float) -> Tensor:
        """The directions of the best fit of a given rank."""
        assert self.rank is not None
        return directions(m, [block], self.rank, ridge).alpha


def _single(site: PathSite, basis: Tensor, weights: Tensor) -> Mapping[str, nn.Module]:
    return {"fan_out": filled(site.layer(site.outputs, site.bias), weights)}


def _pair(site: PathSite, basis: Tensor, weights: Tensor) -> Mapping[str, nn.Module]:
    first = filled(site.layer(basis.shape[1], site.bias), basis.T)
    return {"fan_in": first, "fan_out": filled(site.further(basis.shape[1]), weights)}
