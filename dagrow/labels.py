"""Running a graph on labels instead of numbers.

Every output channel of every weighted layer gets a fresh integer, and integer tensors of the activations' own
shapes go through the graph. Operations that move data are executed as they are; where two operands meet, their
labels are united; what nobody understands freezes what it touches, and the cause is kept. Channels whose labels
are one class at the end must grow together.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from dagrow import ops
from dagrow.layers import EdgeRule, LayerRule, RiderRule, rule_for
from dagrow.space import Tables, tables_of

__all__ = ["NEUTRAL", "ChannelRunner", "Classes", "Labelling", "Rider", "Runner", "label", "narrow"]

NEUTRAL = -1  #: the label of entries that belong to no channel: masks, scalars, positions
Values = dict[fx.Node, Any]


@dataclass
class Classes:
    """Union-find over labels. A frozen class keeps the first cause of its freezing."""

    parent: list[int] = field(default_factory=list)
    frozen: dict[int, str] = field(default_factory=dict)
    _table: Tensor | None = None  #: every label's representative, until classes change

    def fresh(self, count: int) -> Tensor:
        start, self._table = len(self.parent), None
        self.parent.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def copy(self) -> "Classes":
        return Classes(list(self.parent), dict(self.frozen))

    def find(self, label: int) -> int:
        root = label
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[label] != root:
            self.parent[label], label = root, self.parent[label]
        return root

    def unite(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self.parent[b], self._table = a, None
            cause = self.frozen.get(a) or self.frozen.pop(b, None)
            if cause:
                self.frozen[a] = cause

    def freeze(self, labels: Tensor, cause: str) -> None:
        for label in torch.unique(narrow(labels)).tolist():
            if label != NEUTRAL:
                self.frozen.setdefault(self.find(label), cause)

    def cause(self, label: int) -> str | None:
        """Why the label's class is frozen, or None."""
        return self.frozen.get(self.find(label))

    def roots(self, labels: Tensor) -> Tensor:
        """The labels' representatives, entry by entry."""
        if self._table is None:
            self._table = torch.tensor([self.find(label) for label in range(len(self.parent))] + [NEUTRAL])
        return self._table[labels]


@dataclass(frozen=True)
class Rider:
    """Something that carries one entry per channel of an axis: a norm layer, or a parameter used directly."""

    name: str
    rule: RiderRule | None  #: None for a parameter or buffer used directly
    neutral: float = 0.0  #: for a tensor used directly: the entry that leaves a channel unchanged
    entries: tuple[str, ...] = ()  #: the layer's parameters and buffers that carry the entries

    @property
    def tensors(self) -> list[str]:
        """Names of the parameters and buffers that carry the entries."""
        return [self.name] if self.rule is None else [f"{self.name}.{entry}" for entry in self.entries]


@dataclass
class Labelling:
    """What a run on labels found out.

    Attributes:
        values: every node's labels (or plain value).
        rows: edge -> labels of its output channels.
        columns: edge -> labels of its input channels.
        entries: rider -> labels of its entries.
        shared: edge -> why its weights do not act at one place only.
    """

    classes: Classes
    values: Values = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    entries: dict[Rider, Tensor] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)


