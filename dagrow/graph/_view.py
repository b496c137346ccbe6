"""What is read off a model at one time: its program, its layers, and which of its widths can grow."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any
from weakref import ref

import networkx as nx
from torch import fx, nn
from torch.nn.utils import parametrize

from dagrow._model_state import preserve_state
from dagrow.axes import AxisLayout, CannotWidenError, Labelling, WideningPlan, group, head_axes, widen
from dagrow.errors import TraceError
from dagrow.graph._axes import Axis, axes_of
from dagrow.graph._edges import Edge, edges_of, refused
from dagrow.graph._other_mode import OtherMode, in_other_mode, on_labels, under_autocast, unused
from dagrow.graph._unreached import Unreached
from dagrow.layers import DEFAULT_RULES, LayerRule, LayerSite, OperationRule, parameter_products, rule_for
from dagrow.tracing import (
    DynamicSizes,
    Program,
    Trial,
    added_paths,
    autocast_obstacle,
    dynamic_sizes,
    given_number,
    raised_otherwise,
    record,
    relax_guards,
    source,
    statement,
    symbolic,
    two_samples,
    unwritable,
)

Rule = LayerRule | OperationRule


@dataclass(frozen=True, eq=False)
class DagView:
    """A model as it was when it was analysed. A growth gives its dag another view, undo gives the old one back.

    Attributes:
        traced: the model's forward as a graph, its layers and labels.
        widths: edge -> how many channels it reads and writes.
        obstacles: why an axis cannot grow although its channels go together.
        growths: what undoes each growth of the model that was in place, oldest first.
    """

    traced: "_Traced"
    edges: tuple[Edge, ...]
    axes: tuple[Axis, ...]
    widths: Mapping[str, tuple[int, int]]
    obstacles: "Obstacles"
    growths: tuple[ref[Any], ...]

    @property
    def program(self) -> Program:
        """The model's forward as a graph, and those of further examples."""
        return self.traced.program

    @property
    def every_layer(self) -> Mapping[fx.Node, LayerSite]:
        """The layers that a rule knows, by their nodes in all of these."""
        return self.traced.every_layer

    @property
    def layers(self) -> Mapping[fx.Node, LayerSite]:
        """Those in the graph of the first example."""
        return self.traced.layers

    @property
    def labels(self) -> Labelling:
        """Which channels these read and write."""
        return self.traced.labels

    @cached_property
    def dynamic_sizes(self) -> DynamicSizes:
        """How the sizes of activations follow those of the inputs."""
        return dynamic_sizes(self.program)


def analyse(tracer: "Tracer", growths: Sequence[ref[Any]], *, verified: bool = False) -> DagView:
    """Reads edges and axes off a model as it is now.

    Args:
        tracer: of the model.
        growths: what undoes those that are in place.
        verified: whether the graph is compared with the model at another batch size.

    Returns:
        The view.
    """
    model = tracer.model
    with untouched(model):
        program = tracer.program(verified=verified)
        layers, labels = on_labels(program, tracer.layer_rules)
        obstacles = Obstacles(tracer, program, layers)
        reasons = _reasons(labels, obstacles)
        edges = {edge.name: edge for edge in edges_of(layers, labels, reasons)}
        for part in program.every:
            edges |= {edge.name: edge for edge in refused(parameter_products(part.graph, model, layers).values())}
        added = [path for path, *_ in added_paths(model)]
        traced = _Traced(program, layers, labels)
        axes = tuple(axes_of(edges, reasons, added, traced))
        widths = {name: edge.rule.widths(edge.module) for name, edge in edges.items()}
        return DagView(traced, tuple(edges.values()), axes, widths, obstacles, tuple(growths))


@dataclass(frozen=True, eq=False)
class _Traced:
    """What axes are read off."""

    program: Program
    every_layer: Mapping[fx.Node, LayerSite]
    labels: Labelling

    @cached_property
    def layers(self) -> Mapping[fx.Node, LayerSite]:
        """Those in the graph of the first example."""
        return {node: layer for node, layer in self.every_layer.items() if node.graph is self.program.graph}


