"""The dag: a view of a model as weighted layers (edges) between activations, and the axes that can widen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any

import networkx as nx
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn

from dagrow.axes import Layout, MisfitError, Widening, group, widen
from dagrow.errors import GrowthError, TraceError
from dagrow.generated import unwritable
from dagrow.labels import Labelling, Rider, label
from dagrow.layers import DEFAULT_RULES, EdgeRule, LayerRule, rule_for
from dagrow.ops import mixed_dims
from dagrow.symbolic import symbolic
from dagrow.trace import Program, record

__all__ = ["Axis", "Dag", "Edge", "render", "tensor_at", "trace"]


@dataclass(frozen=True)
class Edge:
    """A weighted layer ``a = W b``.

    Attributes:
        name: the module's own path in the model.
        module: the layer itself.
        growable: whether an axis that it writes or reads can widen.
        reason: why not, or None.
        shared: why its weights do not act at this place alone, so that no closed form holds for them; or None.
    """

    name: str
    module: nn.Module = field(repr=False, compare=False)
    rule: EdgeRule = field(repr=False, compare=False)
    growable: bool
    reason: str | None
    shared: str | None = None

    def matrix(self, weight: Tensor) -> Tensor:
        """A view of a tensor of the weight's shape as ``[o, i, *kernel]``."""
        dims = self.rule.dims["weight"]
        assert dims[1] is not None
        return weight.movedim((dims[0], dims[1]), (0, 1))

    def parameters(self) -> dict[str, nn.Parameter]:
        """The layer's own weight and bias, by their names in the rule."""
        found = {name: getattr(self.module, name, None) for name in self.rule.dims}
        return {name: p for name, p in found.items() if isinstance(p, nn.Parameter)}

    @property
    def trainable(self) -> bool:
        """Whether its own weights may move."""
        return all(parameter.requires_grad for parameter in self.parameters().values())

    @property
    def bias(self) -> bool:
        return "bias" in self.parameters()


@dataclass(frozen=True)
class Axis:
    """One hidden width: all the channels that must grow together.

    Attributes:
        name: the producers' names.
        width: its number of units (a unit is one channel, or several that can only grow together).
        producers: the edges that write it.
        consumers: the edges that read it.
        riders: what carries one entry per channel on the way.
        growable: whether it can widen.
        reason: why not, or None.
    """

    name: str
    width: int
    producers: tuple[Edge, ...]
    consumers: tuple[Edge, ...]
    riders: tuple[Rider, ...]
    growable: bool
    reason: str | None
    layout: Layout = field(repr=False, compare=False)


