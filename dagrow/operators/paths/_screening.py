"""Choosing among many places for a path: sketches rank them all, and only the best are solved exactly.

Of every activation a few random combinations ``z = sigma(Omega^T p)`` stand for all of its features. What they explain
of a pre-activation's goal costs products with few columns only, and one pass over the batches for all pairs.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from dagrow.operators._base import Candidate, Needs, Steps
from dagrow.operators.paths._links import PathSite
from dagrow.solvers import FoldSplit, Moments, Regression, fan_out, validate_fan_out, with_cross_validated_ridge
from dagrow.statistics import Feature, Hidden, Objective, Ones, Squares

EXACT = 10  #: places that are solved exactly
COLUMNS = 32  #: combinations of the features of each activation; those with fewer features are not combined
RIDGE = 0.1  #: of what is explained


def screened(
    sites: Sequence[PathSite],
    fit: Callable[[PathSite, Objective], Steps],
    activation: nn.Module | None,
    exact: int,
) -> Sequence[Candidate]:
    """Candidates for the best places only, once all were looked at; for all places if they are few.

    Args:
        sites: the places.
        fit: the steps of one place.
        activation: of new hidden units, None for a path without.
        exact: how many places are few.

    Returns:
        A candidate for each place, or one that stands for all of them.
    """
    candidates = [Candidate(site.place, partial(fit, site)) for site in sites]
    if len(sites) <= exact:
        return candidates
    where = f"the best of {len(sites)} places"
    return [Candidate(where, lambda _: screen_sites(sites, candidates, activation, exact), tests=len(sites))]


def screen_sites(
    sites: Sequence[PathSite], candidates: Sequence[Candidate], activation: nn.Module | None, exact: int
) -> Steps:
    """The candidates of the places where sketches of the features explain most."""
    features = [site.features(site.bias if activation is None else True) for site in sites]
    squares = {p: (Squares(p), Ones(p)) for p in features}
    moments = yield Needs(list(squares.values()))
    sketches = {p: _sketch(p, moments[pair][:, 0], activation) for p, pair in squares.items()}
    blocks = [site.regression(sketches[p]) for site, p in zip(sites, features, strict=True)]
    moments = yield Needs([pair for block in blocks for pair in block.pairs()])
    explained = _explained(moments, blocks)
    best = sorted(range(len(sites)), key=explained.__getitem__, reverse=True)
    return [candidates[i] for i in best[:exact]]


def _sketch(features: Feature, squares: Tensor, activation: nn.Module | None) -> Feature:
    """Random combinations of features, brought to equal size by the mean square of each."""
    scale = torch.where(squares > 0, squares, 1).rsqrt() * (squares > 0)
    if activation is None and len(squares) <= COLUMNS:
        return Hidden(features, scale.diag(), nn.Identity())
    generator = torch.Generator().manual_seed(len(squares))
    mixed = torch.randn(len(squares), COLUMNS, generator=generator, dtype=torch.float64).to(squares)
    return Hidden(features, scale[:, None] * mixed / len(squares) ** 0.5, activation or nn.Identity())


def _explained(m: Moments, blocks: Sequence[Regression]) -> list[float]:
    """What each sketch explains."""
    split, ridges, explained = m.split(), dict[Hashable, float](), []
    for block in blocks:
        if block.goal not in ridges:  # of what is read already, once for each pre-activation
            ridges[block.goal] = with_cross_validated_ridge(split, block).ridge
        explained.append(_explained_by(m, split, replace(block, ridge=ridges[block.goal])))
    return explained


def _explained_by(m: Moments, split: FoldSplit, block: Regression) -> float:
    """What a sketch explains, of samples that it was not fitted on if there are folds."""
    if m.folds == 1:
        return fan_out(m, block, None, RIDGE).drop
    return validate_fan_out(split, block, None, (RIDGE,)).gain
