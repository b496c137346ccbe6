"""``AddLayer``: a new hidden layer on a new path between two activations."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from dagrow.errors import SEEDS, GrowthError, check_whole
from dagrow.graph import Dag
from dagrow.layers import is_pointwise_module
from dagrow.operators._base import Candidate, Needs, Operator, Steps, check_names
from dagrow.operators.paths import (
    EXACT,
    PathForm,
    PathSite,
    filled,
    fit_path,
    path_sites,
    refuse_unwritable,
    residual_sites,
    screened,
)
from dagrow.solvers import FoldView, Moments, MomentView, Regression, directions, forward_selection, neuron_ridges
from dagrow.statistics import Hidden, Objective

OFFERED = 64  #: random directions that units are chosen from, at least
PER_UNIT = 4  #: and for each unit
ALL, DRAWN = -1, -2  #: whose directions are: found on all samples, or drawn at random; otherwise found without a fold
_RANDOM = (nn.RReLU, nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class AddLayer(Operator):
    """Lays a new path of k hidden units between two activations.

    It leads from an activation to a pre-activation, ``a <- a + X sigma(alpha^T x)``, or to the activation itself, a
    residual block ``x <- x + X sigma(alpha^T x)`` for all that read it. Fan-ins are chosen one after the other, each
    the one that explains most beside those before, among the directions of linear theory, with both signs, and random
    ones. What units compute is measured, and the fan-out is the regression of what the pre-activation still wants on
    it, exact for any activation.

    Args:
        k: hidden units.
        activation: a module of ``torch.nn`` that works entry by entry.
        kernel: of new convolutions, the least; larger where the grids fit no other way.
        targets: names of the edges whose pre-activations are considered; by default all, and residual blocks.
        ridge: relative to each feature's second moment; None chooses it by cross-validation.
        folds: folds of the cross-validation; 1 for none, and then no ridge unless given.
        exact: places that are solved exactly. If there are more, random sketches of the features rank them first.
        seed: of random directions.

    Raises (from ``candidates``):
        GrowthError: no forward with a new layer can be written for the model, or a target that was asked for can take
            none.
    """

    k: int
    activation: nn.Module = field(default_factory=nn.ReLU)
    kernel: int = 1
    targets: tuple[str, ...] | None = None
    ridge: float | None = None
    folds: int = 4
    exact: int = EXACT
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("AddLayer", 1, k=self.k, kernel=self.kernel, exact=self.exact)
        check_whole("AddLayer", 0, SEEDS, seed=self.seed)
        sigma = self.activation
        if not isinstance(sigma, nn.Module) or not is_pointwise_module(sigma) or any(True for _ in sigma.parameters()):
            raise GrowthError(
                f"AddLayer(activation={sigma!r}): give a module that computes each entry from itself alone and has no "
                "parameters, such as torch.nn.ReLU() or torch.nn.GELU()."
            )
        if isinstance(sigma, _RANDOM):
            raise GrowthError(f"AddLayer(activation={sigma!r}): it draws random numbers; give one that does not.")
        check_names(self, "targets")
        self.check_regularisation(self.ridge)

    @property
    def least_neurons(self) -> int:
        return self.k

    def candidates(self, dag: Dag) -> Sequence[Candidate]:
        refuse_unwritable(dag)
        sites = path_sites(dag, self.kernel, self.targets, known=True)
        sites += residual_sites(dag, self.kernel) if self.targets is None else []
        return screened(sites, self._fit, self.activation, self.exact)

    def _fit(self, site: PathSite, objective: Objective) -> Steps:
        """Units along directions that are offered, of which the fit takes the best."""
        features = site.features(True)
        block = site.regression(features)
        alpha, owners = self._offered(len(site.dag.edges), block, (yield Needs(block.pairs())))
        if not alpha.shape[1]:
            return None
        hidden = Hidden(features, alpha, deepcopy(self.activation))
        basis, layers = partial(self._chosen, owners), partial(_hidden_layers, alpha, hidden.activation)
        ridges = neuron_ridges(self.ridge, self.folds)
        form = PathForm(self, basis, layers, ridges, self.k, "hidden", invariant=False)
        return (yield from fit_path(site, hidden, form, objective))

    def _chosen(self, owners: Tensor, m: MomentView, block: Regression, ridge: float) -> Tensor:
        """Of directions that were found with the moments at hand, or drawn without any."""
        own = m.fold if isinstance(m, FoldView) else ALL
        offered = torch.nonzero((owners == own) | (owners == DRAWN)).flatten()
        return forward_selection(m, block, self.k, ridge, offered)

    def _offered(self, edges: int, block: Regression, m: Moments) -> tuple[Tensor, Tensor]:
        """Directions ``[p, q]`` with pre-activations of mean square 1, of linear theory and at random.

        Returns:
            The directions, and whose they are ``[q]``: found on all samples, on all but a fold, or drawn. What is
            fitted on the other folds must not choose directions that the fold itself helped to find, or it would
            explain noise.
        """
        p = m[block.features, block.features]
        count = max(OFFERED, PER_UNIT * self.k)
        generator = torch.Generator().manual_seed(self.seed + 7919 * edges)
        random = torch.randn(len(p), count, generator=generator, dtype=torch.float64).to(p)
        alive = p.diagonal() > 0
        random = random * torch.where(alive, p.diagonal(), 1).rsqrt()[:, None] * alive[:, None]
        parts, owners = [random], [DRAWN] * count
        for own, means in [(ALL, m), *((f, train) for f, (train, _) in enumerate(m.split()) if m.folds > 1)]:
            leading = directions(means, [block], self.k, 0.1).alpha.to(p)
            parts += [leading, -leading]
            owners += [own] * 2 * leading.shape[1]
        alpha = torch.cat(parts, 1)
        square = (alpha * (p @ alpha)).sum(0) / m.positions[block.features]
        return (alpha * square.clamp_min(1e-300).rsqrt())[:, square > 0], torch.tensor(owners)[(square > 0).cpu()]


def _hidden_layers(
    alpha: Tensor, activation: nn.Module, site: PathSite, basis: Tensor, weights: Tensor
) -> Mapping[str, nn.Module]:
    """The layers of a path with hidden units."""
    first = filled(site.layer(len(basis), True), alpha[:, basis].T)
    last = filled(site.further(len(basis)), weights)
    return {"fan_in": first, "activation": deepcopy(activation), "fan_out": last}