class Runner(ABC):
    """Executes nodes on integer tensors; what integers mean and how they meet is up to the subclass."""

    def __init__(self, model: nn.Module, rules: Sequence[LayerRule]) -> None:
        self.model, self.rules = model, rules
        self.modules = dict(model.named_modules())

    @abstractmethod
    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of one shape that meet entry by entry."""

    @abstractmethod
    def freeze(self, tensors: Iterable[Tensor], cause: str) -> None:
        """Marks all channels in the tensors as not growable."""

    @abstractmethod
    def opaque(self, node: fx.Node, cause: str) -> Any:
        """The value of a node that nothing is known of."""

    @abstractmethod
    def source(self, node: fx.Node) -> Any:
        """The value of a placeholder or of a tensor used directly."""

    @abstractmethod
    def edge(self, node: fx.Node, rule: EdgeRule, inputs: Tensor) -> Any:
        """The output of a weighted layer."""

    @abstractmethod
    def rider(self, node: fx.Node, rule: RiderRule, inputs: Tensor) -> Any:
        """The output of a layer with one entry per channel."""

    def run(self, nodes: Iterable[fx.Node], values: Values) -> Values:
        """Adds the nodes' values to ``values``."""
        for node in nodes:
            try:
                values[node] = self.node(node, values)
            except (RuntimeError, IndexError, TypeError, ValueError, AttributeError):
                touched = [values[source] for source in node.all_input_nodes]
                values[node] = self.unknown(node, touched, f"operation {ops.op_name(node)} cannot run on labels")
        return values

    def node(self, node: fx.Node, values: Values) -> Any:
        if node.op in ("placeholder", "get_attr"):
            return self.source(node)
        args = fx.map_arg(node.args, lambda n: values[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: values[n])
        if node.op == "output":
            self.freeze(_tensors(args), "is an output of the model")
            return args[0]
        if node.op == "call_module":
            return self.call_module(node, args, kwargs)
        return self.call_function(node, args, kwargs)

    def call_module(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        module = self.modules[str(node.target)]
        rule = rule_for(module, self.rules)
        plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        if plain and isinstance(rule, EdgeRule):
            return self.edge(node, rule, args[0])
        if plain and isinstance(rule, RiderRule):
            return self.rider(node, rule, args[0])
        if plain and ops.is_pointwise_module(module):
            return args[0]
        if plain and ops.is_move_module(module):
            return self.move(node, args, kwargs)
        tables = tables_of(None, module) if plain else None
        if tables is not None:
            return self.spatial(node, tables, args[0])
        dims = ops.mixed_dims(node, module, args[0].ndim) if plain else None
        if dims is not None:
            return self.mixed(node, f"{type(module).__name__} ({node.target})", dims, args[0])
        return self.unknown(node, (args, kwargs), f"{type(module).__name__} ({node.target}) has no rule")

    def call_function(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        name, tensors = ops.op_name(node), _tensors((args, kwargs))
        if name in ops.SIZES or not (tensors or name in ops.CREATION):
            return ops.executor(node)(*args, **kwargs)
        if name in ops.CREATION:
            return self.opaque(node, f"is a constant made by {name}")
        if name in ops.MOVES and not (name == "getitem" and _tensors(args[1:])):  # labels are no indices
            return self.move(node, args, kwargs)
        if name in ops.POINTWISE and isinstance(args[0], Tensor):
            return args[0] if len(tensors) == 1 else self.merge(_broadcast(tensors, self.freeze))
        if name in ops.PAIRWISE:
            return self.merge(_broadcast(tensors, self.freeze))
        if name in ops.REDUCTIONS:
            return self.reduce(node, args, kwargs)
        tables = tables_of(name, None, args, kwargs)
        if tables is not None and len(tensors) == 1 and isinstance(node.meta["val"], Tensor):
            return self.spatial(node, tables, args[0])
        dims = ops.mixed_dims(node, None, args[0].ndim) if tensors and args and isinstance(args[0], Tensor) else None
        if dims is not None:
            self.freeze(tensors[1:], f"is used in {name}")
            return self.mixed(node, str(name), dims, args[0])
        return self.unknown(node, (args, kwargs), f"operation {name or node.target} has no rule")

    def move(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        """Executes an operation that only moves entries. A hook for rewriting literals."""
        if ops.op_name(node) == "view":  # labels are laid out otherwise in memory than the activation
            return args[0].reshape(*args[1:], **kwargs)
        if node.op == "call_module":
            return self.modules[str(node.target)](args[0].contiguous())
        return ops.executor(node)(*args, **kwargs)

    def reduce(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        """Entries along the reduced dimensions meet; different channels must not."""
        inputs = args[0]
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        dims = tuple(range(inputs.ndim)) if dims is None else dims
        dims = tuple(d % inputs.ndim for d in ((dims,) if isinstance(dims, int) else dims))
        if any(_varies(inputs, d) for d in dims):
            return self.unknown(node, inputs, f"{ops.op_name(node)} mixes channels")
        keep = node.meta["val"].ndim == inputs.ndim
        index = tuple(slice(0, 1) if d in dims else slice(None) for d in range(inputs.ndim))
        return inputs[index] if keep else inputs[index].squeeze(dims)

    def spatial(self, node: fx.Node, tables: Tables, inputs: Tensor) -> Any:
        """An operation on the last dimensions. Along one that holds several channels, entries may only be moved."""
        found = tables(inputs.shape)
        for dim, table in zip(range(inputs.ndim - len(found), inputs.ndim), found, strict=True):
            if not _varies(inputs, dim):
                sizes = [len(table) if d == dim else -1 for d in range(inputs.ndim)]
                inputs = inputs.narrow(dim, 0, 1).expand(sizes)
            elif table.shape[1] == 1:
                none = (table[:, 0] < 0).view([-1 if d == dim else 1 for d in range(inputs.ndim)])
                inputs = inputs.index_select(dim, table[:, 0].clamp_min(0)).masked_fill(none, NEUTRAL)
            else:
                return self.unknown(node, inputs, f"{ops.op_name(node) or node.target} mixes channels")
        return inputs

    def mixed(self, node: fx.Node, name: str, dims: Sequence[int], inputs: Tensor) -> Any:
        """A norm or softmax over some dimensions, which must not hold different channels."""
        if any(_varies(inputs, dim) for dim in dims):
            return self.unknown(node, inputs, f"{name} mixes all channels, so that a new one would change the others")
        return inputs

    def unknown(self, node: fx.Node, touched: object, cause: str) -> Any:
        """Unknown never means pointwise: all that the operation touches freezes."""
        where = node.meta.get("source")
        cause = f"{cause} [{where}]" if where else cause
        self.freeze(_tensors(touched), cause)
        return self.opaque(node, cause)


class ChannelRunner(Runner):
    """Labels are channels: they unite where they meet."""

    def __init__(self, model: nn.Module, rules: Sequence[LayerRule], found: Labelling) -> None:
        super().__init__(model, rules)
        self.found, self.classes = found, found.classes

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        first, *others = (narrow(t) for t in tensors)
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
        merged = first
        for other in others:
            a, b = torch.broadcast_tensors(merged, other)
            pairs = torch.unique(torch.stack([a.reshape(-1), b.reshape(-1)]), dim=1)
            for x, y in pairs.T.tolist():
                if x != y and NEUTRAL not in (x, y):
                    self.classes.unite(x, y)
            merged = torch.where(a == NEUTRAL, b, a)
        return merged.expand(shape)

    def freeze(self, tensors: Iterable[Tensor], cause: str) -> None:
        for tensor in tensors:
            self.classes.freeze(tensor, cause)

    def opaque(self, node: fx.Node, cause: str) -> Any:
        def frozen(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            label = self.classes.fresh(1)
            self.classes.freeze(label, cause)
            return label.expand(value.shape) if value.ndim else torch.tensor(NEUTRAL)

        return tree_map(frozen, node.meta.get("val"))

    def source(self, node: fx.Node) -> Any:
        if node.op == "placeholder" or node.target not in self._direct():
            return self.opaque(node, "is an input of the model" if node.op == "placeholder" else "is a constant")
        if not node.meta["val"].is_floating_point():
            return self.opaque(node, f"is bound to {node.target}, which holds no floating point numbers")
        shape = node.meta["val"].shape
        known = next((t for r, t in self.found.entries.items() if r.name == node.target), None)
        if known is None:
            known = self.classes.fresh(shape.numel()).reshape(shape) if shape else torch.tensor(NEUTRAL)
            neutral = ops.neutral_entries(node)
            if len(neutral) > 1:
                self.freeze([known], f"is bound to {node.target}, which is used in sums and in products")
            self.found.entries[Rider(str(node.target), None, max(neutral, default=0.0))] = known
        return known

    def _direct(self) -> set[str]:
        return {n for n, _ in (*self.model.named_parameters(), *self.model.named_buffers())}

    def edge(self, node: fx.Node, rule: EdgeRule, inputs: Tensor) -> Any:
        name, module = str(node.target), self.modules[str(node.target)]
        dim = rule.channel_dim(inputs.ndim)
        if name in self.found.columns:
            self.found.shared[name] = f"{name} is called more than once"
            twice = (inputs, self.found.rows[name], self.found.columns[name])
            return self.unknown(node, twice, self.found.shared[name])
        self.found.columns[name] = self._per_channel(inputs, dim)
        if name not in self.found.rows:
            self.found.rows[name] = self.classes.fresh(rule.widths(module)[1])
        rows, shape = self.found.rows[name], list(node.meta["val"].shape)
        if dim == 0 and inputs.ndim > 1:
            self.freeze([inputs, rows], f"{name} reads an image without a dimension of samples")
        dim = rule.channel_dim(len(shape))
        shape[dim] = len(rows)
        return rows.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)

    def rider(self, node: fx.Node, rule: RiderRule, inputs: Tensor) -> Any:
        name = str(node.target)
        refusal = rule.refusal(self.modules[name])
        if refusal:
            self.freeze([inputs], f"{refusal} ({name})")
        module = self.modules[name]
        dim, (read, written) = rule.channel_dim(inputs.ndim), rule.group(module)
        labels = self._per_channel(inputs, dim)
        if len(labels) % read:
            return self.unknown(node, inputs, f"{len(labels)} channels do not fall into the groups of {name}")
        groups = labels.view(-1, read)
        for column in groups.T[1:]:
            self.merge([groups[:, 0], column])
        if (read, written) != (1, 1):
            labels = groups.amax(1, keepdim=True).expand(-1, written).reshape(-1)
        rider = Rider(name, rule, entries=tuple(rule.passing(module)))
        if rider in self.found.entries:
            self.merge([self.found.entries[rider], labels])
        self.found.entries[rider] = labels
        shape = list(node.meta["val"].shape)
        shape[dim] = len(labels)
        if (read, written) == (1, 1) and inputs.shape == torch.Size(shape):
            return inputs
        return labels.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)

    def _per_channel(self, inputs: Tensor, dim: int) -> Tensor:
        """One label per channel; labels that share a channel at different positions are united."""
        inputs_narrow = narrow(inputs.movedim(dim, 0))
        flat = torch.unique(inputs_narrow.reshape(len(inputs_narrow), -1), dim=1)
        if len(flat) == 1 and inputs.shape[dim] > 1:
            flat = flat.expand(inputs.shape[dim], -1)
        for column in flat.T[1:]:
            self.merge([flat[:, 0], column])
        return flat[:, 0].clone()


def label(graph: fx.Graph, model: nn.Module, rules: Sequence[LayerRule]) -> Labelling:
    """Runs the whole graph on fresh labels."""
    found = Labelling(Classes())
    ChannelRunner(model, rules, found).run(graph.nodes, found.values)
    return found


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def narrow(tensor: Tensor) -> Tensor:
    """The tensor with every repeated (stride 0) dimension cut to one entry."""
    return tensor[tuple(slice(0, 1) if s == 0 else slice(None) for s in tensor.stride())] if tensor.numel() else tensor


def _broadcast(tensors: Sequence[Tensor], freeze: Callable[[Iterable[Tensor], str], None]) -> list[Tensor]:
    """Expands operands to one shape. One whose entry would meet many channels belongs to none of them."""
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    wide = [t.expand(shape) for t in tensors]
    result = []
    for tensor, full in zip(tensors, wide, strict=True):
        stretched = [d for d in range(len(shape)) if shape[d] > 1 and _size(tensor, d, len(shape)) == 1]
        others = [o for o in wide if o is not full]
        if any(_varies(other, d) for d in stretched for other in others):
            freeze([tensor], "is broadcast over the channels of another axis")
            full = full.new_full((), NEUTRAL).expand(shape)
        result.append(full)
    return result


def _size(tensor: Tensor, dim: int, ndim: int) -> int:
    offset = dim - (ndim - tensor.ndim)
    return tensor.shape[offset] if offset >= 0 else 1


def _varies(tensor: Tensor, dim: int) -> bool:
    return tensor.stride(dim) != 0 and not bool((tensor == tensor.select(dim, 0).unsqueeze(dim)).all())
