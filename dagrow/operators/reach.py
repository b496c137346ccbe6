"""Where new paths can be laid: from an activation to a pre-activation that does not lead to it, or to itself."""

import operator
from collections.abc import Iterator, Sequence

from torch import fx

from dagrow.branches import crossed, dependent
from dagrow.dag import Dag, Edge
from dagrow.errors import GrowthError
from dagrow.generated import branches_of
from dagrow.layers.linear import LinearRule
from dagrow.operators.links import Link, Loop
from dagrow.patches import Geometry

__all__ = ["links", "loops", "refuse_unwritable"]


def refuse_unwritable(dag: Dag) -> None:
    """Raises GrowthError for a model whose forward cannot be written with a new path in it."""
    if dag.unwritable:
        raise GrowthError(
            f"no new path can be added to this {type(dag.model).__name__}: its forward would have to be written anew, "
            f"but it has one {dag.unwritable}. Widths can still grow, with AddNeurons."
        )


def links(dag: Dag, kernel: int = 1, targets: Sequence[str] | None = None, *, known: bool = False) -> list[Link]:
    """Every pair of an activation and a pre-activation that a new path could join without a cycle.

    Args:
        kernel: the smallest kernel of new convolutions; larger where the grids fit no other way.
        targets: names of layers whose pre-activations are meant; all by default.
        known: whether activations are offered to pre-activations that read them already.

    Raises GrowthError for a target that no path can lead to.
    """
    nodes = {layer.name: node for node, layer in dag.layers.items()}
    edges = [edge for edge in dag.edges if not edge.shared]
    new = {branch for branch, *_ in branches_of(dag.model)}
    found: list[Link] = []
    for members in _summed(edges, nodes):
        # the user's own layers come first, then new hidden layers, then new connections
        target = min(members, key=lambda edge: (edge.name.partition(".")[0] in new, edge.name in new))
        writing = nodes[target.name]
        beyond = {writing} | dependent(writing)
        heard = {edge.layer.inputs for edge in members}
        for reader in _readers(edges):
            source, reading = reader.layer.inputs, nodes[reader.name]
            if source in beyond or (source in heard and not known) or _unsafe(dag, reading, writing):
                continue
            form = _form(source, reader, target, writing, kernel)
            if form is not None:
                found.append(Link(dag, reader, source, reading, target, writing, members, *form))
    return found if targets is None else _meant(dag, found, targets)


def loops(dag: Dag, kernel: int = 1) -> list[Loop]:
    """Every activation that a residual block can be put on."""
    edges = [edge for edge in dag.edges if not edge.shared]
    found: list[Loop] = []
    for reader in _readers(edges):
        source = reader.layer.inputs
        form = _form(source, reader, reader, source, kernel)
        if source.op != "placeholder" and form is not None and not any(source is loop.source for loop in found):
            found.append(Loop(dag, reader, source, source.next, reader, source, (), *form))
    return found


def _meant(dag: Dag, found: Sequence[Link], targets: Sequence[str]) -> list[Link]:
    reached = {edge.name for link in found for edge in link.members}
    missing = [name for name in targets if dag.edge(name).name not in reached]
    if missing:
        why = next((edge.shared for edge in map(dag.edge, missing) if edge.shared), None)
        raise GrowthError(
            f"no new path can lead to {', '.join(missing)}: "
            + (why or "all that comes before is read there already, or has another number of positions")
            + ". Leave it out of targets=."
        )
    return [link for link in found if {edge.name for edge in link.members} & set(targets)]


def _readers(edges: Sequence[Edge]) -> Iterator[Edge]:
    """For each activation the first layer that reads it, of each kind."""
    seen = set()
    for edge in edges:
        key = edge.layer.inputs, type(edge.rule)
        if key not in seen:
            seen.add(key)
            yield edge


def _summed(edges: Sequence[Edge], nodes: dict[str, fx.Node]) -> list[tuple[Edge, ...]]:
    """Layers by the pre-activation that they write, alone or as terms of a sum."""
    groups: dict[fx.Node, list[Edge]] = {}
    for edge in edges:
        groups.setdefault(_sum(nodes[edge.name]), []).append(edge)
    return [tuple(group) for group in groups.values()]


def _sum(node: fx.Node) -> fx.Node:
    """The sum that a node is a term of, and of nothing else."""
    while len(node.users) == 1:
        (user,) = node.users
        terms = [arg for arg in user.args if isinstance(arg, fx.Node)]
        shapes = {getattr(term.meta.get("val"), "shape", None) for term in (node, user, *terms)}
        if user.target is not operator.add or len(set(terms)) != 2 or len(shapes) != 1:
            return node
        node = user
    return node


def _unsafe(dag: Dag, reading: fx.Node, writing: fx.Node) -> bool:
    """Whether what runs between them could not run later: it works in place, or switches modes."""
    modules = dict(dag.model.named_modules())
    for node in crossed(writing, reading):
        name = getattr(node.target, "__name__", str(node.target))
        inside = node.op == "call_module" and getattr(modules[str(node.target)], "inplace", False)
        written = node.op != "call_module" and (name.endswith("_") or name.startswith("i") or "set" in name)
        if inside or written or "autocast" in name:
            return True
    return False


def _form(
    source: fx.Node, reader: Edge, target: Edge, writing: fx.Node, kernel: int
) -> tuple[Geometry | None, bool] | None:
    """How a new layer reads the activation so that it fits the pre-activation; None if it cannot."""
    read, written = source.meta["val"], writing.meta["val"]
    linear = isinstance(target.rule, LinearRule) and target.rule.channel_dim(written.ndim) == written.ndim - 1
    slid = reader.rule.geometry(reader.module)
    if linear and slid is None:
        straight = reader.rule.channel_dim(read.ndim) == read.ndim - 1
        return (None, False) if straight and read.shape[:-1] == written.shape[:-1] else None
    if slid is None or read.ndim != slid.space + 2 or len(read) != len(written):
        return None
    if linear:
        return (None, True) if written.ndim == 2 else None
    over = target.rule.geometry(target.module)
    if over is None or over.space != slid.space or written.ndim != read.ndim:
        return None
    fitted = _fitted(read.shape[2:], written.shape[2:], kernel)
    return None if fitted is None else (fitted, False)


def _fitted(sizes: Sequence[int], wanted: Sequence[int], kernel: int) -> Geometry | None:
    """The smallest kernel, its margins as even as they can be, that makes one grid of another."""
    lines = [_line(size, out, kernel) for size, out in zip(sizes, wanted, strict=True)]
    found = [line for line in lines if line is not None]
    if len(found) < len(lines):
        return None
    kernels, strides, margins = zip(*found, strict=True)
    return Geometry(kernels, strides, (1,) * len(sizes), tuple((margin, margin) for margin in margins))


def _line(size: int, wanted: int, kernel: int) -> tuple[int, int, int] | None:
    """Kernel, stride and margin along one dimension."""
    for taps in range(kernel, size + 1):
        for margin in range((taps - 1) // 2, -1, -1):
            for stride in range(1, size + 1):
                if (size + 2 * margin - taps) // stride + 1 == wanted:
                    return taps, stride, margin
    return None
