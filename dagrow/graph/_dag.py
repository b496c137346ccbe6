"""The dag: a view of a model as weighted layers (edges) between activations, and the axes that can widen."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import networkx as nx
from torch import fx, nn
from torch.nn.utils import parametrize

from dagrow._model_state import preserve_state
from dagrow._text import render
from dagrow.axes import AxisLayout, CannotWidenError, Labelling, WideningPlan, group, head_axes, labelled, widen
from dagrow.errors import GrowthError, TraceError
from dagrow.graph._edges import Axis, Edge, axes_of, edges_of, in_place
from dagrow.graph._other_mode import OtherMode, in_other_mode, unused
from dagrow.graph._summary import Coverage, count_flops, coverage_of, tables
from dagrow.layers import DEFAULT_RULES, LayerRule, LayerSite, OperationRule, layer_sites, mixed_dims, rule_for
from dagrow.tracing import (
    DynamicSizes,
    PathRecord,
    Program,
    added_paths,
    dynamic_sizes,
    fewer,
    is_opaque,
    record,
    relax,
    symbolic,
    unwritable,
)

Rule = LayerRule | OperationRule


class Applied(list[Any]):
    """The growths of a model that are in place, through whichever dag: what undoes each, oldest first.

    None where nobody can undo it any more.

    Attributes:
        model: held, so that no other model gets its id while this is alive.
        stage: another one after each growth, and the same one again once that is undone.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.stage = model, object()


#: the id of a model -> the list that all its dags share, for as long as there is one
_registers: WeakValueDictionary[int, Applied] = WeakValueDictionary()


