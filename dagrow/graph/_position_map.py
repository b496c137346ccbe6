"""Where what a producer writes arrives at a consumer."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from dagrow.axes import NO_CHANNEL, AxisLayout
from dagrow.graph._edges import Edge
from dagrow.graph._position_tracker import MIXED, PositionTracker, Traced


@dataclass(frozen=True, eq=False)
class PositionMap:
    """How the channels of one unit, written by a producer, arrive where a consumer reads them.

    Attributes:
        cells: what there is to read, each the mean of entries of the producer: its position times its channels per
            unit, plus the channel; or NO_CHANNEL ``[cells, terms]``.
        index: for each position of the consumer and each slot (a channel of the unit there, and a tap of its kernel):
            the cell that is read, or NO_CHANNEL ``[positions', slots]``.
        positions: positions S of the producer.
        channels: the unit's channels R at the producer.
        grids: producer and consumer -> the last sizes of their outputs before channels, in the example: those of an
            item.
        dims: producer and consumer -> the dimension of what they write along which samples must lie, or None where
            any will do. The positions are those of one item: of a sample of the example, or of a part of it.
        image: the sizes of the producer's output, if cells are all its positions in their order and the slots are
            the taps of the consumer's kernel on it; else None.
    """

    cells: Tensor = field(repr=False)
    index: Tensor = field(repr=False)
    positions: int
    channels: int
    grids: Mapping[str, tuple[int, ...]]
    dims: Mapping[str, int | None] = field(default_factory=dict)
    image: tuple[int, ...] | None = None

    @property
    def slots(self) -> int:
        """How often a position of the consumer can read the unit."""
        return self.index.shape[1]

    @cached_property
    def is_whole(self) -> bool:
        """Whether the cells are the producer's positions."""
        return self.channels == 1 and torch.equal(self.cells, torch.arange(self.positions)[:, None])

    @cached_property
    def is_identity(self) -> bool:
        """Whether each row of the consumer reads the same row of the producer, once."""
        return self.is_whole and torch.equal(self.index, torch.arange(self.positions)[:, None])

    @cached_property
    def weights(self) -> Tensor:
        """The part of the slots that read a cell, at all positions together ``[cells]``."""
        times = torch.bincount(self.index[self.index >= 0], minlength=len(self.cells))
        return times.double() / self.slots

    @cached_property
    def matrix(self) -> Tensor:
        """Cells and channels as means of positions ``[cells channels, positions]``, sparse."""
        cell, entry = self.means.indices()
        entries = torch.stack([cell * self.channels + entry % self.channels, entry // self.channels])
        return _sparse(entries, self.means.values(), len(self.cells) * self.channels, self.positions)

    @cached_property
    def means(self) -> Tensor:
        """Cells as means of entries of the producer ``[cells, positions channels]``, sparse."""
        cell, term = torch.nonzero(self.cells >= 0, as_tuple=True)
        shares = 1 / (self.cells >= 0).sum(1)[cell].double()
        entries = torch.stack([cell, self.cells[cell, term]])
        return _sparse(entries, shares, len(self.cells), self.positions * self.channels)

    def mean_of(self, written: Tensor) -> Tensor:
        """What the cells hold of a unit's channels.

        Args:
            written: by the producer ``[n, positions, channels k]``.

        Returns:
            Means of entries ``[n, cells, k]``.
        """
        if self.is_whole:
            return written
        entries = rearrange(written, "n s (r k) -> (s r) (n k)", r=self.channels)
        return rearrange(self.means.to(entries) @ entries, "c (n k) -> n c k", n=len(written))


def _sparse(entries: Tensor, values: Tensor, *size: int) -> Tensor:
    return torch.sparse_coo_tensor(entries, values, size, check_invariants=False).coalesce()


def position_maps(
    dag: Traced, layout: AxisLayout, producer: Edge, consumers: Sequence[Edge]
) -> tuple[dict[str, PositionMap | None], str | None]:
    """Where a unit of an axis arrives.

    Args:
        dag: the model's.
        layout: of the axis that gets a new unit.
        producer: the edge that writes it.
        consumers: the edges that read it.

    Returns:
        Consumer -> the map; None if the unit does not arrive, or not as means of what the producer writes. And what it
        meets on the way that is no mean, with the user's line, or None.
    """
    tracker = PositionTracker(dag, layout, producer.name)
    tracker.track()
    return {consumer.name: _read_off(tracker, layout, producer, consumer) for consumer in consumers}, tracker.mixing


def _read_off(tracker: PositionTracker, layout: AxisLayout, producer: Edge, consumer: Edge) -> PositionMap | None:
    """The map, from the numbers that arrive at the consumer."""
    inputs = tracker.inputs.get(consumer.name)
    if inputs is None:
        return None
    columns = layout.columns[consumer.name][0]
    inputs = inputs.index_select(consumer.rule.channel_dim(inputs.ndim), columns)
    shifted = (inputs + 1).double()  # a margin of zeros is NO_CHANNEL
    numbers = consumer.rule.features(consumer.module, shifted).long() - 1
    if bool((numbers == MIXED).any()) or bool((numbers == NO_CHANNEL).all()):
        return None
    find = partial(_of_items, tracker, producer, consumer, numbers)
    before = tracker.written[: producer.rule.channel_dim(len(tracker.written) + 1)]
    after = inputs.shape[: consumer.rule.channel_dim(inputs.ndim)]
    found = find(Items.leading_in(tracker.samples, before, after))
    if found is None or not found.is_identity:  # several items a sample, such as frames, or samples elsewhere
        counts = {prod(sizes[:count]) for sizes in (before, after) for count in range(1, len(sizes) + 1)}
        finer = sorted((n for n in counts if n > tracker.samples), reverse=True)
        found = next(filter(None, (find(Items.leading_in(n, before, after)) for n in finer)), found)
    if found is None:
        pairs = itertools.product(enumerate(before), enumerate(after))
        moved = (Items(n, (dim, other), None, after) for (dim, n), (other, size) in pairs if n == size > 1)
        found = next(filter(None, map(find, moved)), None)
    return None if found is None else _with_image(found, producer, consumer)


@dataclass(frozen=True)
class Items:
    """What may arrive alike, each on its own.

    Attributes:
        n: how many.
        dims: the dimensions, at the producer and at the consumer, along which they lie.
        leading: how many dimensions, from the first on, they fill instead at the producer and at the consumer.
        read: the sizes of what the consumer reads but for channels, where they do not.
    """

    n: int
    dims: tuple[int, int] = (0, 0)
    leading: tuple[int, int] | None = None
    read: Sequence[int] = ()

    @classmethod
    def leading_in(cls, n: int, before: Sequence[int], after: Sequence[int]) -> "Items":
        """Items that fill the first dimensions of what the producer writes and the consumer reads."""
        counts = [
            next((count for count in range(1, len(sizes)) if prod(sizes[:count]) % n == 0), len(sizes))
            for sizes in (before, after)
        ]
        return cls(n, leading=(counts[0], counts[1]))


def _of_items(
    tracker: PositionTracker, producer: Edge, consumer: Edge, numbers: Tensor, items: Items
) -> PositionMap | None:
    """The map of each item.

    Args:
        tracker: after its run.
        producer: the edge that writes.
        consumer: the edge that reads.
        numbers: what it reads ``[rows, slots]``.
        items: which.

    Returns:
        The map; None if they do not arrive alike, each where it lies itself.
    """
    n, dims = items.n, items.dims
    channels = tracker.layout.rows[producer.name].shape[1]
    if len(numbers) % n or tracker.rows % n:
        return None
    positions = tracker.rows // n
    rows = torch.arange(tracker.rows)
    if dims != (0, 0):
        rows[rows.view(tracker.written).movedim(dims[0], 0).flatten()] = torch.arange(tracker.rows)
        numbers = numbers.unflatten(0, (*items.read, -1)).movedim(dims[1], 0).flatten(0, len(items.read))

    def entries_of(numbers: Tensor) -> Tensor:
        entries = tracker.means.entries(numbers)
        return torch.where(entries >= 0, rows[entries // channels] * channels + entries % channels, entries)

    first, *others = numbers.view(n, -1, numbers.shape[1])
    expected = entries_of(first)
    for item, other in enumerate(others, start=1):
        entries = entries_of(other)
        if not torch.equal(torch.where(entries >= 0, entries - item * positions * channels, entries), expected):
            return None
    cells = torch.unique(first)
    cells = cells[cells != NO_CHANNEL]
    index = _renumbered(cells, int(cells.max()) + 1)[first]
    grids, places = {}, {}
    for edge, sizes, which in ((producer, tracker.written, 0), (consumer, _written(tracker.dag, consumer), 1)):
        dim, leading = dims[which], 1 if items.leading is None else items.leading[which]
        grids[edge.name] = (*sizes[:dim], *sizes[dim + 1 :])[leading - 1 :]
        places[edge.name] = dim if leading == 1 else None
    return PositionMap(entries_of(cells), index, positions, channels, grids, places)


def per_channel(unit_map: PositionMap, producer: Edge, consumer: Edge) -> PositionMap | None:
    """How the first channel of a unit arrives, if all do so alike, each in slots of its own.

    Args:
        unit_map: how all channels arrive.
        producer: the edge that writes them.
        consumer: the edge that reads them.

    Returns:
        The map of one channel; None if they arrive in different ways.
    """
    is_entry = unit_map.cells >= 0
    channels = torch.where(is_entry, unit_map.cells % unit_map.channels, NO_CHANNEL)
    owner = torch.cat([channels.amax(1), torch.tensor([NO_CHANNEL])])  # of each cell; the last is for NO_CHANNEL
    slot_owner = owner[unit_map.index].amax(0)
    shares_cells = bool(((channels != owner[:-1, None]) & is_entry).any())
    if shares_cells or bool(((owner[unit_map.index] != slot_owner) & (unit_map.index >= 0)).any()):
        return None
    cells = torch.where(is_entry, unit_map.cells // unit_map.channels, NO_CHANNEL)
    entries = functional.pad(cells, (0, 0, 0, 1), value=NO_CHANNEL)[unit_map.index]
    first, *others = [entries[:, slot_owner == channel] for channel in range(unit_map.channels)]
    if not all(torch.equal(first, other) for other in others):
        return None
    own = torch.nonzero(owner == 0).flatten()
    index = _renumbered(own, len(unit_map.cells))[unit_map.index[:, slot_owner == 0]]
    return _with_image(replace(unit_map, cells=cells[own], index=index, channels=1), producer, consumer)


def _renumbered(kept: Tensor, count: int) -> Tensor:
    """Old number -> new one, or NO_CHANNEL, which is also what the last entry, that of NO_CHANNEL, is."""
    numbers = torch.full((count + 1,), NO_CHANNEL)
    numbers[kept] = torch.arange(len(kept))
    return numbers


def _written(dag: Traced, edge: Edge) -> tuple[int, ...]:
    """The sizes of an edge's output in the example but for channels."""
    shape = next(node.meta["val"].shape for node, layer in dag.layers.items() if layer.name == edge.name)
    return tuple(size for dim, size in enumerate(shape) if dim != edge.rule.channel_dim(len(shape)))


def _with_image(bare: PositionMap, producer: Edge, consumer: Edge) -> PositionMap:
    """With ``image``, where the consumer is a convolution that slides over the producer's output as it is."""
    geometry, sizes = consumer.rule.geometry(consumer.module), bare.grids[producer.name]
    if geometry is None or not bare.is_whole or len(sizes) != geometry.space or prod(sizes) != bare.positions:
        return replace(bare, image=None)
    if prod(geometry.sizes(sizes)) != len(bare.index):
        return replace(bare, image=None)
    entries = torch.arange(1.0, bare.positions + 1, dtype=torch.float64).view(1, 1, *sizes)
    slides = torch.equal(geometry.patches(entries)[0].long() - 1, bare.index)
    return replace(bare, image=sizes if slides else None)
