"""Where what a producer writes arrives at a consumer: the same kind of run as on labels, with positions for labels."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, fx
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map

from dagrow.axes import NO_CHANNEL, LabelInterpreter
from dagrow.graph import Axis, Dag, Edge
from dagrow.layers import LayerSite, RiderRule, Tables, reduced_dims

MIXED = -2  #: more than one position of the producer, or an unknown function of them


@dataclass(frozen=True, eq=False)
class PositionMap:
    """How the channels of one unit, written by a producer, arrive where a consumer reads them.

    Attributes:
        cells: what there is to read, each the mean of entries of the producer: its position times its channels per
            unit, plus the channel; or NEUTRAL ``[cells, terms]``.
        index: for each position of the consumer and each slot (a channel of the unit there, and a tap of its kernel):
            the cell that is read, or NEUTRAL ``[positions', slots]``.
        positions: positions S of the producer.
        channels: the unit's channels R at the producer.
        grids: producer and consumer -> the sizes of their outputs but for samples and channels, in the example.
        image: the sizes of the producer's output, if cells are all its positions in their order and the slots are
            the taps of the consumer's kernel on it; else None.
    """

    cells: Tensor = field(repr=False)
    index: Tensor = field(repr=False)
    positions: int
    channels: int
    grids: Mapping[str, tuple[int, ...]]
    image: tuple[int, ...] | None = None

    @cached_property
    def whole(self) -> bool:
        """Whether the cells are the producer's positions."""
        return self.channels == 1 and torch.equal(self.cells, torch.arange(self.positions)[:, None])

    @cached_property
    def aligned(self) -> bool:
        """Whether each row of the consumer reads the same row of the producer, once."""
        return self.whole and torch.equal(self.index, torch.arange(self.positions)[:, None])

    @cached_property
    def weights(self) -> Tensor:
        """The part of the slots that read a cell, at all positions together ``[cells]``."""
        times = torch.bincount(self.index[self.index >= 0], minlength=len(self.cells))
        return times.double() / self.index.shape[1]

    @cached_property
    def matrix(self) -> Tensor:
        """Cells and channels as means of positions ``[cells channels, positions]``, sparse."""
        cell, entry = self.means.indices()
        at = torch.stack([cell * self.channels + entry % self.channels, entry // self.channels])
        size = len(self.cells) * self.channels, self.positions
        return torch.sparse_coo_tensor(at, self.means.values(), size, check_invariants=False).coalesce()

    @cached_property
    def means(self) -> Tensor:
        """Cells as means of entries of the producer ``[cells, positions channels]``, sparse."""
        cell, term = torch.nonzero(self.cells >= 0, as_tuple=True)
        share = 1 / (self.cells >= 0).sum(1)[cell].double()
        at = torch.stack([cell, self.cells[cell, term]])
        size = len(self.cells), self.positions * self.channels
        return torch.sparse_coo_tensor(at, share, size, check_invariants=False).coalesce()

    def mean_of(self, written: Tensor) -> Tensor:
        """What the cells hold of a unit's channels ``[n, positions, channels k]``: ``[n, cells, k]``."""
        if self.whole:
            return written
        entries = rearrange(written, "n s (r k) -> (s r) (n k)", r=self.channels)
        return rearrange(self.means.to(entries) @ entries, "c (n k) -> n c k", n=len(written))


def position_map(dag: Dag, axis: Axis, producer: Edge, consumer: Edge) -> PositionMap | None:
    """Where a unit of the axis arrives. None if it does not, or not as means of what the producer writes."""
    runner = _PositionTracker(dag, axis, producer)
    inputs = runner.run_reached(consumer)
    if inputs is None:
        return None
    dim = consumer.rule.channel_dim(inputs.ndim)
    inputs = inputs.index_select(dim, axis.layout.columns[consumer.name][0])
    entries = (inputs + 1).double()  # a margin of zeros is NO_CHANNEL
    index = consumer.rule.features(consumer.module, entries).long() - 1
    n, channels = runner.samples, axis.layout.rows[producer.name].shape[1]
    if bool((index == MIXED).any()) or bool((index == NO_CHANNEL).all()) or len(index) % n:
        return None
    positions = runner.rows // n
    index = index.view(n, -1, index.shape[1])
    found = [runner.resolved(part, shift * positions * channels) for shift, part in enumerate(index)]
    if not all(torch.equal(other, found[0]) for other in found[1:]):
        return None
    ids = torch.unique(index[0])
    ids = ids[ids != NO_CHANNEL]
    where = torch.full((int(ids.max()) + 2,), NO_CHANNEL)  # the last is for NO_CHANNEL
    where[ids] = torch.arange(len(ids))
    grids = {producer.name: tuple(runner.sizes), consumer.name: _grid(dag, consumer)}
    local = PositionMap(runner.resolved(ids, 0), where[index[0]], positions, channels, grids)
    return replace(local, image=_image(local, producer, consumer))


def per_channel(found: PositionMap, producer: Edge, consumer: Edge) -> PositionMap | None:
    """How the first channel of a unit arrives, if all do so alike, each in slots of its own; else None."""
    channels = torch.where(found.cells >= 0, found.cells % found.channels, NO_CHANNEL)
    owner = torch.cat([channels.amax(1), torch.tensor([NO_CHANNEL])])  # of each cell; the last is for NO_CHANNEL
    slot = owner[found.index].amax(0)
    mixed = (channels != owner[:-1, None]) & (channels >= 0)
    if bool(mixed.any()) or bool(((owner[found.index] != slot) & (found.index >= 0)).any()):
        return None
    cells = torch.where(found.cells >= 0, found.cells // found.channels, NO_CHANNEL)
    entries = torch.cat([cells, torch.full((1, cells.shape[1]), NO_CHANNEL)])[found.index]
    first, *others = [entries[:, slot == channel] for channel in range(found.channels)]
    if not all(torch.equal(first, other) for other in others):
        return None
    own = torch.nonzero(owner == 0).flatten()
    where = torch.full((len(owner),), NO_CHANNEL)
    where[own] = torch.arange(len(own))
    one = replace(found, cells=cells[own], index=where[found.index[:, slot == 0]], channels=1)
    return replace(one, image=_image(one, producer, consumer))


def _grid(dag: Dag, edge: Edge) -> tuple[int, ...]:
    """The sizes of an edge's output in the example but for samples and channels."""
    shape = next(node.meta["val"].shape for node, layer in dag.layers.items() if layer.name == edge.name)
    return tuple(size for dim, size in enumerate(shape) if dim not in (0, edge.rule.channel_dim(len(shape))))


def _image(found: PositionMap, producer: Edge, consumer: Edge) -> tuple[int, ...] | None:
    """See :class:`PositionMap`."""
    geometry, sizes = consumer.rule.geometry(consumer.module), found.grids[producer.name]
    if geometry is None or not found.whole or len(sizes) != geometry.space or prod(sizes) != found.positions:
        return None
    if prod(geometry.sizes(sizes)) != len(found.index):
        return None
    entries = torch.arange(1.0, found.positions + 1, dtype=torch.float64).view(1, 1, *sizes)
    return sizes if torch.equal(geometry.patches(entries)[0].long() - 1, found.index) else None


class _PositionTracker(LabelInterpreter):
    """Only one unit of one axis counts; everything else is neutral. Means of entries get numbers of their own."""

    def __init__(self, dag: Dag, axis: Axis, producer: Edge) -> None:
        super().__init__(dag.model, dag.layers)
        self.dag, self.axis, self.producer = dag, axis, producer
        self.inputs: dict[str, Tensor] = {}
        self.samples, self.rows, self.sizes = 1, 0, torch.Size()
        self.means: list[tuple[int, Tensor]] = []  #: the first number of some means, and the entries of each
        self.next = 0

    def run_reached(self, consumer: Edge) -> Tensor | None:
        values = {node: tree_map(_neutral, value) for node, value in self.dag.labels.values.items()}
        self.samples = next(
            leaf.shape[0]
            for node in self.dag.graph.nodes
            if node.op == "placeholder"
            for leaf in tree_leaves(values[node])
            if isinstance(leaf, Tensor) and leaf.ndim
        )
        reached: set[fx.Node] = set()
        for node in self.dag.graph.nodes:
            layer = self.layers.get(node)
            start = layer is not None and layer.name == self.producer.name
            if start or any(source in reached for source in node.all_input_nodes):
                values[node] = self.evaluate(node, values)
                through = start or layer is None or layer.name not in self.dag.labels.rows
                if through and _carries(values[node]):  # not so sizes
                    reached.add(node)
        return self.inputs.get(consumer.name)

    def resolved(self, numbers: Tensor, shift: int) -> Tensor:
        """Entries of the producer that each number is the mean of, NO_CHANNEL behind them ``[..., terms]``."""
        found = [((numbers >= start) & (numbers < start + len(of)), start, of) for start, of in self.means]
        parts = [part for part in found if bool(part[0].any())]
        entries = torch.full((*numbers.shape, max([of.shape[1] for *_, of in parts], default=1)), NO_CHANNEL)
        entries[..., 0] = numbers
        for inside, start, of in parts:
            of = of[numbers[inside] - start]
            entries[inside] = functional.pad(of, (0, entries.shape[-1] - of.shape[1]), value=NO_CHANNEL)
        return torch.where(entries >= 0, entries - shift, entries)

    def mean(self, windows: Tensor) -> Tensor:
        """New numbers for means over the last dimension."""
        if windows.shape[-1] == 1:
            return windows[..., 0]
        numbers = torch.full(windows.shape[:-1], NO_CHANNEL)
        mixed, some = (windows == MIXED).any(-1), (windows >= 0).any(-1)
        entries = self.resolved(windows[some], 0).flatten(1).sort(1, descending=True).values
        entries = entries[:, (entries >= 0).any(0)]
        numbers[some] = self.next + torch.arange(len(entries))
        self.means.append((self.next, entries))
        self.next += len(entries)
        return torch.where(mixed, MIXED, numbers)

    def reduce(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        inputs, dims = args[0], reduced_dims(node, args, kwargs)
        if not isinstance(node.meta["val"], Tensor):
            return self.unknown(node, inputs, "")
        kept = [d for d in range(inputs.ndim) if d not in dims]
        found = self.mean(inputs.permute(*kept, *dims).flatten(len(kept)))
        return found.view(node.meta["val"].shape)

    def spatial(self, node: fx.Node, tables: Tables, inputs: Tensor) -> Any:
        return self.windowed(inputs, tables(inputs.shape))

    def halves(self, node: fx.Node, inputs: Tensor, dim: int = -1) -> Any:
        return self.unknown(node, inputs, "")

    def mixed(self, node: fx.Node, name: str, dims: Sequence[int], inputs: Tensor) -> Any:
        return self.unknown(node, inputs, "") if any(self.varies(inputs, dim) for dim in dims) else inputs

    def windowed(self, inputs: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """Means over the entries that tables name, along the last dimensions."""
        first = inputs.ndim - len(tables)
        if first < 2:  # channels are moved too
            return self.mean(self._windows(inputs, tables))
        held = torch.nonzero((inputs != NO_CHANNEL).movedim(1, 0).flatten(1).any(1)).flatten()  # few channels count
        found = torch.full((*inputs.shape[:first], *map(len, tables)), NO_CHANNEL)
        return found.index_copy_(1, held, self.mean(self._windows(inputs.index_select(1, held), tables)))

    @staticmethod
    def _windows(windows: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """Entries that tables name, side by side in the last dimension."""
        space, first = windows.ndim, windows.ndim - len(tables)
        for at, table in enumerate(tables):
            none = (table < 0).view(*[1] * (first + at), *table.shape, *[1] * (windows.ndim - first - at - 1))
            windows = windows.index_select(first + at, table.clamp_min(0).flatten()).unflatten(first + at, table.shape)
            windows = windows.masked_fill(none, NO_CHANNEL).movedim(first + at + 1, -1)
        return windows.flatten(space)

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        merged, *others = torch.broadcast_tensors(*tensors)
        for other in others:
            clash = (merged != NO_CHANNEL) & (other != NO_CHANNEL) & (merged != other)
            merged = torch.where(clash, MIXED, torch.where(merged == NO_CHANNEL, other, merged))
        return merged

    def contract(self, node: fx.Node, left: Tensor, right: Tensor, summed: int) -> Tensor:
        """Linear theory does not reach through products of activations."""
        shape = torch.broadcast_shapes(left.shape, right.shape)
        return torch.full((), MIXED if _carries((left, right)) else NO_CHANNEL).expand(shape[: len(shape) - summed])

    def freeze(self, tensors: Iterable[Tensor], cause: str) -> None:
        """Nothing to mark: what is opaque to positions is MIXED."""

    def unknown(self, node: fx.Node, touched: object, cause: str) -> Any:
        carries = _carries(touched)
        return tree_map(
            lambda v: _neutral(v).where(torch.tensor(not carries), MIXED) if isinstance(v, Tensor) else v,
            node.meta["val"],
        )

    def opaque(self, node: fx.Node, cause: str) -> Any:
        return tree_map(_neutral, node.meta["val"])

    def source(self, node: fx.Node) -> Any:
        return self.opaque(node, "")

    def edge(self, node: fx.Node, layer: LayerSite, inputs: Tensor) -> Any:
        self.inputs[layer.name] = inputs
        output, rule = _neutral(node.meta["val"]).clone(), layer.rule
        if layer.name == self.producer.name:
            channels = self.axis.layout.rows[self.producer.name][0]
            flat = output.movedim(rule.channel_dim(output.ndim), -1)
            self.rows, self.sizes = flat[..., 0].numel(), flat.shape[1:-1]
            self.next = self.rows * len(channels)
            count = torch.arange(self.rows).view(flat.shape[:-1])
            flat[..., channels] = count[..., None] * len(channels) + torch.arange(len(channels))
        return output

    def rider(self, node: fx.Node, layer: LayerSite, inputs: Tensor) -> Any:
        """A new channel passes as the rule says."""
        module, rule = layer.module, layer.rule
        assert isinstance(rule, RiderRule)
        dim = rule.channel_dim(inputs.ndim)
        read, written = rule.group(module)
        if (read, written) != (1, 1):
            passed = inputs.unflatten(dim, (-1, read)).narrow(dim + 1, 0, min(read, written))
            passed = torch.cat([passed, *[_neutral(passed.narrow(dim + 1, 0, 1))] * (written - read)], dim + 1)
            inputs = passed.flatten(dim, dim + 1)
        tables = rule.source(module, inputs.shape[dim + 1 :])
        return inputs if tables is None else self.windowed(inputs, tables)


def _neutral(value: Any) -> Any:
    return torch.full((), NO_CHANNEL).expand(value.shape) if isinstance(value, Tensor) else value


def _carries(touched: object) -> bool:
    """Whether some entry is not neutral."""
    return any(isinstance(leaf, Tensor) and bool((leaf != NO_CHANNEL).any()) for leaf in tree_leaves(touched))