class Dag:
    """A model seen as a graph. It holds no weights of its own: ``dag.model`` is the user's model, grown in place."""

    def __init__(self, model: nn.Module, example_inputs: Any, rules: Sequence[Rule]) -> None:
        self.model, self.example_inputs, self.rules = model, example_inputs, tuple(rules)
        self._layer_rules = (*(rule for rule in self.rules if isinstance(rule, LayerRule)), *DEFAULT_RULES)
        self._operations = [rule for rule in self.rules if isinstance(rule, OperationRule)]
        self.applied = _registers.setdefault(id(model), Applied(model))
        self.retrace(verified=True)

    def retrace(self, *, verified: bool = False) -> None:
        """Reads edges and axes off the model as it is now."""
        with self._untouched():
            self._retrace(verified=verified)

    def _untouched(self) -> contextlib.AbstractContextManager[None]:
        """Weights that are computed may write when they are only looked at, as spectral norms do."""
        computed = any(map(parametrize.is_parametrized, self.model.modules()))
        return preserve_state(self.model) if computed else contextlib.nullcontext()

    def _retrace(self, *, verified: bool) -> None:
        self._forget()
        self._stage = self.applied.stage
        self.program: Program = self._read(self.example_inputs, verified=verified)
        layers = layer_sites(self.graph, self.model, self._layer_rules)
        self.layers: dict[fx.Node, LayerSite]
        self.labels: Labelling
        self.layers, self.labels = labelled(self.graph, self.model, layers)
        layouts, reasons = self._layouts()
        self.edges: tuple[Edge, ...] = tuple(edges_of(self.layers, self.labels, layouts, reasons))
        by_name = {edge.name: edge for edge in self.edges}
        new = [branch for branch, *_ in self.added_paths]
        self.axes: tuple[Axis, ...] = tuple(axes_of(by_name, layouts, reasons, new))
        self._widths = {edge.name: edge.rule.widths(edge.module) for edge in self.edges}

    def view(self) -> dict[str, Any]:
        """What :meth:`retrace` found out, to be shown again when a growth is undone."""
        return dict(vars(self))

    def show(self, view: dict[str, Any]) -> None:
        self._forget()
        self.__dict__.update(view)

    def _forget(self) -> None:
        """What was found out when it was asked for."""
        for cached in ("_graph", "unwritable", "dynamic_sizes", "_other", "_elsewhere"):
            self.__dict__.pop(cached, None)

    @property
    def graph(self) -> fx.Graph:
        return self.program.graph

    def edge(self, name: str) -> Edge:
        """The edge with this name. Raises GrowthError if there is none."""
        return _lookup("edge", name, self.edges)

    def axis(self, name: str) -> Axis:
        """The axis with this name. Raises GrowthError if there is none."""
        return _lookup("axis", name, self.axes)

    def layer(self, name: str) -> LayerSite:
        """A layer that a rule knows, by its name."""
        return next(layer for layer in self.layers.values() if layer.name == name)

    @property
    def added_paths(self) -> tuple[PathRecord, ...]:
        """The new layers beside those of the user's, of growths that are in place: names, what they read and write."""
        return added_paths(self.model)

    def widening(self, axis: Axis, k: int) -> WideningPlan:
        """What changes where when ``axis`` gets ``k`` units wider. Raises GrowthError if it cannot."""
        try:
            return widen(self.program, self.layers, axis.layout, k)
        except CannotWidenError as misfit:
            raise GrowthError(
                f"axis {axis.name} cannot grow by {k}: {misfit}. Leave it out, or see print(dag)."
            ) from misfit

    def _layouts(self) -> tuple[list[AxisLayout], list[str | None]]:
        """The axes, those of heads and head widths among them, and why each cannot widen."""
        layouts = group(self.labels)
        reasons = {layout: layout.reason or self._obstacle(layout) for layout in layouts}
        misfits = [layout for layout in layouts if reasons[layout] and not layout.reason]
        if misfits:
            heads, replaced = head_axes(self.program, self.layers, misfits, self._obstacle)
            layouts = [layout for layout in layouts if layout not in replaced] + heads
            layouts.sort(key=lambda layout: int(layout.labels[0]))
        return layouts, [reasons.get(layout) for layout in layouts]

    def _obstacle(self, layout: AxisLayout) -> str | None:
        try:
            widening = widen(self.program, self.layers, layout, 1)
        except CannotWidenError as misfit:
            return str(misfit)
        if widening.written and self.unwritable:
            return f"a size is written into the model's forward, {self.unwritable}"
        return self._elsewhere.obstacle(layout, widening) if self._elsewhere else None

    @cached_property
    def unwritable(self) -> str | None:
        """Why no other forward can be written from the graph, as a clause about the model's own, or None."""
        if self.example_inputs is not None:
            relax(self.program, self.example_inputs)
        return unwritable(self.program, lambda: self._other)

    @cached_property
    def dynamic_sizes(self) -> DynamicSizes:
        """How the sizes of activations follow those of the inputs."""
        return dynamic_sizes(self.program)

    @cached_property
    def _elsewhere(self) -> OtherMode | None:
        """The other mode, if it uses parameters that are not used in this one."""
        left = unused(self.program)
        if not left or isinstance(self._other, str) or unused(self._other) >= left:
            return None
        return OtherMode.of(self._other, self._layer_rules)

    @cached_property
    def _other(self) -> Program | str:
        """The graph in the mode that the model is not in, or why there is none."""
        return in_other_mode(self.model, self._once_more)

    def _once_more(self) -> Program:
        """The graph in the mode that the model is in now, from few samples if the model takes so few."""
        given = self.example_inputs
        try:
            return self._read(given if given is None else fewer(given), verified=False)
        except TraceError:
            return self._read(given, verified=False)

    def _read(self, given: Any, *, verified: bool) -> Program:
        if given is None:
            program = symbolic(self.model, self._named)
        else:
            program = record(self.model, given, verified=verified, closed=self._named)
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for node in program.graph.nodes:
            module = node.meta["module"] = modules[str(node.target)] if node.op == "call_module" else None
            node.meta["kind"] = next((rule.kind for rule in self._operations if rule.covers(node, module)), None)
        return program

    def _named(self, module: nn.Module) -> bool:
        """Whether a rule of the user speaks for the module."""
        own = [rule for rule in self.rules if isinstance(rule, LayerRule)]
        return rule_for(module, own) is not None or any(type(module) in rule.targets for rule in self._operations)

    def check(self) -> None:
        """Raises GrowthError if the model was grown through another dag, or changed by hand, since it was traced."""
        if self.applied.stage is not self._stage:
            raise GrowthError(
                "the model was grown, or a growth of it undone, through another dag since this one was traced; trace "
                "the model again."
            )
        with self._untouched():
            changed = [
                e for e in self.edges if not in_place(e, self.model) or e.rule.widths(e.module) != self._widths[e.name]
            ]
        if changed:
            raise GrowthError(
                f"layer {changed[0].name} of the model was replaced or resized since it was traced; trace it again."
            )

    def network(self) -> nx.MultiDiGraph:
        """A networkx view: nodes are activations that a layer reads (or the output), edges are weighted layers."""
        return self._graph.copy()

    @cached_property
    def _graph(self) -> nx.MultiDiGraph:
        return network(self.graph, {node: layer for node, layer in self.layers.items() if layer.name in self._widths})

    def coverage(self) -> Coverage:
        """Edges and parameters that can grow, and those that cannot and why; print it."""
        return coverage_of(self.edges, self.axes, self.model)

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def flop_count(self) -> int:
        """Floating point operations of one sample's forward pass: of layers, and of products of activations."""
        return count_flops(self.graph, self.layers)

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
        return "\n".join([render(*tables(repr(self), self.edges, self.axes), width=width), *notes])

    def _without_rule(self) -> Iterator[tuple[str, nn.Module]]:
        """Leaf modules with parameters that are neither edges nor riders."""
        modules = dict(self.model.named_modules())
        for name, node in {str(node.target): node for node in self.graph.nodes if node.op == "call_module"}.items():
            module = modules[name]
            unknown = rule_for(module, self._layer_rules) is None and mixed_dims(node, module, 1) is None
            if unknown and any(True for _ in module.parameters()):
                yield name, module

    def __str__(self) -> str:
        return self.describe()


