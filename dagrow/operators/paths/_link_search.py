"""Where new paths can be laid: from an activation to a pre-activation that does not lead to it, or to itself."""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx, nn

from dagrow.errors import GrowthError, NoPlaceError
from dagrow.graph import Dag, Edge
from dagrow.layers import MODES, Geometry, LinearRule, op_name
from dagrow.operators.paths._links import PathSite, ResidualSite
from dagrow.surgery import dependent

_INPLACE = {name for name in dir(operator) if name.startswith("i") and getattr(operator, f"__{name}__", None)}


def refuse_unwritable(dag: Dag) -> None:
    """Refuses a model whose forward cannot be written with a new path in it.

    Args:
        dag: the model's.

    Raises:
        GrowthError: it cannot.
    """
    if dag.unwritable:
        raise GrowthError(
            f"no new path can be added to this {type(dag.model).__name__}: its forward would have to be written anew, "
            f"but it has one {dag.unwritable}. Widths can still grow, with AddNeurons."
        )


def path_sites(
    dag: Dag, kernel: int = 1, targets: Sequence[str] | None = None, *, known: bool = False
) -> list[PathSite]:
    """Every pair of an activation and a pre-activation that a new path could join without a cycle.

    Args:
        dag: where paths are laid.
        kernel: the smallest kernel of new convolutions; larger where the grids fit no other way.
        targets: names of layers whose pre-activations are meant; all by default.
        known: whether activations are offered to pre-activations that read them already.

    Returns:
        The places, target by target.

    Raises:
        GrowthError: no path can lead to one of the targets.
    """
    nodes, edges, order = _nodes(dag), [edge for edge in dag.edges if not edge.shared], _Order(dag)
    new = {path for path, *_ in dag.added_paths}
    readers = [edge for edge in _readers(edges) if order.graded(nodes[edge.name])]
    sites: list[PathSite] = []
    for members in _summed(edges, nodes):
        # the user's own layers come first, then new hidden layers, then new connections
        target = min(members, key=lambda edge: (edge.name.partition(".")[0] in new, edge.name in new))
        writing = nodes[target.name]
        beyond = {writing} | dependent(writing)
        read = {edge.layer.inputs for edge in members}
        for reader in readers:
            source, reading = reader.layer.inputs, nodes[reader.name]
            if source in beyond or (source in read and not known) or order.bound(writing, reading):
                continue
            form = _form(dag, source, reader, target, writing, kernel)
            if form is not None:
                sites.append(PathSite(dag, reader, source, reading, target, writing, members, *form))
    sites = list(_numbered(sites))
    return sites if targets is None else _leading_to(dag, sites, targets)


def residual_sites(dag: Dag, kernel: int = 1) -> list[PathSite]:
    """Every activation that a residual block can be put on.

    Args:
        dag: where blocks are put.
        kernel: the smallest kernel of new convolutions.

    Returns:
        One place for each activation.
    """
    nodes, order, sites = _nodes(dag), _Order(dag), dict[fx.Node, PathSite]()
    for reader in _readers([edge for edge in dag.edges if not edge.shared]):
        source = reader.layer.inputs
        form = _form(dag, source, reader, reader, source, kernel)
        if source.op != "placeholder" and form is not None and order.graded(nodes[reader.name]):
            sites.setdefault(source, ResidualSite(dag, reader, source, source.next, reader, source, (), *form))
    return list(_numbered(sites.values()))


def _nodes(dag: Dag) -> dict[str, fx.Node]:
    """The nodes of layers, by their names."""
    return {layer.name: node for node, layer in dag.layers.items()}


def _numbered(sites: Iterable[PathSite]) -> Iterator[PathSite]:
    """With a number where several activations come from the same layer."""
    sources: dict[str, list[fx.Node]] = {}
    for site in sites:
        same = sources.setdefault(site.place, [])
        same.append(site.source)
        yield replace(site, number=len(same) - 1)


class _Order:
    """What runs when, and what of it could not run later, or is cut off from gradients."""

    def __init__(self, dag: Dag) -> None:
        modules = dict(dag.model.named_modules())
        self.place: dict[fx.Node, int] = {}
        self.fixed = [0]  #: how many of the first nodes could not run later
        self.without: set[fx.Node] = set()
        graded = True
        for index, node in enumerate(dag.program.graph.nodes):
            self.place[node] = index
            graded = bool(node.args[0]) if node.target is torch._C._set_grad_enabled else graded
            self.fixed.append(self.fixed[-1] + _is_fixed(node, modules))
            if not graded:
                self.without.add(node)

    def bound(self, writing: fx.Node, reading: fx.Node) -> bool:
        """Whether something between a layer that writes and a later one that reads could not run later."""
        first, last = self.place[writing], self.place[reading]
        return last > first and self.fixed[last] > self.fixed[first + 1]

    def graded(self, node: fx.Node) -> bool:
        """Whether gradients are on where a node runs."""
        return node not in self.without