def untouched(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Weights that are computed may write when they are only looked at, as spectral norms do."""
    computed = any(map(parametrize.is_parametrized, model.modules()))
    return preserve_state(model) if computed else contextlib.nullcontext()


@dataclass(frozen=True, eq=False)
class Tracer:
    """Writes down the forward of a model, in whatever mode the model is.

    Attributes:
        model: the user's own.
        example_inputs: of the call that is measured; None where there are none.
        also: example inputs of other calls.
        rules: the user's own.
    """

    model: nn.Module
    example_inputs: object
    also: tuple[object, ...]
    rules: tuple[Rule, ...]

    @property
    def examples(self) -> tuple[object, ...]:
        """Of all calls, the one that is measured first."""
        return self.example_inputs, *self.also

    @property
    def layer_rules(self) -> tuple[LayerRule, ...]:
        """The user's own first."""
        return (*(rule for rule in self.rules if isinstance(rule, LayerRule)), *DEFAULT_RULES)

    def program(self, *, verified: bool) -> Program:
        """The program, from the example inputs, with those of the other calls."""
        also = tuple(self._program(example, verified=verified) for example in self.also)
        return replace(self._program(self.example_inputs, verified=verified), also=also)

    def quickly(self) -> Program:
        """The same, from few samples if the model takes so few."""
        return replace(self._quickly(self.example_inputs), also=tuple(map(self._quickly, self.also)))

    def _quickly(self, example_inputs: object) -> Program:
        try:
            few = None if example_inputs is None else two_samples(example_inputs)
            return self._program(few, verified=False)
        except TraceError:
            return self._program(example_inputs, verified=False)

    def raised(self, program: Program, number: int, trial: Trial) -> Exception | None:
        """What the forward raises by itself at other sizes, on the example inputs or the others with a number."""
        return raised_otherwise(program, self.examples[number], trial, self._is_known)

    def _program(self, example_inputs: object, *, verified: bool) -> Program:
        if example_inputs is None:
            program = symbolic(self.model, self._is_known)
        else:
            program = record(self.model, example_inputs, verified=verified, closed=self._is_known)
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for node in program.graph.nodes:
            module = node.meta["module"] = modules[str(node.target)] if node.op == "call_module" else None
            operations = (rule for rule in self.rules if isinstance(rule, OperationRule))
            node.meta["kind"] = next((rule.kind for rule in operations if rule.covers(node, module)), None)
        return program

    def _is_known(self, module: nn.Module) -> bool:
        """Whether a rule of the user speaks for the module."""
        own = [rule for rule in self.rules if isinstance(rule, LayerRule)]
        operations = [rule for rule in self.rules if isinstance(rule, OperationRule)]
        return rule_for(module, own) is not None or any(type(module) in rule.targets for rule in operations)


@dataclass(frozen=True, eq=False)
class Obstacles:
    """Why an axis cannot grow although its channels go together."""

    tracer: Tracer
    program: Program
    every_layer: Mapping[fx.Node, LayerSite]

    def obstacle(self, layout: AxisLayout) -> str | None:
        """Why the axis cannot widen by one unit, or None."""
        try:
            widening = widen(self.program, self.every_layer, layout, 1)
        except CannotWidenError as misfit:
            return str(misfit)
        raised = self.raised(widening)
        if raised:
            return raised
        if widening.written and self.unwritable:
            return f"a size is written into the model's forward, {self.unwritable}"
        in_other_mode = self._other_mode.obstacle(layout, widening) if self._other_mode else None
        return in_other_mode or self.unreached.obstacle(layout, self.every_layer)

    @cached_property
    def unreached(self) -> Unreached:
        """What no example runs, in no mode."""
        idle = self._idle
        if idle and not isinstance(self._other_program, str):
            idle = idle & unused(self._other_program)
        return Unreached(self.program.model, idle, self.tracer.layer_rules)

    @cached_property
    def _idle(self) -> set[str]:
        """Parameters and buffers of numbers that are not used in this mode."""
        return unused(self.program)

    def raised(self, widening: WideningPlan) -> str | None:
        """What the model's forward raises at the widths of a plan, by an assertion or a branch of its own; or None."""
        for number, trial in widening.trials:
            if self.tracer.example_inputs is None:
                return "a comparison in the model's forward would come out otherwise; give trace example inputs"
            error = self.tracer.raised(self.program.every[number], number, trial)
            if error is not None:
                return f"the model's forward would raise {statement(error)} [{source(error)}]"
        return None

    @cached_property
    def unwritable(self) -> str | None:
        """Why no other forward can be written from the graph, as a clause about the model's own, or None."""
        for number, (example, program) in enumerate(zip(self.tracer.examples, self.program.every, strict=True)):
            if example is not None:
                relax_guards(program, example)
            why = unwritable(program, partial(_part, number, lambda: self._other_program))
            why = why or autocast_obstacle(program, _part(number, lambda: self._cast_program))
            if why:
                return f"{why}, on also[{number - 1}]" if number else why
        return given_number(self.program)

    @cached_property
    def _cast_program(self) -> Program | str:
        """The graph with autocast switched, or why there is none."""
        return under_autocast(self.program.model, self.tracer.quickly)

    @cached_property
    def _other_mode(self) -> OtherMode | None:
        """The other mode, if it uses parameters that are not used in this one."""
        if not self._idle or isinstance(self._other_program, str) or unused(self._other_program) >= self._idle:
            return None
        return OtherMode.of(self._other_program, self.tracer.layer_rules)

    @cached_property
    def _other_program(self) -> Program | str:
        """The graph in the mode that the model is not in, or why there is none."""
        return in_other_mode(self.program.model, self.tracer.quickly)


def _part(number: int, program: Callable[[], Program | str]) -> Program | str:
    """That of one example."""
    whole = program()
    return whole if isinstance(whole, str) else whole.every[number]


def _reasons(labels: Labelling, obstacles: Obstacles) -> dict[AxisLayout, str | None]:
    """The axes, those of heads and head widths among them, and why each cannot widen, or None."""
    layouts = group(labels)
    reasons = {layout: layout.reason or obstacles.obstacle(layout) for layout in layouts}
    misfits = [layout for layout in layouts if reasons[layout] and not layout.reason]
    if misfits:
        heads, replaced = head_axes(obstacles.program, obstacles.every_layer, misfits, obstacles.obstacle)
        layouts = [layout for layout in layouts if layout not in replaced] + heads
        layouts.sort(key=lambda layout: int(layout.labels[0]))
    return {layout: reasons.get(layout) for layout in layouts}


def network(graph: fx.Graph, edges: Mapping[fx.Node, LayerSite]) -> nx.MultiDiGraph:
    """Every layer leads from the activation that it reads to every activation that its output reaches unweighted.

    Args:
        graph: of the model.
        edges: the weighted layers, by their nodes.

    Returns:
        A graph with the activations that edges read, and the output, as nodes.
    """
    read = {layer.inputs for layer in edges.values()}
    read |= {node for node in graph.nodes if node.op == "output"}
    drawing = nx.MultiDiGraph()
    reached = _reachable(graph, read, edges.__contains__)
    for node in graph.nodes:
        if node in read:
            drawing.add_node(node.name)
        if node in edges:
            name = edges[node].name
            for target in reached[node]:
                drawing.add_edge(edges[node].inputs.name, target.name, key=name, edge=name)
    return drawing


def _reachable(graph: fx.Graph, read: set[fx.Node], is_edge: Callable[[fx.Node], bool]) -> dict[fx.Node, list[fx.Node]]:
    """For every node the activations in ``read`` that it reaches without passing a weighted layer."""
    reached: dict[fx.Node, dict[fx.Node, None]] = {}
    for node in reversed(graph.nodes):
        targets = {node: None} if node in read else {}
        for user in node.users:
            if not is_edge(user):
                targets |= reached[user]
        reached[node] = targets
    return {node: list(targets) for node, targets in reached.items()}
