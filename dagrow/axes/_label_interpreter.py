"""Running a graph on integers instead of numbers: what every operation does to the entries of a tensor.

In come the nodes of a graph and the integers of those before them, out go those of each node. Operations that move
entries are executed as they are; the others are told apart by name, and a subclass says what becomes of integers that
meet.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from dagrow._pytree import tensors_in
from dagrow.axes._label_lookups import gathered, indexed, indexed_dims, moves_by_numbers
from dagrow.axes._label_tensors import NO_CHANNEL, concatenated, is_repeated, reshaped, thinned, unexpanded
from dagrow.layers import (
    ATTENTION,
    ATTENTION_ARGUMENTS,
    MODES,
    MOVES,
    NOISE,
    PAIRWISE,
    PICKS,
    POINTWISE,
    PUTS,
    REDUCTIONS,
    REFUSALS,
    SIZES,
    UNIFORM,
    Contraction,
    EdgeRule,
    LayerSite,
    Tables,
    contraction,
    executor,
    is_move_module,
    is_pointwise_module,
    mixed_dims,
    op_name,
    reduced_dims,
    tables_of,
    taken_dims,
)

Values = dict[fx.Node, Any]
_NOWHERE = {"device": torch.device("meta"), "dtype": torch.float32}
_FAILURES = (RuntimeError, IndexError, TypeError, ValueError, AttributeError)


class LabelInterpreter(ABC):
    """Executes nodes on integer tensors; what integers mean and how they meet is up to the subclass.

    Nodes have ``meta["module"]``, the module that they call or None, and ``meta["kind"]``, what a user's rule says.
    Besides the abstract methods, a subclass may define the hooks ``comparable``, ``call_arguments``,
    ``check_taken_together`` and ``check_product``, and what becomes of a class of operations.

    Attributes:
        model: the model.
        layers: the nodes of layers that a rule knows.
    """

    def __init__(self, model: nn.Module, layers: Mapping[fx.Node, LayerSite]) -> None:
        self.model, self.layers = model, layers

    @abstractmethod
    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors that meet entry by entry after broadcasting."""

    @abstractmethod
    def freeze(self, tensors: Iterable[Tensor], reason: str) -> None:
        """Marks all channels in the tensors as not growable."""

    @abstractmethod
    def opaque(self, node: fx.Node, reason: str) -> object:
        """The value of a node that nothing is known of."""

    @abstractmethod
    def source(self, node: fx.Node) -> object:
        """The value of a placeholder or of a tensor used directly."""

    @abstractmethod
    def edge(self, node: fx.Node, layer: LayerSite, inputs: Tensor) -> object:
        """The output of a weighted layer."""

    @abstractmethod
    def rider(self, node: fx.Node, layer: LayerSite, inputs: Tensor) -> object:
        """The output of a layer with one entry per channel."""

    @abstractmethod
    def contract(self, node: fx.Node, left: Tensor, right: Tensor, summed: int) -> Tensor:
        """A product summed over the last dimensions, of operands that are aligned over all dimensions."""

    def comparable(self, entries: Tensor) -> Tensor:
        """A hook: entries as they compare."""
        return entries

    def call_arguments(self, node: fx.Node) -> tuple[Any, Any]:
        """A hook: what the node is called with, nodes among it."""
        return node.args, node.kwargs

    def check_taken_together(self, node: fx.Node, inputs: Tensor, dims: Iterable[int]) -> None:  # noqa: B027
        """A hook: the node takes together what lies along some dimensions of its input."""

    def check_product(self, node: fx.Node, product: Contraction, left: Tensor, right: Tensor) -> None:  # noqa: B027
        """A hook: the node multiplies two operands and sums."""

    def varies(self, tensor: Tensor, dim: int) -> bool:
        """Whether entries differ along a dimension."""
        if tensor.shape[dim] < 2 or tensor.stride(dim) == 0 or not tensor.numel():
            return False
        entries = unexpanded(tensor)
        first = entries.select(dim, 0).unsqueeze(dim)
        if torch.equal(entries, first.expand_as(entries)):
            return False
        return not bool((self.comparable(entries) == self.comparable(first)).all())

    def run(self, nodes: Iterable[fx.Node], values: Values) -> None:
        """Adds the nodes' values to ``values``."""
        for node in nodes:
            try:
                value = self.evaluate(node, values)
                if _sizes(value) != _sizes(node.meta.get("val")):
                    raise RuntimeError("labels are not laid out as numbers are")
            except _FAILURES:
                touched = [values[source] for source in node.all_input_nodes]
                value = self.unknown(node, touched, f"operation {name_of(node)} cannot run on labels")
            values[node] = value

    def evaluate(self, node: fx.Node, values: Values) -> object:
        """The node's value, from those of the nodes before it; labels of several results are those of each."""
        value, result = self._evaluated(node, values), node.meta.get("val")
        if not isinstance(value, Tensor) or isinstance(result, Tensor):
            return value
        if any(part.ndim != value.ndim for part in tensors_in(result)):
            raise RuntimeError("results differ in their dimensions")
        return tree_map(lambda part: value if isinstance(part, Tensor) else part, result)

    def _evaluated(self, node: fx.Node, values: Values) -> object:
        if node.op in ("placeholder", "get_attr"):
            return self.source(node)
        layer = self.layers.get(node)
        if layer is not None and isinstance(values[layer.inputs], Tensor):
            act = self.edge if isinstance(layer.rule, EdgeRule) else self.rider
            return act(node, layer, values[layer.inputs])
        args, kwargs = self.arguments(node, values)
        if node.op == "output":
            self.freeze(tensors_in(args), "is an output of the model")
            return args[0]
        if node.meta.get("kind") == "pointwise":
            return self.merge(tensors_in((args, kwargs)))
        if node.meta.get("kind") == "moves":
            return self.move(node, args, kwargs)
        if node.op == "call_module":
            return self.call_module(node, args, kwargs)
        return self.call_function(node, args, kwargs)

    def arguments(self, node: fx.Node, values: Values) -> tuple[Any, Any]:
        """What the node is called with."""
        return fx.map_arg(self.call_arguments(node), lambda n: values[n])

    def call_module(self, node: fx.Node, args: tuple, kwargs: dict) -> object:
        module = node.meta["module"]
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            if is_pointwise_module(module):
                return args[0]
            if is_move_module(module):
                return self.move(node, args, kwargs)
            if isinstance(module, nn.GLU):
                return self.halves(node, args[0], module.dim)
            tables = tables_of(None, module)
            if tables is not None:
                return self.spatial(node, tables, args[0])
            dims = mixed_dims(node, module, args[0].ndim)
            if dims is not None:
                return self.mixed(node, f"{type(module).__name__} ({node.target})", dims, args[0])
        taken = taken_dims(node, module, args, kwargs)
        if taken is not None:
            return self.taken(node, taken, self.merge(tensors_in(args)))
        if isinstance(module, nn.Embedding):
            return self.table(node, f"Embedding ({node.target}) {REFUSALS[nn.Embedding]}")
        no_rule = "has no rule" if len(args) + len(kwargs) == 1 else "has no rule for several arguments"
        reason = next((why for kind, why in REFUSALS.items() if isinstance(module, kind)), no_rule)
        return self.unknown(node, (args, kwargs), f"{type(module).__name__} ({node.target}) {reason}")

    def call_function(self, node: fx.Node, args: tuple, kwargs: dict) -> object:
        name, tensors = op_name(node), tensors_in((args, kwargs))
        if name in MODES:
            return None
        if name in SIZES or not (tensors or tensors_in(node.meta.get("val"))):
            return executor(node)(*args, **kwargs)
        if name in UNIFORM or len(tensors) == str(name).startswith("new_"):
            return self.created(node, args, kwargs)
        if name in MOVES:
            by_numbers = moves_by_numbers(name, args, kwargs)
            return self.picked(node, args, kwargs) if by_numbers else self.move(node, args, kwargs)
        if name in PICKS | PUTS:
            return (self.looked_up if name in PICKS else self.put)(node, *args, **kwargs)
        if name in POINTWISE | NOISE:
            return tensors[0] if len(tensors) == 1 or name in ("to", "type_as") else self.merge(tensors)
        if name in PAIRWISE:
            return self.merge(tensors)
        if name == "view_as_complex":  # pairs of channels become one
            return self.merge(args[0].unbind(-1))
        if name == "glu":
            return self.halves(node, *args, **kwargs)
        if name in REDUCTIONS:
            return self.reduce(node, args, kwargs) if len(tensors) == 1 else self.merge(tensors)  # max(a, b)
        if name == ATTENTION:
            return self.attend(node, args, kwargs)
        product = contraction(name, args) if not kwargs else None
        if product is not None:
            left, right = (arg for arg in args if isinstance(arg, Tensor))
            return self.multiply(node, product, left, right)
        tables = tables_of(name, None, args, kwargs)
        if tables is not None and len(tensors) == 1:
            return self.spatial(node, tables, args[0])
        taken = taken_dims(node, None, args, kwargs)
        if taken is not None:
            return self.taken(node, taken, self.merge(tensors))
        dims = mixed_dims(node, None, args[0].ndim) if tensors and args and isinstance(args[0], Tensor) else None
        if dims is not None:
            self.freeze(tensors[1:], f"is used in {name}")
            return self.mixed(node, str(name), dims, args[0])
        return self.unknown(node, (args, kwargs), f"operation {name_of(node)} has no rule")

    def created(self, node: fx.Node, args: tuple, kwargs: dict) -> object:
        """A tensor made from no others. Channels stay apart in one that is alike everywhere; else it is a constant."""
        if op_name(node) not in UNIFORM:
            return self.opaque(node, f"is a constant made by {op_name(node)}")
        shaping = {key: value for key, value in kwargs.items() if key not in ("device", "dtype", "generator", "layout")}
        made = executor(node)(*args, **shaping, **_NOWHERE)
        assert isinstance(made, Tensor)
        return torch.tensor(NO_CHANNEL).expand(made.shape)

    def halves(self, node: fx.Node, inputs: Tensor, dim: int = -1) -> object:
        """A gated linear unit: the halves of a dimension meet."""
        if inputs.shape[dim] % 2:
            return self.unknown(node, inputs, "glu halves an odd number of channels")
        return self.merge(inputs.chunk(2, dim))

    def multiply(self, node: fx.Node, product: Contraction, left: Tensor, right: Tensor) -> Tensor:
        """A product of two activations."""
        self.check_product(node, product, left, right)
        return self.contract(node, *product.aligned(left, right), len(product.summed))

    def attend(self, node: fx.Node, args: tuple, kwargs: dict) -> object:
        """Scaled dot-product attention: scores are summed over the width of a head, and values over positions."""
        arguments = {**dict(zip(ATTENTION_ARGUMENTS, args, strict=False)), **kwargs}
        query, key, value, mask = (arguments.get(name) for name in ("query", "key", "value", "attn_mask"))
        assert isinstance(query, Tensor)
        assert isinstance(key, Tensor)
        assert isinstance(value, Tensor)
        if arguments.get("enable_gqa") and key.shape[-3] != query.shape[-3]:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        scores = self.multiply(node, Contraction.over("...td,...sd->...ts", query.ndim, key.ndim), query, key)
        if isinstance(mask, Tensor):
            scores = self.merge([scores, mask])
        return self.multiply(node, Contraction.over("...ts,...sd->...td", scores.ndim, value.ndim), scores, value)

    def move(self, node: fx.Node, args: tuple, kwargs: dict) -> object:
        """An operation that only moves entries."""
        return moved(node, args, kwargs)

    def reduce(self, node: fx.Node, args: tuple, kwargs: dict) -> object:
        """Entries along the reduced dimensions meet; different channels must not."""
        inputs, dims = args[0], reduced_dims(node, args, kwargs)
        self.check_taken_together(node, inputs, dims)
        if any(self.varies(inputs, d) for d in dims):
            return self.unknown(node, inputs, f"{op_name(node)} mixes channels")
        reduced, result = thinned(inputs, dims), tensors_in(node.meta["val"])[0]
        return reduced if result.ndim == inputs.ndim else reduced.squeeze(dims)

    def taken(self, node: fx.Node, dims: Sequence[int], inputs: Tensor) -> object:
        """Entries along some dimensions are ordered or transformed; different channels must not be among them."""
        self.check_taken_together(node, inputs, dims)
        if any(self.varies(inputs, d) for d in dims):
            return self.unknown(node, inputs, f"{name_of(node)} has no rule where it mixes channels")
        result, thin = tensors_in(node.meta["val"])[0], thinned(inputs, dims)
        if result.ndim != inputs.ndim:
            return thin.squeeze(tuple(dims))
        return thin.expand([size if d in dims else -1 for d, size in enumerate(result.shape)])

    def looked_up(self, node: fx.Node, inputs: Tensor, dim: Any, index: Any = None, **kwargs: Any) -> object:
        """Entries along a dimension are picked by the numbers in a tensor, which labels do not know."""
        if isinstance(dim, Tensor):  # take_along_dim
            dim, index = index, dim
        index, dim = kwargs.get("index", index), kwargs.get("dim", dim) % inputs.ndim
        if self.varies(inputs, dim):
            return self.unknown(
                node, (inputs, index), f"{op_name(node)} has no rule where it picks channels by numbers in a tensor"
            )
        picked = gathered(inputs, dim, index)
        self.check_index(node, index, picked)
        return picked

    def put(self, node: fx.Node, inputs: Tensor, dim: int, index: Tensor, source: Any, *_: Any, **__: Any) -> object:
        """Entries go along a dimension to where the numbers in a tensor say."""
        if not isinstance(source, Tensor):
            return inputs
        dim %= inputs.ndim
        if self.varies(inputs, dim) or self.varies(source, dim):
            reason = f"{op_name(node)} puts channels where numbers in a tensor say"
            return self.unknown(node, (inputs, index, source), reason)
        put = self.merge([thinned(inputs, [dim]), thinned(source, [dim])])
        self.check_index(node, index, put)
        return put.expand(inputs.shape)

    def picked(self, node: fx.Node, args: tuple, kwargs: dict) -> object:
        """An operation that moves entries by the numbers in tensors, which labels do not know."""
        reason = f"{op_name(node)} has no rule where it picks channels by numbers in a tensor"
        if op_name(node) != "getitem":
            dims = taken_dims(node, None, args, kwargs)
            return self.unknown(node, (args, kwargs), reason) if dims is None else self.taken(node, dims, args[0])
        inputs, index = args[0], args[1] if isinstance(args[1], tuple) else args[1:]
        meta: Any = fx.map_arg(node.args, lambda n: n.meta["val"])
        meta_index = meta[1] if isinstance(meta[1], tuple) else meta[1:]
        nested = any(tensors_in(part) for part in index if not isinstance(part, Tensor))  # bounds of slices, lists
        if nested or any(self.varies(inputs, dim) for dim in indexed_dims(index, meta_index, inputs.ndim)):
            return self.unknown(node, args, reason)
        self.freeze(tensors_in(index), located(node, "is used as an index"))
        return indexed(inputs, index, meta_index, meta[0], node.meta["val"])

    def check_index(self, node: fx.Node, index: Tensor, picked: Tensor) -> None:
        """Numbers that were computed from channels pick for the same channels only."""
        a, b = self.comparable(unexpanded(index)), self.comparable(unexpanded(picked))
        if a.ndim != b.ndim or not bool((a == b).all()):
            self.freeze([index], located(node, f"is used as an index in {op_name(node)}"))

    def spatial(self, node: fx.Node, tables: Tables, inputs: Tensor) -> object:
        """An operation on the last dimensions. Along one that holds several channels, entries may only be moved."""
        taps = tables(inputs.shape)
        dims = range(inputs.ndim - len(taps), inputs.ndim)
        self.check_taken_together(node, inputs, (dim for dim in dims if not self.varies(inputs, dim)))
        for dim, table in zip(dims, taps, strict=True):
            if not self.varies(inputs, dim):
                sizes = [len(table) if d == dim else -1 for d in range(inputs.ndim)]
                inputs = inputs.narrow(dim, 0, 1).expand(sizes)
            elif table.shape[1] == 1:
                none = (table[:, 0] < 0).view([-1 if d == dim else 1 for d in range(inputs.ndim)])
                inputs = inputs.index_select(dim, table[:, 0].clamp_min(0)).masked_fill(none, NO_CHANNEL)
            else:
                return self.unknown(node, inputs, f"{name_of(node)} mixes channels")
        return inputs

    def mixed(self, node: fx.Node, name: str, dims: Sequence[int], inputs: Tensor) -> object:
        """A norm or softmax over some dimensions, which must not hold different channels."""
        self.check_taken_together(node, inputs, dims)
        if any(self.varies(inputs, dim) for dim in dims):
            reason = f"{name} mixes all channels, so that a new one would change the others"
            self.freeze([inputs], located(node, reason))
        return inputs

    def table(self, node: fx.Node, reason: str) -> object:
        """What is looked up in a table, whose width is not known to change."""
        return self.opaque(node, located(node, reason))

    def unknown(self, node: fx.Node, touched: object, reason: str) -> object:
        """Unknown never means pointwise: all that the operation touches freezes."""
        reason = located(node, reason)
        self.freeze(tensors_in(touched), reason)
        return self.opaque(node, reason)


def _sizes(value: object) -> list[torch.Size]:
    return [part.shape for part in tensors_in(value)]


def name_of(node: fx.Node) -> str:
    """What a node's operation is called; of a module, its path."""
    return op_name(node) or str(node.target)


def located(node: fx.Node, reason: str) -> str:
    """A reason with the user's line."""
    line = node.meta.get("source")
    return f"{reason} [{line}]" if line else reason


def moved(node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """What an operation that only moves entries gives."""
    name = op_name(node)
    if name in ("view", "reshape"):
        return reshaped(args[0], torch.empty_like(args[0], device="meta").reshape(*args[1:], **kwargs).shape)
    if name == "view_as_real":
        return args[0].unsqueeze(-1).expand(*args[0].shape, 2)
    if name in ("cat", "concat", "concatenate"):
        return concatenated(*args, **kwargs)
    if name in ("roll", "flip") and not kwargs and is_repeated(args[0], args[-1]):
        return args[0]
    if node.op == "call_module":
        return node.meta["module"](args[0].contiguous())
    return executor(node)(*args, **kwargs)
