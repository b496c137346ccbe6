"""What happened in one step of growing, and what a dag looks like at one time, as plain values."""

import networkx as nx

from dagrow.graph import Dag, Edge
from dagrow.pictures import Activation, Grown, Link, Snapshot
from dagrow.surgery import Receipt


def grown_of(receipt: Receipt) -> Grown:
    """What a receipt of one growth says, in plain values."""
    growth = receipt.growth
    assert growth is not None
    return Grown(
        receipt.where,
        repr(growth.operator),
        receipt.neurons,
        receipt.gain,
        growth.heldout_gain,
        receipt.gamma,
        receipt.loss_before,
        receipt.loss_after,
        growth.cost.parameters,
        growth.cost.flops,
        growth.heldout_error,
        growth.p_value,
    )


def snapshot_of(dag: Dag, epoch: int | None = None) -> Snapshot:
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
