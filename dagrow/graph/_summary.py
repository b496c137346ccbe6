"""What a dag says of itself: tables of edges and axes, how much can grow and why the rest cannot, and its FLOPs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from rich.table import Table
from torch import Tensor, fx, nn

from dagrow._text import Printable, render
from dagrow.axes import Rider
from dagrow.graph._axes import Axis
from dagrow.graph._edges import Edge
from dagrow.layers import (
    ATTENTION,
    ATTENTION_ARGUMENTS,
    Contraction,
    LayerRule,
    LayerSite,
    contraction,
    mixed_dims,
    op_name,
    rule_for,
)
from dagrow.tracing import Program


def tables(title: str, edges: Sequence[Edge], axes: Sequence[Axis]) -> tuple[Table, Table]:
    """A table of edges and a table of axes."""
    edge_table = Table("edge", "layer", "reads -> writes", "grows", "why not", title=title, title_justify="left")
    for edge in edges:
        inputs, outputs = edge.rule.widths(edge.module)
        kind, grows = type(edge.module).__name__, "yes" if edge.growable else "no"
        edge_table.add_row(edge.name, kind, f"{inputs} -> {outputs}", grows, edge.reason or "")
    axis_table = Table("axis", "width", "written by", "read by", "riders", "grows", "new units", "why not")
    for axis in axes:
        beside = (_names(axis.producers), _names(axis.consumers), _names(axis.riders))
        grows, why = "yes" if axis.growable else "no", axis.reason or axis.other_inits.get("optimal", "")
        axis_table.add_row(axis.name, str(axis.width), *beside, grows, _starts(axis), why)
    return edge_table, axis_table


def _starts(axis: Axis) -> str:
    """What new units start as: the best there is."""
    measured = next((init for init in ("optimal", "random") if init in axis.inits), None)
    return measured or ", ".join(axis.inits)


def _names(items: Sequence[Edge] | Sequence[Rider]) -> str:
    return ", ".join(item.name for item in items)


def without_rule(program: Program, rules: Sequence[LayerRule]) -> list[str]:
    """Modules with parameters, and their types, that no rule knows."""
    nodes = {str(node.target): node for node in program.graph.nodes if node.op == "call_module"}
    modules = {name: (node, program.model.get_submodule(name)) for name, node in nodes.items()}
    unknown = [
        f"{name} ({type(module).__name__})"
        for name, (node, module) in modules.items()
        if rule_for(module, rules) is None
        and mixed_dims(node, module, 1) is None
        and any(True for _ in module.parameters())
    ]
    packed = [  # weights that are no parameters
        f"{name} (quantised {type(module).__name__})"
        for name, module in program.model.named_modules()
        if hasattr(module, "_packed_params") and hasattr(module, "weight") and "quantized" in type(module).__module__
    ]
    return unknown + packed


@dataclass(frozen=True)
class Coverage(Printable):
    """Layers and parameters that can grow, and those that cannot.

    Attributes:
        growable: layer that writes, reads or carries an axis that can widen -> its parameters.
        frozen: edge that does not -> its parameters.
        reasons: why not, with the operation and the user's line -> the edges that it freezes, most parameters first.
        other: all other parameters of the model: norms, embeddings, biases used directly, layers that do not run.
    """

    growable: Mapping[str, int]
    frozen: Mapping[str, int]
    reasons: Mapping[str, tuple[str, ...]]
    other: int

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(self.growable.values()) + sum(self.frozen.values()) + self.other

    @property
    def share(self) -> float:
        """The part of all parameters that lies in layers that can grow."""
        return sum(self.growable.values()) / max(1, self.parameters)

    def __str__(self) -> str:
        title = f"{self.share:.1%} of {self.parameters} parameters lie in layers that can grow"
        table = Table("", "layers", "parameters", title=title, title_justify="left")
        table.add_row("can grow", str(len(self.growable)), str(sum(self.growable.values())))
        table.add_row("cannot grow", str(len(self.frozen)), str(sum(self.frozen.values())))
        table.add_row("other", "", str(self.other))
        why = Table("why not", "layers", "parameters")
        for reason, edges in self.reasons.items():
            why.add_row(reason, ", ".join(edges), str(sum(self.frozen[edge] for edge in edges)))
        return render(table, why) if self.reasons else render(table)


def coverage_of(edges: Sequence[Edge], axes: Sequence[Axis], model: nn.Module) -> Coverage:
    """Counts each parameter once."""
    counted: set[int] = set()

    def own(parameters: Iterable[Tensor | None]) -> int:
        uncounted = {id(p): p for p in parameters if isinstance(p, nn.Parameter) and id(p) not in counted}
        counted.update(uncounted)
        return sum(parameter.numel() for parameter in uncounted.values())

    growable = {edge.name: own(edge.parameters().values()) for edge in edges if edge.growable}
    for rider in {rider.name: rider for axis in axes if axis.growable for rider in axis.riders}.values():
        if rider.module is not None:
            growable[rider.name] = own(getattr(rider.module, entry) for entry, _ in rider.paths)
    frozen = {edge.name: own(edge.parameters().values()) for edge in edges if not edge.growable}
    reasons: dict[str, tuple[str, ...]] = {}
    for edge in sorted(edges, key=lambda edge: -frozen.get(edge.name, 0)):
        if edge.reason is not None:
            reasons[edge.reason] = (*reasons.get(edge.reason, ()), edge.name)
    ordered = dict(sorted(reasons.items(), key=lambda item: -sum(frozen[name] for name in item[1])))
    other = sum(p.numel() for p in model.parameters() if id(p) not in counted)
    return Coverage(growable, frozen, ordered, other)


def count_flops(graph: fx.Graph, layers: Mapping[fx.Node, LayerSite]) -> int:
    """Floating point operations for one sample of the example; a multiplication and an addition are two.

    Counted are layers with a rule (each entry of a matrix or kernel once per position and call) and products of two
    activations: matmul, einsum and attention. Nothing else is: norms, activations, and layers without a rule, such as
    recurrent ones. So counts ``torch.utils.flop_counter`` as well, but it has to run the model.

    Args:
        graph: with the shapes of all activations.
        layers: those with a rule, by their nodes.

    Returns:
        The number of operations.
    """
    total = sum(_of_layer(node, layers[node]) if node in layers else _of_product(node) for node in graph.nodes)
    return total // _samples(graph)


def weight_uses(graph: fx.Graph, layers: Mapping[fx.Node, LayerSite]) -> dict[str, int]:
    """How often each entry of a weight is used for one sample of the example, over all calls.

    Args:
        graph: with the shapes of all activations.
        layers: those with a rule, by their nodes.

    Returns:
        The number of uses, by the name of the weight.
    """
    uses: dict[str, int] = {}
    for node, layer in layers.items():
        uses[layer.path("weight")] = uses.get(layer.path("weight"), 0) + _positions(node, layer)
    return {weight: count // _samples(graph) for weight, count in uses.items()}


def _positions(node: fx.Node, layer: LayerSite) -> int:
    return int(layer.rule.positions(layer.inputs.meta["val"], node.meta["val"]))


def _of_layer(node: fx.Node, layer: LayerSite) -> int:
    weight = getattr(layer.module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        return 0
    return 2 * weight.numel() * _positions(node, layer)


def _of_product(node: fx.Node) -> int:
    name = op_name(node) if node.op in ("call_function", "call_method") else None
    if name == ATTENTION:
        return _of_attention(node)
    operands = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in node.args]
    product = contraction(name, operands)
    return 0 if product is None else _of_contraction(product, *(x for x in operands if isinstance(x, Tensor)))


def _of_attention(node: fx.Node) -> int:
    """Scores of queries and keys, and the values that they weigh."""
    arguments: dict[str, Any] = {**dict(zip(ATTENTION_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    query, key, value = (arguments[name].meta["val"] for name in ATTENTION_ARGUMENTS[:3])
    return 2 * query.shape[:-1].numel() * int(key.shape[-2]) * int(query.shape[-1] + value.shape[-1])


def _of_contraction(product: Contraction, left: Tensor, right: Tensor) -> int:
    sizes = [dict(zip(product.left, left.shape, strict=True)), dict(zip(product.right, right.shape, strict=True))]
    return 2 * prod(max(int(size.get(letter, 1)) for size in sizes) for letter in product.out + product.summed)


def _samples(graph: fx.Graph) -> int:
    """Of the example: the first dimension of its first tensor."""
    values = [node.meta["val"] for node in graph.nodes if node.op == "placeholder"]
    sizes = [int(value.shape[0]) for value in values if isinstance(value, Tensor) and value.ndim]
    return max(1, sizes[0]) if sizes else 1