def trace(model: nn.Module, example_inputs: Any = None, *, rules: Sequence[Rule] = ()) -> Dag:
    """Views a model as a dag. Changes nothing.

    Args:
        model: any ``nn.Module``.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Without it the
            model goes through ``torch.fx``, and the example's shape is taken from its first layer.
        rules: of your own, asked before the built-in ones: for types of layers (``EdgeRule``, ``RiderRule``) and for
            operations (``OperationRule``). Modules of your own that they name are not looked into.

    Raises:
        TraceError: the model cannot be traced, or its graph does not compute what the model computes.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"trace was given a {type(model).__name__}; it takes a torch.nn.Module.")
    if is_opaque(model):
        raise TraceError(
            f"a {type(model).__name__} hides what it computes; trace the model that it was made of, then compile again."
        )
    wrong = [rule for rule in rules if not isinstance(rule, (LayerRule, OperationRule))]
    if wrong:
        raise TraceError(
            f"rules={rules!r}: give a list of instances of EdgeRule, RiderRule or OperationRule of dagrow.layers."
        )
    return Dag(model, example_inputs, rules)


def _lookup(kind: str, name: str, items: Sequence[Any]) -> Any:
    for item in items:
        if item.name == name:
            return item
    raise GrowthError(
        f"there is no {kind} {name!r} in this dag; it has {', '.join(item.name for item in items) or 'none'}."
    )


def network(graph: fx.Graph, edges: Mapping[fx.Node, LayerSite]) -> nx.MultiDiGraph:
    """Every layer leads from the activation that it reads to every activation that its output reaches unweighted.

    Args:
        edges: the weighted layers, by their nodes.
    """
    read = {layer.inputs for layer in edges.values()}
    read |= {node for node in graph.nodes if node.op == "output"}
    found = nx.MultiDiGraph()
    reached = _reachable(graph, read, edges.__contains__)
    for node in graph.nodes:
        if node in read:
            found.add_node(node.name)
        if node in edges:
            name = edges[node].name
            for target in reached[node]:
                found.add_edge(edges[node].inputs.name, target.name, key=name, edge=name)
    return found


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
