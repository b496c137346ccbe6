"""The dag: a view of a model as weighted layers (edges) between activations, and the axes that can widen."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, TypeVar
from weakref import ref

import networkx as nx
from torch import Tensor, fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from dagrow._text import Printable, render
from dagrow.axes import CannotWidenError, Labelling, WideningPlan, narrow, widen
from dagrow.errors import GrowthError, TraceError
from dagrow.graph._axes import Axis
from dagrow.graph._edges import Edge, replaced_in
from dagrow.graph._owners import check_unwrapped
from dagrow.graph._summary import Coverage, count_flops, coverage_of, tables, without_rule
from dagrow.graph._view import DagView, Rule, Tracer, analyse, network, untouched
from dagrow.layers import LayerRule, LayerSite, OperationRule
from dagrow.tracing import DynamicSizes, PathRecord, Program, added_paths, is_opaque

T = TypeVar("T", Edge, Axis)
#: model -> weak references to what undoes each growth of it that is in place, through whichever dag, oldest first
_growths: MutableMapping[nn.Module, list[ref[Any]]] = WeakIdKeyDictionary()


class Dag(Printable):
    """A model seen as a graph. It holds no weights of its own: ``dag.model`` is the user's model, grown in place.

    Attributes:
        model: the user's own.
        example_inputs: what it was traced with.
        also: further examples, of other calls.
        rules: the user's own.
        view: all that was read off the model, as it is since the last growth.
        undos: what undoes the growths of the transaction that is open, oldest first; None where none is.
    """

    def __init__(
        self, model: nn.Module, example_inputs: object, rules: Sequence[Rule], also: Sequence[object] = ()
    ) -> None:
        self.model, self.example_inputs, self.rules, self.also = model, example_inputs, tuple(rules), tuple(also)
        self._tracer = Tracer(model, example_inputs, self.also, self.rules)
        self._growths = _growths.setdefault(model, [])
        self.undos: list[Any] | None = None
        self.view: DagView = analyse(self._tracer, self._growths, verified=True)

    @property
    def program(self) -> Program:
        """The model's forward as a graph that runs."""
        return self.view.program

    @property
    def layers(self) -> Mapping[fx.Node, LayerSite]:
        """The layers that a rule knows, by their nodes."""
        return self.view.layers

    @property
    def labels(self) -> Labelling:
        """Which channels these read and write."""
        return self.view.labels

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The weighted layers."""
        return self.view.edges

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The hidden widths."""
        return self.view.axes

    @property
    def unwritable(self) -> str | None:
        """Why no other forward can be written from the graph, as a clause about the model's own, or None."""
        return self.view.obstacles.unwritable

    @property
    def dynamic_sizes(self) -> DynamicSizes:
        """How the sizes of activations follow those of the inputs."""
        return self.view.dynamic_sizes

    @property
    def applied(self) -> list[Any]:
        """What undoes each growth of the model that is in place, through whichever dag, oldest first.

        None where nobody can undo it any more.
        """
        return [growth() for growth in self._growths]

    def add_growth(self, undo: object) -> None:
        """Notes a growth that is in place now, and reads edges and axes off the grown model."""
        self._growths.append(ref(undo))
        if self.undos is not None:
            self.undos.append(undo)
        self.view = analyse(self._tracer, self._growths)

    def remove_growth(self, undo: object, view: DagView) -> None:
        """Shows an earlier view again, as a growth has been undone. May run twice."""
        self.view = view
        if ref(undo) in self._growths:
            self._growths.remove(ref(undo))

    def edge(self, name: str) -> Edge:
        """The edge with this name.

        Args:
            name: the path of the layer in the model.

        Returns:
            The edge.

        Raises:
            GrowthError: there is none.
        """
        return _lookup("edge", name, self.edges)

    def axis(self, name: str) -> Axis:
        """The axis with this name.

        Args:
            name: those of its oldest producers, joined by ``+``.

        Returns:
            The axis.

        Raises:
            GrowthError: there is none.
        """
        return _lookup("axis", name, self.axes)

    def layer(self, name: str) -> LayerSite:
        """A layer that a rule knows, by its name."""
        return next(layer for layer in self.layers.values() if layer.name == name)

    @property
    def added_paths(self) -> tuple[PathRecord, ...]:
        """The new layers beside those of the user's, of growths that are in place: names, what they read and write."""
        return added_paths(self.model)

    def widening(self, axis: Axis, k: int) -> WideningPlan:
        """Plans what changes where when an axis widens.

        Args:
            axis: one of this dag.
            k: by how many units.

        Returns:
            The plan.

        Raises:
            GrowthError: the axis cannot grow so.
        """
        try:
            plan = widen(self.program, self.view.every_layer, axis.layout, k)
        except CannotWidenError as misfit:
            raise GrowthError(
                f"axis {axis.name} cannot grow by {k}: {misfit}. Leave it out, or see print(dag)."
            ) from misfit
        raised = self.view.obstacles.raised(plan)
        if raised:
            raise GrowthError(f"axis {axis.name} cannot grow by {k}: {raised}. Give a number that the model takes.")
        return plan

    def narrowing(self, axis: Axis, units: Tensor) -> WideningPlan:
        """Plans what changes where when units of an axis go.

        Args:
            axis: one of this dag.
            units: those that go, each once ``[k]``, from 0 on; not all.

        Returns:
            The plan, whose maps drop entries.

        Raises:
            GrowthError: the axis cannot do without them.
        """
        try:
            return narrow(self.program, self.view.every_layer, axis.layout, units)
        except CannotWidenError as misfit:
            raise GrowthError(
                f"axis {axis.name} cannot lose {len(units)} of its units: {misfit}. Leave it out, or see print(dag)."
            ) from misfit

    def check(self) -> None:
        """Makes sure that the model is still the one that was traced.

        Raises:
            GrowthError: it was grown through another dag, or changed by hand.
        """
        if tuple(self._growths) != self.view.growths:
            raise GrowthError(
                "the model was grown, or a growth of it undone, through another dag since this one was traced; trace "
                "the model again."
            )
        with untouched(self.model):
            changed = next(replaced_in(self.edges, self.model), None) or next(
                (edge for edge in self.edges if edge.rule.widths(edge.module) != self.view.widths[edge.name]), None
            )
        if changed is not None:
            raise GrowthError(
                f"layer {changed.name} of the model was replaced or resized since it was traced; trace it again."
            )

    def network(self) -> nx.MultiDiGraph:
        """A networkx view: nodes are activations that a layer reads (or the output), edges are weighted layers."""
        edges = {node: layer for node, layer in self.layers.items() if layer.name in self.view.widths}
        return network(self.program.graph, edges)

    def coverage(self) -> Coverage:
        """Edges and parameters that can grow, and those that cannot and why; print it."""
        return coverage_of(self.edges, self.axes, self.model)

    def parameter_count(self) -> int:
        """Of the whole model, each parameter once."""
        return sum(p.numel() for p in self.model.parameters())

    def flop_count(self) -> int:
        """Floating point operations of one sample's forward pass: of layers, and of products of activations."""
        return count_flops(self.program.graph, self.layers)

    def __reduce__(self) -> tuple[object, ...]:
        """Copies and pickles are traced anew, with the model and without the receipts that could undo growths."""
        return Dag, (self.model, self.example_inputs, self.rules, self.also)

    def __repr__(self) -> str:
        growing = sum(axis.growable for axis in self.axes)
        return f"Dag({type(self.model).__name__}, {len(self.edges)} edges, {len(self.axes)} axes, {growing} growable)"

    def describe(self, width: int = 130) -> str:
        """What ``print(dag)`` shows: tables of edges and axes; layers that no rule knows; what tracing fixed.

        Args:
            width: of the tables, in columns of text, at most.

        Returns:
            The text.
        """
        unknown = without_rule(self.program, self._tracer.layer_rules)
        notes = [f"No rule yet for {', '.join(unknown)}: what they touch cannot grow."] if unknown else []
        idle = ", ".join(self.view.obstacles.unreached.names)
        notes += [f"No example runs {idle}: an axis that they may read or write cannot grow."] if idle else []
        notes += [f"Fixed while tracing: {text}." for text in self.program.specialisations]
        return "\n".join([render(*tables(repr(self), self.edges, self.axes), width=width), *notes])

    def __str__(self) -> str:
        return self.describe()


