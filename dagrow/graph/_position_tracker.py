"""Running a graph on positions instead of labels: which entries of a producer every other entry is a mean of."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map

from dagrow.axes import NO_CHANNEL, AxisLayout, LabelInterpreter, Labelling, located, name_of
from dagrow.layers import LayerSite, RiderRule, Tables, reduced_dims
from dagrow.tracing import Program


class Traced(Protocol):
    """What was read off a model: a dag, or a view of one."""

    @property
    def program(self) -> Program: ...
    @property
    def layers(self) -> Mapping[fx.Node, LayerSite]: ...
    @property
    def every_layer(self) -> Mapping[fx.Node, LayerSite]: ...
    @property
    def labels(self) -> Labelling: ...


MIXED = -2  #: the number of an unknown function of entries, or of several that meet


class EntryMeans:
    """Numbers for means of a producer's entries: those of single entries come first, means of several get new ones.

    Attributes:
        next: the first number that is not in use.
    """

    def __init__(self) -> None:
        self.next = 0
        self._entries: list[tuple[int, Tensor]] = []  #: the first of some numbers, and the entries of each

    def of(self, windows: Tensor) -> Tensor:
        """Numbers of the means over the last dimension."""
        if windows.shape[-1] == 1:
            return windows[..., 0]
        numbers = torch.full(windows.shape[:-1], NO_CHANNEL)
        is_mixed, has_entries = (windows == MIXED).any(-1), (windows >= 0).any(-1)
        entries = self.entries(windows[has_entries]).flatten(1).sort(1, descending=True).values
        entries = entries[:, (entries >= 0).any(0)]
        numbers[has_entries] = self.next + torch.arange(len(entries))
        self._entries.append((self.next, entries))
        self.next += len(entries)
        return torch.where(is_mixed, MIXED, numbers)

    def entries(self, numbers: Tensor) -> Tensor:
        """The entries that each number is the mean of, NO_CHANNEL behind them ``[..., terms]``."""
        ranges = [((numbers >= start) & (numbers < start + len(means)), start, means) for start, means in self._entries]
        ranges = [(inside, start, means) for inside, start, means in ranges if bool(inside.any())]
        terms = max([means.shape[1] for *_, means in ranges], default=1)
        entries = torch.full((*numbers.shape, terms), NO_CHANNEL)
        entries[..., 0] = numbers
        for inside, start, means in ranges:
            means = means[numbers[inside] - start]
            entries[inside] = functional.pad(means, (0, terms - means.shape[1]), value=NO_CHANNEL)
        return entries


class PositionTracker(LabelInterpreter):
    """Numbers the entries of one unit of one axis that a producer writes; everything else is neutral.

    Attributes:
        samples: in the example.
        rows: positions of the producer's output, for all samples together.
        written: the sizes of the producer's output but for channels.
        means: what numbers stand for.
        mixing: where entries are first computed with otherwise than by means, with the user's line; or None.
    """

    def __init__(self, dag: Traced, layout: AxisLayout, producer: str) -> None:
        super().__init__(dag.program.model, dag.layers)
        self.dag, self.layout, self.producer = dag, layout, producer
        self.mixing: str | None = None
        self.inputs: dict[str, Tensor] = {}
        self.samples, self.rows, self.written = 1, 0, torch.Size()
        self.means = EntryMeans()

    def track(self) -> None:
        """Runs all nodes that the producer reaches; ``inputs`` holds what layers among them read."""
        values = {node: tree_map(_neutral, value) for node, value in self.dag.labels.values.items()}
        self.samples = next(
            leaf.shape[0]
            for node in self.dag.program.graph.nodes
            if node.op == "placeholder"
            for leaf in tree_leaves(values[node])
            if isinstance(leaf, Tensor) and leaf.ndim
        )
        reached: set[fx.Node] = set()
        for node in self.dag.program.graph.nodes:
            layer = self.layers.get(node)
            is_start = layer is not None and layer.name == self.producer
            if is_start or any(source in reached for source in node.all_input_nodes):
                values[node] = self.evaluate(node, values)
                passes = is_start or layer is None or layer.name not in self.dag.labels.rows
                if passes and _carries(values[node]):  # not so sizes
                    reached.add(node)
                    if self.mixing is None and _mixes(values[node]):
                        self.mixing = located(node, name_of(node))

    def reduce(self, node: fx.Node, args: tuple, kwargs: dict) -> object:
        inputs, dims = args[0], reduced_dims(node, args, kwargs)
        if not isinstance(node.meta["val"], Tensor):
            return self.unknown(node, inputs, "")
        kept = [d for d in range(inputs.ndim) if d not in dims]
        return self.means.of(inputs.permute(*kept, *dims).flatten(len(kept))).view(node.meta["val"].shape)

    def spatial(self, node: fx.Node, tables: Tables, inputs: Tensor) -> object:
        return self.windowed(inputs, tables(inputs.shape))

    def halves(self, node: fx.Node, inputs: Tensor, dim: int = -1) -> object:
        return self.unknown(node, inputs, "")

    def mixed(self, node: fx.Node, name: str, dims: Sequence[int], inputs: Tensor) -> object:
        return self.unknown(node, inputs, "") if any(self.varies(inputs, dim) for dim in dims) else inputs

    def taken(self, node: fx.Node, dims: Sequence[int], inputs: Tensor) -> object:
        return self.unknown(node, inputs, "")

    def windowed(self, inputs: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """Means over the entries that tables name, along the last dimensions."""
        first = inputs.ndim - len(tables)
        if first < 2:  # channels are moved too
            return self.means.of(_windows(inputs, tables))
        channels = torch.nonzero((inputs != NO_CHANNEL).movedim(1, 0).flatten(1).any(1)).flatten()  # few count
        numbers = torch.full((*inputs.shape[:first], *map(len, tables)), NO_CHANNEL)
        return numbers.index_copy_(1, channels, self.means.of(_windows(inputs.index_select(1, channels), tables)))

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

    def unknown(self, node: fx.Node, touched: object, cause: str) -> object:
        number = MIXED if _carries(touched) else NO_CHANNEL
        return tree_map(
            lambda value: torch.full((), number).expand(value.shape) if isinstance(value, Tensor) else value,
            node.meta["val"],
        )

    def opaque(self, node: fx.Node, cause: str) -> object:
        return tree_map(_neutral, node.meta["val"])

    def source(self, node: fx.Node) -> object:
        return self.opaque(node, "")

    def edge(self, node: fx.Node, layer: LayerSite, inputs: Tensor) -> object:
        self.inputs[layer.name] = inputs
        output, rule = _neutral(node.meta["val"]).clone(), layer.rule
        if layer.name == self.producer:
            channels = self.layout.rows[self.producer][0]
            flat = output.movedim(rule.channel_dim(output.ndim), -1)
            self.rows, self.written = flat[..., 0].numel(), flat.shape[:-1]
            self.means.next = self.rows * len(channels)
            count = torch.arange(self.rows).view(flat.shape[:-1])
            flat[..., channels] = count[..., None] * len(channels) + torch.arange(len(channels))
        return output

    def rider(self, node: fx.Node, layer: LayerSite, inputs: Tensor) -> object:
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


def _windows(inputs: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """Entries that tables name along the last dimensions, side by side in a new one."""
    first, windows = inputs.ndim - len(tables), inputs
    for dim, table in enumerate(tables, start=first):
        outside = (table < 0).view(*[1] * dim, *table.shape, *[1] * (windows.ndim - dim - 1))
        windows = windows.index_select(dim, table.clamp_min(0).flatten()).unflatten(dim, table.shape)
        windows = windows.masked_fill(outside, NO_CHANNEL).movedim(dim + 1, -1)
    return windows.flatten(inputs.ndim)


def _neutral(value: Any) -> Any:
    return torch.full((), NO_CHANNEL).expand(value.shape) if isinstance(value, Tensor) else value


def _mixes(value: object) -> bool:
    """Whether some entry is MIXED."""
    return any(isinstance(leaf, Tensor) and bool((leaf == MIXED).any()) for leaf in tree_leaves(value))


def _carries(touched: object) -> bool:
    """Whether some entry is not neutral."""
    return any(isinstance(leaf, Tensor) and bool((leaf != NO_CHANNEL).any()) for leaf in tree_leaves(touched))