def _is_fixed(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node works in place, or switches modes."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    name = getattr(node.target, "__name__", str(node.target))
    inside = name.endswith("_") and not name.endswith("__")
    written = node.op == "call_function" and name in {"setattr", "setitem", *_INPLACE}
    return inside or written or "out" in node.kwargs or op_name(node) in MODES or bool(node.kwargs.get("inplace"))


def _leading_to(dag: Dag, sites: Sequence[PathSite], targets: Sequence[str]) -> list[PathSite]:
    """Those that lead to the targets. Raises GrowthError if none leads to one of them."""
    reached = {edge.name for site in sites for edge in site.members}
    missing = [name for name in targets if dag.edge(name).name not in reached]
    if missing:
        why = next((edge.shared for edge in map(dag.edge, missing) if edge.shared), None)
        raise (GrowthError if why else NoPlaceError)(
            f"no new path can lead to {', '.join(missing)}: "
            + (why or "all that comes before is read there already, or may have another number of positions")
            + ". Leave it out of targets=."
        )
    return [site for site in sites if {edge.name for edge in site.members} & set(targets)]


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


def _form(
    dag: Dag, source: fx.Node, reader: Edge, target: Edge, writing: fx.Node, kernel: int
) -> tuple[Geometry | None, bool] | None:
    """How a new layer reads the activation so that it fits the pre-activation; None if it cannot."""
    read, written, weight = source.meta["val"], writing.meta["val"], target.parameters()["weight"]
    if not read.dtype == written.dtype == weight.dtype or read.device != written.device:
        return None
    linear = isinstance(target.rule, LinearRule) and target.rule.channel_dim(written.ndim) == written.ndim - 1
    geometry = reader.rule.geometry(reader.module)
    if linear and geometry is None:
        channels_last = reader.rule.channel_dim(read.ndim) == read.ndim - 1
        return (None, False) if channels_last and _same_sizes(dag, source, writing, -1) else None
    if geometry is None or read.ndim != geometry.space + 2 or not _same_sizes(dag, source, writing, 1):
        return None
    if linear:
        return (None, True) if written.ndim == 2 else None
    target_geometry = target.rule.geometry(target.module)
    if target_geometry is None or target_geometry.space != geometry.space or written.ndim != read.ndim:
        return None
    if all(size == 1 for size in written.shape[2:]) and read.shape[2:].numel() > 1:
        return None  # one position is a mean, whatever the image's size: no kernel is
    grids = (dag.dynamic_sizes.shapes[node][2:] for node in (source, writing))
    new_geometry = _smallest_kernel([*map(dag.dynamic_sizes.together, *grids)], kernel)
    return None if new_geometry is None else (new_geometry, False)


def _same_sizes(dag: Dag, source: fx.Node, writing: fx.Node, until: int) -> bool:
    """Whether two activations have the same first sizes, for any inputs. Where these are samples alone they have."""
    read, written = (node.meta["val"].shape[:until] for node in (source, writing))
    if read != written or read == _samples(dag):
        return bool(read == written)
    sizes = dag.dynamic_sizes.shapes
    return sizes[source][:until] == sizes[writing][:until]


def _samples(dag: Dag) -> torch.Size | None:
    """How many there were in the example, if the first input tells."""
    first = next((node.meta["val"] for node in dag.program.graph.nodes if node.op == "placeholder"), None)
    return first.shape[:1] if isinstance(first, torch.Tensor) else None


def _smallest_kernel(sizes: Sequence[Sequence[tuple[int, int]]], kernel: int) -> Geometry | None:
    """The smallest kernel, its margins as even as they can be, that makes one grid of another.

    Args:
        sizes: along each dimension both sizes, for some inputs that the model takes.
        kernel: the least that is wanted.

    Returns:
        The kernel, its stride and its margins; None if there is none.
    """
    lines = [line for along in sizes if (line := _line(along, kernel)) is not None]
    if len(lines) < len(sizes):
        return None
    kernels, strides, margins = zip(*lines, strict=True)
    return Geometry(kernels, strides, (1,) * len(sizes), tuple((margin, margin) for margin in margins))


def _line(sizes: Sequence[tuple[int, int]], kernel: int) -> tuple[int, int, int] | None:
    """Kernel, stride and margin along one dimension."""
    smallest = min(size for size, _ in sizes)
    for taps in range(kernel, smallest + 1):
        for margin in range((taps - 1) // 2, -1, -1):
            for stride in range(1, smallest + 1):
                if all((size + 2 * margin - taps) // stride + 1 == wanted for size, wanted in sizes):
                    return taps, stride, margin
    return None
