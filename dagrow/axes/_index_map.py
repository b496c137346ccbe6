"""Where old and new entries lie along a dimension that grows."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dagrow.axes._size_rewriting import carrying
from dagrow.axes._union_find import NO_CHANNEL


class CannotWidenError(Exception):
    """An axis cannot widen; the message is the reason."""


@dataclass(frozen=True, eq=False)
class IndexMap:
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


def insert_units(units: Tensor, width: int, k: int, dim: int, name: str) -> IndexMap:
    """Puts k new units behind each block of old ones, where a block is 0..U-1, each repeated ``inner`` times."""
    places = units.numpy()
    positions = np.flatnonzero(places != NO_CHANNEL)
    sequence = places[positions]
    others = np.flatnonzero(sequence != sequence[0])
    inner = int(others[0]) if len(others) else len(sequence)
    block = width * inner
    outer = len(sequence) // block
    if not np.array_equal(sequence, np.tile(np.repeat(np.arange(width), inner), outer)):
        raise CannotWidenError(f"the channels of the axis lie in {name} in an order that is not a repeated block")
    ends = positions[block - 1 :: block]  # behind these, k * inner new entries
    position = np.arange(len(places))
    old = position + np.searchsorted(ends, position) * (k * inner)
    starts = old[ends] + 1
    new = starts[:, None, None] + np.arange(k * inner).reshape(1, k, inner)
    new = new.transpose(1, 0, 2).reshape(k, outer * inner)
    return IndexMap(dim, len(places) + outer * k * inner, torch.from_numpy(old), torch.from_numpy(new))


def insert_along(units: Tensor, width: int, k: int, name: str) -> IndexMap:
    """The same for a tensor that carries the axis along one of its dimensions."""
    members = units != NO_CHANNEL
    dims = carrying(units, members)
    if width == 1:
        dims = [units.ndim - 1]
    if len(dims) != 1:
        raise CannotWidenError(f"the axis lies across several dimensions of {name}")
    dim = dims[0]
    flat = units.movedim(dim, 0).reshape(units.shape[dim], -1)
    flat = flat[:, (flat != NO_CHANNEL).any(0)]  # positions that no activation reached carry nothing
    if not bool((flat == flat[:, :1]).all()):
        raise CannotWidenError(f"the axis does not lie along one dimension of {name}")
    return insert_units(flat[:, 0], width, k, dim, name)
