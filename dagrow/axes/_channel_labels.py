"""Running a graph on labels instead of numbers.

Every output channel of every weighted layer gets a fresh integer, and integer tensors of the activations' own
shapes go through the graph. Operations that move data are executed as they are; where two operands meet, their
labels are united; what nobody understands freezes what it touches, and the cause is kept. Channels whose labels
are one class at the end must grow together.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from dagrow.axes._label_interpreter import LabelInterpreter, Values
from dagrow.axes._union_find import NO_CHANNEL, UnionFind, narrow
from dagrow.layers import SIZES, EdgeRule, LayerSite, RiderRule, binds, neutral_entries, op_name


@dataclass(frozen=True)
class Rider:
    """Something that carries one entry per channel of an axis: a norm layer, or a parameter used directly."""

    name: str
    rule: RiderRule | None  #: None for a parameter or buffer used directly
    neutral: float = 0.0  #: for a tensor used directly: the entry that leaves a channel unchanged
    paths: tuple[tuple[str, str], ...] = ()  #: the layer's parameters and buffers that carry entries, and their names
    module: nn.Module | None = field(default=None, repr=False, compare=False)
    owner: str = ""  #: the module whose attributes state the width

    @property
    def tensors(self) -> list[str]:
        """Names of the parameters and buffers that carry the entries."""
        return [self.name] if self.rule is None else [path for _, path in self.paths]


@dataclass
class Labelling:
    """What a run on labels found out.

    Attributes:
        values: every node's labels (or plain value).
        rows: edge -> labels of its output channels.
        columns: edge -> labels of its input channels.
        entries: rider -> labels of its entries.
        shared: edge -> why its weights do not act once on each sample.
        aside: labels that were broadcast over channels of others, and so met none of them.
        riders: the layers among those, by their names.
        joined: node -> the dimension along which channels stay apart; those along all others are one.
        channels: smaller labels are channels of layers.
        named: parameters and buffers of the model.
    """

    classes: UnionFind
    values: Values = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    entries: dict[Rider, Tensor] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    aside: list[Tensor] = field(default_factory=list)
    riders: dict[str, Rider] = field(default_factory=dict)
    joined: Mapping[fx.Node, int] = field(default_factory=dict)
    channels: int = 0
    named: frozenset[str] = frozenset()


class ChannelLabeller(LabelInterpreter):
    """Labels are channels: they unite where they meet."""

    def __init__(self, model: nn.Module, layers: Mapping[fx.Node, LayerSite], found: Labelling) -> None:
        super().__init__(model, layers)
        self.found, self.classes = found, found.classes
        self.live: set[fx.Node] = set()  #: nodes that depend on an input of the model

    def same(self, entries: Tensor) -> Tensor:
        return self.classes.roots(entries)

    def is_channel(self, labels: Tensor) -> Tensor:
        """Which labels are one class with a layer's channel."""
        roots = self.classes.roots(labels)
        return (roots >= 0) & (roots < self.found.channels)

    def node(self, node: fx.Node, values: Values) -> Any:
        value = super().node(node, values)
        dim = self.found.joined.get(node)
        if dim is not None:
            together = narrow(value).movedim(dim, 0).flatten(1)
            self.classes.unite(together[:, :1], together)
        return value

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        shape = tensors[0].shape
        if any(t.shape != shape for t in tensors):
            shape = torch.broadcast_shapes(*(t.shape for t in tensors))
        merged, *others = [self._meeting(t, tensors, shape) for t in tensors]
        for other in others:
            self.classes.unite(narrow(merged), narrow(other))
            merged = _either(narrow(merged), narrow(other))
        return merged.expand(shape)

    def _meeting(self, tensor: Tensor, tensors: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """The operand, or NO_CHANNEL if its entries would meet many channels of another, so that they are of none."""
        if tensor.shape == shape:
            return tensor
        missing = len(shape) - tensor.ndim
        stretched = [d for d, size in enumerate(shape) if size > 1 and (d < missing or tensor.shape[d - missing] == 1)]
        for other in tensors if stretched else ():
            if other is not tensor and any(self._tells_apart(other.expand(shape), d) for d in stretched):
                self.found.aside.append(narrow(tensor).flatten())
                return tensor.new_full((), NO_CHANNEL).expand(tensor.shape)
        return tensor

    def _tells_apart(self, tensor: Tensor, dim: int) -> bool:
        """Whether a dimension holds several channels of layers."""
        if not self.varies(tensor, dim):
            return False
        entries = narrow(tensor)
        return self.varies(torch.where(self.is_channel(entries), entries, NO_CHANNEL), dim)

    def contract(self, node: fx.Node, left: Tensor, right: Tensor, summed: int) -> Tensor:
        dims = range(left.ndim - summed, left.ndim)
        if any(left.shape[d] != right.shape[d] for d in dims):
            raise RuntimeError("the sizes of the dimension that a product sums over differ")
        apart = [any(self._tells_apart(side, d) for d in dims) for side in (left, right)]
        if any(apart):
            self.summed(node, narrow(left), narrow(right))
        parts = []
        for side, many in zip((left, right), apart, strict=True):
            one = side.flatten(left.ndim - summed)[..., 0] if summed else side
            if not many and any(self.varies(side, d) for d in dims):  # entries of a tensor used directly
                self.freeze([side], self.located(node, f"is summed over in {op_name(node)}"))
                many = True
            parts.append(one.new_full((), NO_CHANNEL).expand(one.shape) if many else one)
        return self.merge(parts)

    def summed(self, node: fx.Node, left: Tensor, right: Tensor) -> None:
        """Channels of two operands meet in a sum of products."""
        self.classes.unite(left, right)

    def freeze(self, tensors: Iterable[Tensor], cause: str) -> None:
        for tensor in tensors:
            self.classes.freeze(tensor, cause)

    def opaque(self, node: fx.Node, cause: str) -> Any:
        def frozen(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            label = self.classes.fresh(1)
            self.classes.freeze(label, cause)
            return label.expand(value.shape) if value.ndim else torch.tensor(NO_CHANNEL)

        return tree_map(frozen, node.meta.get("val"))

    def table(self, node: fx.Node, cause: str) -> Any:
        shape = node.meta["val"].shape
        labels = self.classes.fresh(shape[-1])
        self.classes.freeze(labels, self.located(node, cause))
        return labels.expand(shape)

    def source(self, node: fx.Node) -> Any:
        if node.op == "placeholder" or node.target not in self.found.named:
            return self.opaque(node, "is an input of the model" if node.op == "placeholder" else "is a constant")
        if not node.meta["val"].is_floating_point():
            return self.opaque(node, f"is bound to {node.target}, which holds no floating point numbers")
        shape = node.meta["val"].shape
        known = next((t for r, t in self.found.entries.items() if r.name == node.target), None)
        if known is None and not binds(node, self.live):
            return self.opaque(node, f"is computed from {node.target}")
        if known is None:
            known = self.classes.fresh(shape.numel()).reshape(shape) if shape else torch.tensor(NO_CHANNEL)
            neutral = neutral_entries(node)
            if len(neutral) > 1:
                self.freeze([known], f"is bound to {node.target}, which is used in sums and in products")
            self.found.entries[Rider(str(node.target), None, max(neutral, default=0.0))] = known
        return known

    def edge(self, node: fx.Node, layer: LayerSite, inputs: Tensor) -> Any:
        name, rule = layer.name, layer.rule
        assert isinstance(rule, EdgeRule)
        if name not in self.found.rows:
            return self.unknown(node, inputs, f"{name} cannot run on labels")
        dim, rows = rule.channel_dim(inputs.ndim), self.found.rows[name]
        columns = self._folded(self._per_channel(inputs, dim), rule.blocks(layer.module))
        if name in self.found.columns:
            self.found.shared[name] = f"{name} is called more than once"
            columns = self.merge([self.found.columns[name], columns])
        self.found.columns[name] = columns
        if dim == 0 and inputs.ndim > 1:
            self.freeze([inputs, rows], f"{name} reads channels along the first dimension, that of the samples")
        return _along(rows, rule, node)

    def rider(self, node: fx.Node, layer: LayerSite, inputs: Tensor) -> Any:
        name, rule, module = layer.name, layer.rule, layer.module
        assert isinstance(rule, RiderRule)
        refusal = rule.refusal(module)
        if refusal:
            self.freeze([inputs], f"{refusal} ({name})")
        dim, (read, written) = rule.channel_dim(inputs.ndim), rule.group(module)
        labels = self._per_channel(inputs, dim)
        if len(labels) % read:
            return self.unknown(node, inputs, f"{len(labels)} channels do not fall into the groups of {name}")
        groups = labels.view(-1, read)
        if read > 1:
            self.classes.unite(groups[:, :1], groups)
        if (read, written) != (1, 1):
            labels = groups.amax(1, keepdim=True).expand(-1, written).reshape(-1)
        if name not in self.found.riders:
            paths = tuple((entry, layer.path(entry)) for entry in rule.passing(module))
            self.found.riders[name] = Rider(name, rule, paths=paths, module=module, owner=layer.owner)
        rider = self.found.riders[name]
        if rider in self.found.entries:
            self.found.shared[name] = f"{name} is called more than once"
            self.merge([self.found.entries[rider], labels])
        self.found.entries[rider] = labels
        same = (read, written) == (1, 1) and inputs.shape[:dim] == node.meta["val"].shape[:dim]
        if same and inputs.shape[dim + 1 :] == node.meta["val"].shape[dim + 1 :]:
            return inputs
        return _along(labels, rule, node)

    def _folded(self, channels: Tensor, blocks: int) -> Tensor:
        """One label for the channels that the same weights' column reads, one in each block."""
        if blocks == 1:
            return channels
        folded = channels.view(blocks, -1)
        self.classes.unite(folded[:1], folded)
        return folded[0]

    def _per_channel(self, inputs: Tensor, dim: int) -> Tensor:
        """One label per channel; labels that share a channel at different positions are united."""
        entries = narrow(inputs.movedim(dim, 0)).flatten(1)
        if len(entries) == 1:
            entries = entries.expand(inputs.shape[dim], -1)
        elif entries.shape[1] == 1:
            return entries[:, 0]
        found = entries.amax(1)
        self.classes.unite(found[:, None], entries)
        return found


def _either(a: Tensor, b: Tensor) -> Tensor:
    """What two operands that have met are together: labels that are repeated in one of them can stand for all."""
    few, many = (a, b) if a.numel() <= b.numel() else (b, a)
    if not bool((few == NO_CHANNEL).any()):
        return few
    return torch.where(few == NO_CHANNEL, many, few)


def _along(labels: Tensor, rule: EdgeRule | RiderRule, node: fx.Node) -> Tensor:
    """Labels along the channels of a node's value, whatever the positions."""
    shape = list(node.meta["val"].shape)
    dim = rule.channel_dim(len(shape))
    shape[dim] = len(labels)
    return labels.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)


def label(
    graph: fx.Graph, model: nn.Module, layers: Mapping[fx.Node, LayerSite], joined: Mapping[fx.Node, int] | None = None
) -> Labelling:
    """Runs the whole graph on fresh labels; ``joined`` as in :class:`Labelling`."""
    named = frozenset(name for name, _ in (*model.named_parameters(), *model.named_buffers()))
    found = Labelling(UnionFind(), joined=joined or {}, named=named)
    for layer in layers.values():
        if isinstance(layer.rule, EdgeRule) and layer.name not in found.rows:
            rows = found.rows[layer.name] = found.classes.fresh(layer.rule.widths(layer.module)[1])
            by_block = rows.view(layer.rule.blocks(layer.module), -1)
            found.classes.unite(by_block[:1], by_block)
    found.channels = len(found.classes)
    runner = ChannelLabeller(model, layers, found)
    runner.live = _live(graph)
    runner.run(graph.nodes, found.values)
    for name in [name for name in found.rows if name not in found.columns]:
        del found.rows[name]
    for layer in layers.values():
        if isinstance(layer.rule, EdgeRule) and layer.inputs not in runner.live:
            found.shared[layer.name] = f"{layer.name} reads a constant, not the samples"
        elif isinstance(layer.rule, EdgeRule) and layer.rule.blocks(layer.module) > 1:
            found.shared[layer.name] = f"{layer.name} has weights of its own for every group"
    return found


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on the values of an input of the model, not on its sizes alone."""
    live: set[fx.Node] = set()
    for node in graph.nodes:
        if op_name(node) not in SIZES and (
            node.op == "placeholder" or any(source in live for source in node.all_input_nodes)
        ):
            live.add(node)
    return live