def trace(
    model: nn.Module, example_inputs: object = None, *, also: Sequence[object] = (), rules: Sequence[Rule] = ()
) -> Dag:
    """Views a model as a dag. Changes nothing.

    Args:
        model: any ``nn.Module``.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Without it the
            model goes through ``torch.fx``, and the example's shape is taken from its first layer.
        also: a list of further examples, each given like ``example_inputs``, of calls that run other parts of the model
            (a head of another task, an optional input, a flag). What they show is united: an axis has the layers
            that write and read it in any of them, and growing it keeps the function of all of these calls. Measured
            is what the first example runs; new weights of layers that only others run start at zero.
        rules: of your own, asked before the built-in ones: for types of layers (``EdgeRule``, ``RiderRule``) and for
            operations (``OperationRule``). Modules of your own that they name are not looked into.

    Returns:
        The dag, of which ``dag.model`` is the model itself.

    Raises:
        TraceError: the model cannot be traced, or its graph does not compute what the model computes.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"trace was given a {type(model).__name__}; it takes a torch.nn.Module.")
    if is_opaque(model):
        raise TraceError(
            f"a {type(model).__name__} hides what it computes; trace the model that it was made of, then compile again."
        )
    check_unwrapped(model)
    others = [rule for rule in rules if not isinstance(rule, (LayerRule, OperationRule))]
    if others:
        raise TraceError(
            f"rules={rules!r}: give a list of instances of EdgeRule, RiderRule or OperationRule of dagrow.layers."
        )
    return Dag(model, example_inputs, rules, _checked(also, example_inputs))


def _checked(also: object, example_inputs: object) -> tuple[object, ...]:
    if not isinstance(also, (list, tuple)):
        raise TraceError(f"also= was given a {type(also).__name__}; give a list of examples, also=[example, ...].")
    if also and example_inputs is None:
        raise TraceError("also= was given without example_inputs; give the example of the call to measure first.")
    return tuple(also)


def _lookup(kind: str, name: str, items: Sequence[T]) -> T:
    for item in items:
        if item.name == name:
            return item
    raise GrowthError(
        f"there is no {kind} {name!r} in this dag; it has {', '.join(item.name for item in items) or 'none'}."
    )
