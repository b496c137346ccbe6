"""Running a graph on labels instead of numbers. In comes a graph, out goes a :class:`Labelling`.

Every output channel of every weighted layer gets a fresh integer, and integer tensors of the activations' own
shapes go through the graph. Operations that move data are executed as they are; where two operands meet, their
labels are united; what nobody understands freezes what it touches, and the reason is kept. Channels whose labels
are one class at the end must grow together.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from dagrow.axes._label_interpreter import LabelInterpreter, Values, located, moved
from dagrow.axes._label_tensors import NO_CHANNEL, expanded_along, unexpanded
from dagrow.axes._union_find import UnionFind
from dagrow.layers import SIZES, EdgeRule, LayerSite, RiderRule, binds, neutral_entries, op_name


@dataclass(frozen=True)
class Rider:
    """Something that carries one entry per channel of an axis: a norm layer, or a parameter used directly.

    Attributes:
        name: the layer's or tensor's path in the model.
        rule: what dagrow knows of the layer; None for a parameter or buffer used directly.
        neutral: for a tensor used directly: the entry that leaves a channel unchanged.
        paths: the layer's parameters and buffers that carry entries, and their names in the model.
        module: the layer.
        owner: the module whose attributes state the width.
    """

    name: str
    rule: RiderRule | None
    neutral: float = 0.0
    paths: tuple[tuple[str, str], ...] = ()
    module: nn.Module | None = field(default=None, repr=False, compare=False)
    owner: str = ""

    @property
    def tensors(self) -> list[str]:
        """Names of the parameters and buffers that carry the entries."""
        return [self.name] if self.rule is None else [path for _, path in self.paths]


@dataclass
class Labelling:
    """What a run on labels found out.

    Attributes:
        classes: which labels are one.
        values: every node's labels (or plain value).
        rows: edge -> labels of its output channels.
        columns: edge -> labels of its input channels.
        entries: rider -> labels of its entries.
        shared: edge or rider -> why its weights do not act once on each sample.
        broadcast: labels that were broadcast over channels of others, and so met none of them.
        riders: the layers among the riders, by their names.
        unit_dims: node -> the dimension along which channels stay apart; those along all others are one.
        channels: smaller labels are channels of layers.
        tensor_names: parameters and buffers of the model.
        elsewhere: layers that only further examples run, so that they are not measured.
    """

    classes: UnionFind
    values: Values = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    entries: dict[Rider, Tensor] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    broadcast: list[Tensor] = field(default_factory=list)
    riders: dict[str, Rider] = field(default_factory=dict)
    unit_dims: Mapping[fx.Node, int] = field(default_factory=dict)
    channels: int = 0
    tensor_names: frozenset[str] = frozenset()
    elsewhere: frozenset[str] = frozenset()


class ChannelLabeller(LabelInterpreter):
    """Labels are channels: they unite where they meet.

    Attributes:
        labelling: what has been found out so far.
        live: nodes that depend on an input of the model.
    """

    def __init__(self, model: nn.Module, layers: Mapping[fx.Node, LayerSite], labelling: Labelling) -> None:
        super().__init__(model, layers)
        self.labelling, self.classes = labelling, labelling.classes
        self.live: set[fx.Node] = set()

    def is_channel(self, labels: Tensor) -> Tensor:
        """A hook: which labels are one class with a layer's channel."""
        roots = self.classes.roots(labels)
        return (roots >= 0) & (roots < self.labelling.channels)

    def sum_products(self, node: fx.Node, left: Tensor, right: Tensor) -> None:
        """A hook: channels of two operands meet in a sum of products."""
        self.classes.unite(left, right)

    def moved(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        """A hook: what an operation that only moves entries gives."""
        return moved(node, args, kwargs)

    def comparable(self, entries: Tensor) -> Tensor:
        return self.classes.roots(entries)

    def move(self, node: fx.Node, args: tuple, kwargs: dict) -> object:
        labels = self.moved(node, args, kwargs)
        if node in self.labelling.unit_dims:
            self.unite_units(labels, self.labelling.unit_dims[node])
        return labels

    def unite_units(self, labels: Tensor, dim: int) -> None:
        """Makes channels one along all dimensions but one."""
        by_unit = unexpanded(labels).movedim(dim, 0).flatten(1)
        self.classes.unite(by_unit[:, :1], by_unit)

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        shape = tensors[0].shape
        if any(t.shape != shape for t in tensors):
            shape = torch.broadcast_shapes(*(t.shape for t in tensors))
        merged, *others = [self._meeting(t, tensors, shape) for t in tensors]
        for other in others:
            self.classes.unite(unexpanded(merged), unexpanded(other))
            merged = _fewer_labels(unexpanded(merged), unexpanded(other))
        return merged.expand(shape)

    def _meeting(self, tensor: Tensor, tensors: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """The operand, or NO_CHANNEL if its entries would meet many channels of another, so that they are of none."""
        if tensor.shape == shape:
            return tensor
        missing = len(shape) - tensor.ndim
        stretched = [d for d, size in enumerate(shape) if size > 1 and (d < missing or tensor.shape[d - missing] == 1)]
        for other in tensors if stretched else ():
            if other is not tensor and any(self._has_channels(other.expand(shape), d) for d in stretched):
                self.labelling.broadcast.append(unexpanded(tensor).flatten())
                return tensor.new_full((), NO_CHANNEL).expand(tensor.shape)
        return tensor

    def _has_channels(self, tensor: Tensor, dim: int) -> bool:
        """Whether a dimension holds several channels of layers."""
        if not self.varies(tensor, dim):
            return False
        entries = unexpanded(tensor)
        return self.varies(torch.where(self.is_channel(entries), entries, NO_CHANNEL), dim)

    def contract(self, node: fx.Node, left: Tensor, right: Tensor, summed: int) -> Tensor:
        dims = range(left.ndim - summed, left.ndim)
        if any(left.shape[d] != right.shape[d] for d in dims):
            raise RuntimeError("the sizes of the dimension that a product sums over differ")
        sums_channels = [any(self._has_channels(side, d) for d in dims) for side in (left, right)]
        if any(sums_channels):
            self.sum_products(node, unexpanded(left), unexpanded(right))
        factors = []
        for side, is_summed in zip((left, right), sums_channels, strict=True):
            factor = side.flatten(left.ndim - summed)[..., 0] if summed else side
            if not is_summed and any(self.varies(side, d) for d in dims):  # entries of a tensor used directly
                self.freeze([side], located(node, f"is summed over in {op_name(node)}"))
                is_summed = True
            factors.append(factor.new_full((), NO_CHANNEL).expand(factor.shape) if is_summed else factor)
        return self.merge(factors)

    def freeze(self, tensors: Iterable[Tensor], reason: str) -> None:
        for tensor in tensors:
            self.classes.freeze(tensor, reason)

    def opaque(self, node: fx.Node, reason: str) -> object:
        def frozen(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            label = self.classes.fresh(1)
            self.classes.freeze(label, reason)
            return label.expand(value.shape) if value.ndim else torch.tensor(NO_CHANNEL)

        return tree_map(frozen, node.meta.get("val"))

    def table(self, node: fx.Node, reason: str) -> object:
        shape = node.meta["val"].shape
        labels = self.classes.fresh(shape[-1])
        self.classes.freeze(labels, located(node, reason))
        return labels.expand(shape)

    def source(self, node: fx.Node) -> object:
        if node.op == "placeholder":
            return self.opaque(node, "is an input of the model")
        if node.target not in self.labelling.tensor_names:
            return self.opaque(node, "is a constant")
        if not node.meta["val"].is_floating_point():
            kind = "complex" if node.meta["val"].is_complex() else "no floating point"
            return self.opaque(node, f"is bound to {node.target}, which holds {kind} numbers")
        known = next((labels for rider, labels in self.labelling.entries.items() if rider.name == node.target), None)
        if known is not None:
            self._check_use(node, known)
            return known
        if not binds(node, self.live):
            return self.opaque(node, f"is computed from {node.target}")
        shape = node.meta["val"].shape
        labels = self.classes.fresh(shape.numel()).reshape(shape) if shape else torch.tensor(NO_CHANNEL)
        neutral = neutral_entries(node)
        if len(neutral) > 1:
            self.freeze([labels], f"is bound to {node.target}, which is used in sums and in products")
        self.labelling.entries[Rider(str(node.target), None, max(neutral, default=0.0))] = labels
        return labels

    def _check_use(self, node: fx.Node, labels: Tensor) -> None:
        """Freezes a tensor that one example adds and another multiplies with, so that no entry is neutral in both."""
        neutral = {rider.neutral for rider in self.labelling.entries if rider.name == node.target}
        if neutral_entries(node) - neutral:
            self.freeze([labels], f"is bound to {node.target}, which is used in sums and in products")

    def edge(self, node: fx.Node, layer: LayerSite, inputs: Tensor) -> object:
        name, rule, labelling = layer.name, layer.rule, self.labelling
        assert isinstance(rule, EdgeRule)
        if name not in labelling.rows:
            return self.unknown(node, inputs, f"{name} cannot run on labels")
        dim, rows = rule.channel_dim(inputs.ndim), labelling.rows[name]
        columns = self._fold(self._per_channel(inputs, dim), rule.blocks(layer.module))
        if name in labelling.columns:
            columns = self.merge([labelling.columns[name], columns])
        labelling.columns[name] = columns
        if dim == 0 and inputs.ndim > 1:
            self.freeze([inputs, rows], f"{name} reads channels along the first dimension, that of the samples")
        return _written(rows, rule, node)

    def rider(self, node: fx.Node, layer: LayerSite, inputs: Tensor) -> object:
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
        is_grouped = (read, written) != (1, 1)
        if is_grouped:
            labels = groups.amax(1, keepdim=True).expand(-1, written).reshape(-1)
        self._carry(layer, labels)
        shape = node.meta["val"].shape
        if not is_grouped and inputs.shape[:dim] == shape[:dim] and inputs.shape[dim + 1 :] == shape[dim + 1 :]:
            return inputs
        return _written(labels, rule, node)

    def _carry(self, layer: LayerSite, labels: Tensor) -> None:
        """Notes that a layer has entries for these channels."""
        name, rule, module, labelling = layer.name, layer.rule, layer.module, self.labelling
        assert isinstance(rule, RiderRule)
        if name not in labelling.riders:
            paths = tuple((entry, layer.path(entry)) for entry in rule.passing(module))
            labelling.riders[name] = Rider(name, rule, paths=paths, module=module, owner=layer.owner)
        rider = labelling.riders[name]
        if rider in labelling.entries:
            self.merge([labelling.entries[rider], labels])
        labelling.entries[rider] = labels

    def _fold(self, channels: Tensor, blocks: int) -> Tensor:
        """One label for the channels that the same weights' column reads, one in each block."""
        if blocks == 1:
            return channels
        by_block = channels.view(blocks, -1)
        self.classes.unite(by_block[:1], by_block)
        return by_block[0]

    def _per_channel(self, inputs: Tensor, dim: int) -> Tensor:
        """One label per channel; labels that share a channel at different positions are united."""
        entries = unexpanded(inputs.movedim(dim, 0)).flatten(1)
        if len(entries) == 1:
            entries = entries.expand(inputs.shape[dim], -1)
        elif entries.shape[1] == 1:
            return entries[:, 0]
        labels = entries.amax(1)
        self.classes.unite(labels[:, None], entries)
        return labels


def _fewer_labels(a: Tensor, b: Tensor) -> Tensor:
    """What two operands that have met are together: labels that are repeated in one of them can stand for all."""
    few, many = (a, b) if a.numel() <= b.numel() else (b, a)
    if not bool((few == NO_CHANNEL).any()):
        return few
    return torch.where(few == NO_CHANNEL, many, few)


def _written(labels: Tensor, rule: EdgeRule | RiderRule, node: fx.Node) -> Tensor:
    """A node's value, which has these labels along its channels, whatever the positions."""
    shape = node.meta["val"].shape
    return expanded_along(labels, rule.channel_dim(len(shape)), shape)


def label(
    graph: fx.Graph, model: nn.Module, layers: Mapping[fx.Node, LayerSite], also: Sequence[fx.Graph] = ()
) -> Labelling:
    """Runs the whole graph on fresh labels, and those of further examples on the labels of the same layers."""
    tensor_names = frozenset(name for name, _ in (*model.named_parameters(), *model.named_buffers()))
    labelling = Labelling(UnionFind(), tensor_names=tensor_names)
    edges = [(layer, layer.rule) for layer in layers.values() if isinstance(layer.rule, EdgeRule)]
    for layer, rule in edges:
        if layer.name not in labelling.rows:
            rows = labelling.rows[layer.name] = labelling.classes.fresh(rule.widths(layer.module)[1])
            by_block = rows.view(rule.blocks(layer.module), -1)
            labelling.classes.unite(by_block[:1], by_block)
    labelling.channels = len(labelling.classes)
    labeller = ChannelLabeller(model, layers, labelling)
    for each in (graph, *also):
        labeller.live = _live(each)
        labeller.run(each.nodes, labelling.values)
    labelling.rows = {name: rows for name, rows in labelling.rows.items() if name in labelling.columns}
    _note_shared(graph, layers, labelling)
    return labelling


def _note_shared(graph: fx.Graph, layers: Mapping[fx.Node, LayerSite], labelling: Labelling) -> None:
    """Notes the layers whose weights do not act once on each sample of the first example."""
    live = _live(graph)
    calls = Counter(layer.name for node, layer in layers.items() if node.graph is graph)
    labelling.elsewhere = frozenset(layer.name for layer in layers.values()) - calls.keys()
    for name, count in calls.items():
        if count > 1:
            labelling.shared[name] = f"{name} is called more than once"
    for name in labelling.elsewhere:
        labelling.shared[name] = f"{name} is run by other examples than the first, which is the one that is measured"
    for layer in (layer for node, layer in layers.items() if node.graph is graph):
        rule = layer.rule
        if isinstance(rule, EdgeRule) and layer.inputs not in live:
            labelling.shared[layer.name] = f"{layer.name} reads a constant, not the samples"
        elif isinstance(rule, EdgeRule) and rule.blocks(layer.module) > 1:
            labelling.shared[layer.name] = f"{layer.name} has weights of its own for every group"


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on the values of an input of the model, not on its sizes alone."""
    live: set[fx.Node] = set()
    for node in graph.nodes:
        is_live = node.op == "placeholder" or any(source in live for source in node.all_input_nodes)
        if is_live and op_name(node) not in SIZES:
            live.add(node)
    return live
