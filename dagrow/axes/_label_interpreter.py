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

from dagrow._pytree import tensors_in
from dagrow.axes._label_tensors import NO_CHANNEL, concatenated, is_repeated, reshaped, unexpanded
from dagrow.layers import (
    ATTENTION,
    ATTENTION_ARGUMENTS,
    CREATION,
    MODES,
    MOVES,
    PAIRWISE,
    POINTWISE,
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
                values[node] = self.evaluate(node, values)
            except _FAILURES:
                touched = [values[source] for source in node.all_input_nodes]
                values[node] = self.unknown(node, touched, f"operation {op_name(node)} cannot run on labels")

    def evaluate(self, node: fx.Node, values: Values) -> object:
        """The node's value, from those of the nodes before it."""
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
        if isinstance(module, nn.Embedding):
            return self.table(node, f"Embedding ({node.target}) {REFUSALS[nn.Embedding]}")
        no_rule = "has no rule" if len(args) + len(kwargs) == 1 else "has no rule for several arguments"
        reason = next((why for kind, why in REFUSALS.items() if isinstance(module, kind)), no_rule)
        return self.unknown(node, (args, kwargs), f"{type(module).__name__} ({node.target}) {reason}")

    def call_function(self, node: fx.Node, args: tuple, kwargs: dict) -> object:
        name, tensors = op_name(node), tensors_in((args, kwargs))
        if name in MODES:
            return None
        if name in SIZES or not (tensors or name in CREATION | UNIFORM):
            return executor(node)(*args, **kwargs)
        if name in CREATION | UNIFORM:
            return self.created(node, args, kwargs)
        if name in MOVES and not (name == "getitem" and tensors_in(args[1:])):  # labels are no indices
            return self.move(node, args, kwargs)
        if name in POINTWISE and isinstance(args[0], Tensor):
            return args[0] if len(tensors) == 1 or name in ("to", "type_as") else self.merge(tensors)
        if name in PAIRWISE:
            return self.merge(tensors)
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
        if tables is not None and len(tensors) == 1 and isinstance(node.meta["val"], Tensor):
            return self.spatial(node, tables, args[0])
        dims = mixed_dims(node, None, args[0].ndim) if tensors and args and isinstance(args[0], Tensor) else None
        if dims is not None:
            self.freeze(tensors[1:], f"is used in {name}")
            return self.mixed(node, str(name), dims, args[0])
        return self.unknown(node, (args, kwargs), f"operation {name_of(node)} has no rule")

    def created(self, node: fx.Node, args: tuple, kwargs: dict) -> object:
        """A constant, whose shape may follow a width. Channels stay apart in one that is the same everywhere."""
        name = str(op_name(node))
        shaping = {key: value for key, value in kwargs.items() if key not in ("device", "dtype", "generator")}
        constant = executor(node)(*args, **shaping, **_NOWHERE)
        assert isinstance(constant, Tensor)
        if name in UNIFORM:
            return torch.tensor(NO_CHANNEL).expand(constant.shape)
        if constant.shape != node.meta["val"].shape:
            raise RuntimeError(f"the size of what {name} makes follows a width")
        return self.opaque(node, f"is a constant made by {name}")

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
        index = tuple(slice(0, 1) if d in dims else slice(None) for d in range(inputs.ndim))
        result = node.meta["val"]
        value = result if isinstance(result, Tensor) else result[0]
        reduced = inputs[index] if value.ndim == inputs.ndim else inputs[index].squeeze(dims)
        if result is value:
            return reduced
        return type(result)([reduced, torch.tensor(NO_CHANNEL).expand(reduced.shape)])  # values and their indices

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
    if name in ("cat", "concat", "concatenate"):
        return concatenated(*args, **kwargs)
    if name in ("roll", "flip") and not kwargs and is_repeated(args[0], args[-1]):
        return args[0]
    if node.op == "call_module":
        return node.meta["module"](args[0].contiguous())
    return executor(node)(*args, **kwargs)
