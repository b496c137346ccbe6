"""A graph of operations as a networkx view of activations and weighted layers."""

from collections.abc import Callable, Mapping

import networkx as nx
from torch import fx

from dagrow.placed import Placed

__all__ = ["network"]


def network(graph: fx.Graph, edges: Mapping[fx.Node, Placed]) -> nx.MultiDiGraph:
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