class Dag:
    """A model seen as a graph. It holds no weights of its own: ``dag.model`` is the user's model, grown in place."""

    def __init__(self, model: nn.Module, example_inputs: Any, rules: Sequence[LayerRule]) -> None:
        self.model, self.example_inputs, self.rules = model, example_inputs, tuple(rules)
        self.applied: list[Any] = []  #: what undoes the growths applied so far, oldest first
        self.retrace(verified=True)

    def retrace(self, *, verified: bool = False) -> None:
        """Reads edges and axes off the model as it is now."""
        self.__dict__.pop("_unwritable", None)
        self.program: Program = self._read(verified=verified)
        self.labels: Labelling = label(self.graph, self.model, self.rules)
        _freeze_shared(self)
        layouts = group(self.labels)
        reasons = [layout.reason or self._obstacle(layout) for layout in layouts]
        self.edges: tuple[Edge, ...] = tuple(_edges(self, layouts, reasons))
        by_name = {edge.name: edge for edge in self.edges}
        self.axes: tuple[Axis, ...] = tuple(_named(by_name, layouts, reasons))
        self._widths = {edge.name: edge.rule.widths(edge.module) for edge in self.edges}
        self.__dict__.pop("_graph", None)

    def view(self) -> dict[str, Any]:
        """What :meth:`retrace` found out, to be shown again when a growth is undone."""
        return dict(vars(self))

    def show(self, view: dict[str, Any]) -> None:
        for cached in ("_graph", "_unwritable"):
            self.__dict__.pop(cached, None)
        self.__dict__.update(view)

    @property
    def graph(self) -> fx.Graph:
        return self.program.graph

    def edge(self, name: str) -> Edge:
        """The edge with this name. Raises GrowthError if there is none."""
        return _lookup("edge", name, self.edges)

    def axis(self, name: str) -> Axis:
        """The axis with this name. Raises GrowthError if there is none."""
        return _lookup("axis", name, self.axes)

    def rule(self, name: str) -> LayerRule:
        """The rule of a layer of the model."""
        rule = rule_for(self.model.get_submodule(name), self.rules)
        assert rule is not None
        return rule

    def widening(self, axis: Axis, k: int) -> Widening:
        """What changes where when ``axis`` gets ``k`` units wider. Raises GrowthError if it cannot."""
        try:
            return widen(self.graph, self.model, self.rules, self.labels, axis.layout, k)
        except MisfitError as misfit:
            raise GrowthError(
                f"axis {axis.name} cannot grow by {k}: {misfit}. Leave it out, or see print(dag)."
            ) from misfit

    def _obstacle(self, layout: Layout) -> str | None:
        try:
            widening = widen(self.graph, self.model, self.rules, self.labels, layout, 1)
        except MisfitError as misfit:
            return str(misfit)
        return self._unwritable if widening.literals else None

    @cached_property
    def _unwritable(self) -> str | None:
        """Why no forward with other literal sizes can be written from the graph, or None."""
        return unwritable(self.program, lambda: self._read(verified=False))

    def _read(self, *, verified: bool) -> Program:
        given = self.example_inputs
        return symbolic(self.model) if given is None else record(self.model, given, verified=verified)

    def check(self) -> None:
        """Raises GrowthError if layers were replaced or resized by hand since the model was traced."""
        modules = dict(self.model.named_modules())
        for edge in self.edges:
            if modules.get(edge.name) is not edge.module or edge.rule.widths(edge.module) != self._widths[edge.name]:
                raise GrowthError(
                    f"layer {edge.name} of the model was replaced or resized since it was traced; trace it again."
                )

    def network(self) -> nx.MultiDiGraph:
        """A networkx view: nodes are activations that a layer reads (or the output), edges are weighted layers."""
        return self._graph.copy()

    @cached_property
    def _graph(self) -> nx.MultiDiGraph:
        return _network(self.graph, {edge.name for edge in self.edges})

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are traced anew, with the model and without the receipts that could undo growths."""
        return Dag, (self.model, self.example_inputs, self.rules)

    def __repr__(self) -> str:
        growing = sum(axis.growable for axis in self.axes)
        return f"Dag({type(self.model).__name__}, {len(self.edges)} edges, {len(self.axes)} axes, {growing} growable)"

    def describe(self, width: int = 130) -> str:
        """Tables of edges and axes, at most ``width`` columns wide; layers that no rule knows; what tracing fixed."""
        unknown = [f"{name} ({type(module).__name__})" for name, module in self._without_rule()]
        notes = [f"No rule yet for {', '.join(unknown)}: what they touch cannot grow."] if unknown else []
        notes += [f"Fixed while tracing: {text}." for text in self.program.specialisations]
        return "\n".join([render(*_tables(self), width=width), *notes])

    def _without_rule(self) -> Iterator[tuple[str, nn.Module]]:
        """Leaf modules with parameters that are neither edges nor riders."""
        modules = dict(self.model.named_modules())
        for name, node in {str(node.target): node for node in self.graph.nodes if node.op == "call_module"}.items():
            module = modules[name]
            unknown = rule_for(module, self.rules) is None and mixed_dims(node, module, 1) is None
            if unknown and any(True for _ in module.parameters()):
                yield name, module

    def __str__(self) -> str:
        return self.describe()


def trace(model: nn.Module, example_inputs: Any = None, *, rules: Sequence[LayerRule] = ()) -> Dag:
    """Views a model as a dag. Changes nothing.

    Args:
        model: any ``nn.Module``.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Without it the
            model goes through ``torch.fx``, and the example's shape is taken from its first layer.
        rules: layer rules of your own, asked before the built-in ones.

    Raises:
        TraceError: the model cannot be traced, or its graph does not compute what the model computes.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"trace was given a {type(model).__name__}; it takes a torch.nn.Module.")
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise TraceError(
            f"a {type(model).__name__} hides what it computes; trace the model that it was made of, then compile again."
        )
    wrong = [rule for rule in rules if not isinstance(rule, LayerRule)]
    if wrong:
        raise TraceError(f"rules={rules!r}: give a list of instances of dagrow.layers.EdgeRule or RiderRule.")
    return Dag(model, example_inputs, (*rules, *DEFAULT_RULES))


def render(*tables: Table, width: int = 130) -> str:
    """Rich tables as plain text."""
    console = Console(width=width, color_system=None, markup=False, emoji=False)  # names may hold brackets and colons
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    return capture.get().rstrip()


def _edges(dag: Dag, layouts: Sequence[Layout], reasons: Sequence[str | None]) -> Iterator[Edge]:
    modules = dict(dag.model.named_modules())
    for name in dag.labels.rows:
        rule = rule_for(modules[name], dag.rules)
        assert isinstance(rule, EdgeRule)
        around = [(layout, why) for layout, why in zip(layouts, reasons, strict=True)
                  if name in layout.rows or name in layout.columns]  # fmt: skip
        growable = any(why is None for _, why in around)
        causes = [f"its output: {why}" if name in layout.rows else f"its input: {why}" for layout, why in around]
        if not any(name in layout.columns for layout, _ in around):
            causes.insert(0, f"its input: {dag.labels.classes.cause(int(dag.labels.columns[name][0]))}")
        yield Edge(
            name,
            modules[name],
            rule,
            growable,
            None if growable else "; ".join(dict.fromkeys(causes)),
            dag.labels.shared.get(name),
        )


