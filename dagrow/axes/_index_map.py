"""Where old and new entries lie along a dimension that grows or shrinks.

In come the units of its entries, out goes a map.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dagrow.axes._label_tensors import NO_CHANNEL, distinguishing_dims

DROPPED = -1  #: where an old entry goes that does not stay


class CannotWidenError(Exception):
    """An axis cannot widen; the message is the reason."""


@dataclass(frozen=True, eq=False)
class IndexMap:
    """Along one dimension of a tensor: where old entries go and where new ones are.

    Attributes:
        dim: the dimension.
        size: the size of the dimension afterwards.
        old: where the old entries go, in their old order ``[size before]``; DROPPED for those that do not stay.
        new: positions of the new units' entries ``[k, slots]``.
    """

    dim: int
    size: int
    old: Tensor
    new: Tensor

    @property
    def kept(self) -> Tensor:
        """The positions before of the entries that stay."""
        return torch.nonzero(self.old != DROPPED).flatten()

    @property
    def landed(self) -> Tensor:
        """Where these go."""
        return self.old[self.kept]


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


def drop_units(units: Tensor, gone: Tensor, dim: int) -> IndexMap:
    """Takes the entries of some units away; all others move together in their order.

    Args:
        units: the unit of each entry along the dimension ``[size before]``, or NO_CHANNEL.
        gone: the units that go.
        dim: the dimension.

    Returns:
        The map, without new entries.
    """
    stays = ~torch.isin(units, gone)
    old = torch.where(stays, stays.cumsum(0) - 1, DROPPED)
    slots = int((units == gone[0]).sum())
    return IndexMap(dim, int(stays.sum()), old, torch.empty(0, slots, dtype=torch.long))


def insert_along(units: Tensor, width: int, k: int, name: str) -> IndexMap:
    """The same for a tensor that carries the axis along one of its dimensions."""
    dims = [units.ndim - 1] if width == 1 else distinguishing_dims(units, units != NO_CHANNEL)
    if len(dims) != 1:
        raise CannotWidenError(f"the axis lies across several dimensions of {name}")
    dim = dims[0]
    by_position = units.movedim(dim, 0).reshape(units.shape[dim], -1)
    by_position = by_position[:, (by_position != NO_CHANNEL).any(0)]  # those that no activation reached carry nothing
    if not bool((by_position == by_position[:, :1]).all()):
        raise CannotWidenError(f"the axis does not lie along one dimension of {name}")
    return insert_units(by_position[:, 0], width, k, dim, name)


def arrived_units(grown: Tensor, before: Tensor, units: Tensor, k: int, dim: int, name: str) -> IndexMap:
    """Where new units arrived among the channels that a layer reads or carries.

    Args:
        grown: representatives of the channels' labels in the wider network.
        before: the same before it became wider.
        units: the new unit of each of ``grown``; NO_CHANNEL for old channels.
        k: how many new units there are.
        dim: the layer's dimension of these channels.
        name: the layer.

    Returns:
        The map.

    Raises:
        CannotWidenError: old channels changed their order, or new ones did not arrive as the old ones did.
    """
    old = torch.nonzero(units == NO_CHANNEL).flatten()
    new = [torch.nonzero(units == unit).flatten() for unit in range(k)]
    if not torch.equal(grown[old], before):
        raise CannotWidenError(f"the channels that {name} reads would change their order")
    if len(set(map(len, new))) != 1 or not len(new[0]):
        raise CannotWidenError(f"new channels do not arrive at {name} as the old ones do")
    return IndexMap(dim, len(grown), old, torch.stack(new))
