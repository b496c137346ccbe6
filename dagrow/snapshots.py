"""What a dag looks like at one time: plain values, to be drawn later."""

from collections.abc import Mapping
from dataclasses import dataclass

import networkx as nx

from dagrow.dag import Dag, Edge

__all__ = ["Activation", "Link", "Snapshot", "growable_widths", "snapshot"]


@dataclass(frozen=True)
class Activation:
    """A node of a dag.

    Attributes:
        name: of the node in the graph.
        label: the axis that it is, where there is one, or "input" or "output".
        width: the units of the axis, or the channels.
    """

    name: str
    label: str
    width: int


@dataclass(frozen=True)
class Link:
    """An edge of a dag, from one activation to another that its output reaches.

    Attributes:
        edge: the layer's name.
        kind: the layer's type.
        source, target: names of activations.
        parameters: of the layer.
    """

    edge: str
    kind: str
    source: str
    target: str
    parameters: int


@dataclass(frozen=True)
class Snapshot:
    """Activations and links of a dag.

    Attributes:
        epoch: after whose growth it was taken, or None for the beginning.
        widths: of the axes that can grow.
    """

    epoch: int | None
    activations: tuple[Activation, ...]
    links: tuple[Link, ...]
    widths: Mapping[str, int]


def snapshot(dag: Dag, epoch: int | None = None) -> Snapshot:
    """The dag as it is now, in plain values."""
    graph, edges = dag.network(), {edge.name: edge for edge in dag.edges}
    links = tuple(
        Link(name, type(edges[name].module).__name__, source, target, _parameters(edges[name]))
        for source, target, name in graph.edges(data="edge")
    )
    activations = tuple(_activation(dag, graph, edges, node) for node in graph.nodes)
    return Snapshot(epoch, activations, links, growable_widths(dag))


def growable_widths(dag: Dag) -> dict[str, int]:
    """Of the axes that can grow."""
    return {axis.name: axis.width for axis in dag.axes if axis.growable}


def _parameters(edge: Edge) -> int:
    return sum(parameter.numel() for parameter in edge.parameters().values())


def _activation(dag: Dag, graph: nx.MultiDiGraph, edges: dict[str, Edge], node: str) -> Activation:
    readers = [edges[name] for _, _, name in graph.out_edges(node, data="edge")]
    writers = [edges[name] for _, _, name in graph.in_edges(node, data="edge")]
    if not readers:
        return Activation(node, "output", max((edge.rule.widths(edge.module)[1] for edge in writers), default=0))
    axes = [axis for axis in dag.axes if readers[0] in axis.consumers]
    if writers and len(axes) == 1:
        return Activation(node, axes[0].name, axes[0].width)
    label = ", ".join(axis.name for axis in axes) if writers else "input"
    return Activation(node, label or node, readers[0].rule.widths(readers[0].module)[0])
