"""Fan-in directions of new neurons: random ones, or those of an operator of one's own."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dagrow.operators._base import Needs
from dagrow.operators.neurons._places import Place
from dagrow.solvers import Moments, Pair
from dagrow.statistics import SampleScores

OPEN = 16  #: random directions offered when their number is open


@dataclass(frozen=True, eq=False)
class Proposal:
    """Directions that new neurons look in.

    Attributes:
        alpha: ``[p, k]``.
        values: singular values, if linear theory chose the directions.
        notes: fallbacks that were needed.
        invariant: whether permuted units or other units of measurement lead to the same directions.
        other: as many directions, that are taken where they explain more ``[p, k]``.
        explained: what directions that were fitted on the other folds explain of each sample; without it, directions
            count as independent of the goals.
        known: moments of what consumers read and want, if they were measured already.
        ridges: consumer -> the ridge of the regression on what it reads, if it was chosen already.
    """

    alpha: Tensor
    values: Tensor | None = None
    notes: tuple[str, ...] = ()
    invariant: bool = True
    other: Tensor | None = None
    explained: SampleScores | None = None
    known: Moments | None = None
    ridges: Mapping[str, float] = field(default_factory=dict)


#: how directions are found, with passes over the batches of its own
ProposalSteps = Generator[Needs, Moments, Proposal | None]


def propose_along(
    place: Place, propose: Callable[[Moments, Place], Proposal | None], pairs: Sequence[Pair] = ()
) -> ProposalSteps:
    """Directions that one pass is enough for.

    Args:
        place: where the new channels are written.
        propose: from moments the directions, or None if there are none.
        pairs: the moments that it reads.

    Yields:
        These moments, and those that directions are scaled by.

    Returns:
        The directions, scaled.
    """
    moments = yield Needs([*place.scales, *pairs])
    return scaled(propose(moments, place), place, moments)


def scaled(proposal: Proposal | None, place: Place, m: Moments) -> Proposal | None:
    """With pre-activations of mean square 1 per position, other directions beside the first; None if there are none."""
    if proposal is None or not proposal.alpha.shape[1]:
        return None
    both = [proposal.alpha] if proposal.other is None else [proposal.alpha, proposal.other]
    return replace(proposal, alpha=place.scaled(torch.cat(both, 1), m))


def drawn(place: Place, k: int, seed: int) -> Proposal:
    """Random fan-in, another one each time that the axis has another width.

    Args:
        place: where the new channels are written.
        k: how many units.
        seed: of the draw.

    Returns:
        The directions, not scaled yet.
    """
    return Proposal(normal(place, place.width * place.channels, k, seed), invariant=False)


def normal(place: Place, rows: int, k: int, seed: int) -> Tensor:
    """Random numbers ``[rows, k]`` for a place."""
    generator = torch.Generator().manual_seed(seed + 7919 * place.axis.width)
    return torch.randn(rows, k, generator=generator, dtype=torch.float64)