def _named(edges: dict[str, Edge], layouts: Sequence[Layout], reasons: Sequence[str | None]) -> Iterator[Axis]:
    """Axes, named after their producers; a number tells apart those of the same producers."""
    base = ["+".join(layout.rows) for layout in layouts]
    for index, (layout, why) in enumerate(zip(layouts, reasons, strict=True)):
        name = base[index] if base.count(base[index]) == 1 else f"{base[index]}[{base[:index].count(base[index])}]"
        yield Axis(
            name, layout.width, tuple(edges[e] for e in layout.rows), tuple(edges[e] for e in layout.columns),
            tuple(layout.entries), why is None, why, layout,
        )  # fmt: skip


def _freeze_shared(dag: Dag) -> None:
    """Tensors that act at several places cannot grow at one of them."""
    owners: dict[int, list[str]] = {}
    tensors = (*dag.model.named_parameters(remove_duplicate=False), *dag.model.named_buffers(remove_duplicate=False))
    for name, owned in tensors:
        owners.setdefault(id(owned), []).append(name)
    direct = {str(node.target) for node in dag.graph.nodes if node.op == "get_attr"}
    found = dag.labels
    for edge in found.rows:
        rule, module = rule_for(dag.model.get_submodule(edge), dag.rules), dag.model.get_submodule(edge)
        assert isinstance(rule, EdgeRule)
        cause = _sharing(edge, module, rule.dims, owners, direct) or rule.refusal(module)
        if cause:
            found.shared.setdefault(edge, cause)
            found.classes.freeze(found.rows[edge], cause)
            found.classes.freeze(found.columns[edge], cause)
    for rider, labels in found.entries.items():
        owner, _, leaf = rider.name.rpartition(".")
        name, entries = (owner, (leaf,)) if rider.rule is None else (rider.name, rider.entries)
        used = direct - {rider.name}
        cause = _sharing(name, dag.model.get_submodule(name), entries, owners, used)
        if cause:
            found.classes.freeze(labels, cause)


def _sharing(
    name: str, module: nn.Module, entries: Iterable[str], owners: Mapping[int, list[str]], direct: set[str]
) -> str | None:
    """Why one of a module's tensors does not belong to it alone, or None."""
    for entry in entries:
        tensor, path = getattr(module, entry, None), f"{name}.{entry}".lstrip(".")
        if tensor is None:
            continue
        names = owners.get(id(tensor), [])
        if not names:
            return f"{path} is computed, not a parameter"
        if len(names) > 1:
            return f"{path} is shared with {', '.join(other for other in names if other != path)}"
        if direct & set(names):
            return f"{path} is also used directly"
    return None


def tensor_at(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name, which starts with a dot where the model itself is the layer."""
    return attrgetter(name.removeprefix("."))(model)


def _lookup(kind: str, name: str, items: Sequence[Any]) -> Any:
    for item in items:
        if item.name == name:
            return item
    raise GrowthError(
        f"there is no {kind} {name!r} in this dag; it has {', '.join(item.name for item in items) or 'none'}."
    )


def _network(graph: fx.Graph, edges: set[str]) -> nx.MultiDiGraph:
    """Every layer leads from the activation that it reads to every activation that its output reaches unweighted."""

    def is_edge(node: fx.Node) -> bool:
        return node.op == "call_module" and node.target in edges

    read = {node.all_input_nodes[0] for node in graph.nodes if is_edge(node)}
    read |= {node for node in graph.nodes if node.op == "output"}
    network = nx.MultiDiGraph()
    reached = _reachable(graph, read, is_edge)
    for node in graph.nodes:
        if node in read:
            network.add_node(node.name)
        if is_edge(node):
            for target in reached[node]:
                network.add_edge(node.all_input_nodes[0].name, target.name, key=str(node.target), edge=str(node.target))
    return network


def _reachable(graph: fx.Graph, read: set[fx.Node], is_edge: Callable[[fx.Node], bool]) -> dict[fx.Node, list[fx.Node]]:
    """For every node the activations in ``read`` that it reaches without passing a weighted layer."""
    reached: dict[fx.Node, dict[fx.Node, None]] = {}
    for node in reversed(graph.nodes):
        found = {node: None} if node in read else {}
        for user in node.users:
            if not is_edge(user):
                found |= reached[user]
        reached[node] = found
    return {node: list(found) for node, found in reached.items()}


def _tables(dag: Dag) -> tuple[Table, Table]:
    edges = Table("edge", "layer", "reads -> writes", "grows", "why not", title=repr(dag), title_justify="left")
    for edge in dag.edges:
        i, o = edge.rule.widths(edge.module)
        edges.add_row(
            edge.name, type(edge.module).__name__, f"{i} -> {o}", "yes" if edge.growable else "no", edge.reason or ""
        )
    axes = Table("axis", "width", "written by", "read by", "riders", "grows", "why not")
    for axis in dag.axes:
        axes.add_row(
            axis.name, str(axis.width), _names(axis.producers), _names(axis.consumers), _names(axis.riders),
            "yes" if axis.growable else "no", axis.reason or "",
        )  # fmt: skip
    return edges, axes


def _names(items: Sequence[Any]) -> str:
    return ", ".join(item.name for item in items)
