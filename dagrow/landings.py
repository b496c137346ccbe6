"""Where old and new entries lie along a dimension that grows."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dagrow.classes import NEUTRAL
from dagrow.relayout import carrying

__all__ = ["Landing", "MisfitError", "insert", "insert_along"]


class MisfitError(Exception):
    """An axis cannot widen; the message is the reason."""


@dataclass(frozen=True, eq=False)
class Landing:
    """Along one dimension of a tensor: where old entries go and where new ones are.

    Attributes:
        size: the grown size of the dimension.
        old: positions of the old entries, in their old order ``[size before]``.
        new: positions of the new units' entries ``[k, slots]``.
    """

    dim: int
    size: int
    old: Tensor
    new: Tensor


def insert(units: Tensor, width: int, k: int, dim: int, name: str) -> Landing:
    """Puts k new units behind each block of old ones, where a block is 0..U-1, each repeated ``inner`` times."""
    places = units.numpy()
    positions = np.flatnonzero(places != NEUTRAL)
    sequence = places[positions]
    others = np.flatnonzero(sequence != sequence[0])
    inner = int(others[0]) if len(others) else len(sequence)
    block = width * inner
    outer = len(sequence) // block
    if not np.array_equal(sequence, np.tile(np.repeat(np.arange(width), inner), outer)):
        raise MisfitError(f"the channels of the axis lie in {name} in an order that is not a repeated block")
    ends = positions[block - 1 :: block]  # behind these, k * inner new entries
    position = np.arange(len(places))
    old = position + np.searchsorted(ends, position) * (k * inner)
    starts = old[ends] + 1
    new = starts[:, None, None] + np.arange(k * inner).reshape(1, k, inner)
    new = new.transpose(1, 0, 2).reshape(k, outer * inner)
    return Landing(dim, len(places) + outer * k * inner, torch.from_numpy(old), torch.from_numpy(new))


def insert_along(units: Tensor, width: int, k: int, name: str) -> Landing:
    """The same for a tensor that carries the axis along one of its dimensions."""
    members = units != NEUTRAL
    dims = carrying(units, members)
    if width == 1:
        dims = [units.ndim - 1]
    if len(dims) != 1:
        raise MisfitError(f"the axis lies across several dimensions of {name}")
    dim = dims[0]
    flat = units.movedim(dim, 0).reshape(units.shape[dim], -1)
    flat = flat[:, (flat != NEUTRAL).any(0)]  # positions that no activation reached carry nothing
    if not bool((flat == flat[:, :1]).all()):
        raise MisfitError(f"the axis does not lie along one dimension of {name}")
    return insert(flat[:, 0], width, k, dim, name)
