"""Where new paths can be laid: from an activation to a pre-activation that does not lead to it."""

import itertools
import operator
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import skip_init

from dagrow.branches import Branch, blank, crossed
from dagrow.dag import Dag, Edge
from dagrow.draft import Draft
from dagrow.errors import GrowthError
from dagrow.features import Feature, Goal, MeanRead, Reads, Slid, Stacked
from dagrow.generated import branches_of
from dagrow.layers.linear import LinearRule
from dagrow.patches import Geometry
from dagrow.solve import Block

__all__ = ["Link", "filled", "links", "refuse_unwritable"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MEANS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


@dataclass(frozen=True, eq=False)
class Link:
    """From what a layer reads to a pre-activation.

    Attributes:
        reader: the layer.
        source, reading, writing: the nodes of the activation, of the reader and of the target.
        target: a layer that writes the pre-activation.
        members: all layers whose outputs are summed there, whose weights can move along; the target is one.
        geometry: how a new convolution slides over the activation; None for a linear layer.
        pooled: whether the activation is an image and the new layer reads its mean over positions.
    """

    dag: Dag
    reader: Edge
    source: fx.Node
    reading: fx.Node
    target: Edge
    writing: fx.Node
    members: tuple[Edge, ...]
    geometry: Geometry | None = None
    pooled: bool = False

    @property
    def place(self) -> str:
        """Where it leads from and to."""
        return f"{_origin(self.source, self.dag)} -> {self.target.name}"

    def named(self, kind: str | None = None) -> str:
        """A name for the new module: where it leads from and to, or a kind with a number."""
        plain = kind or "_to_".join(_short(end, self.dag) for end in self.place.split(" -> "))
        plain = plain if plain.isidentifier() else f"from_{plain}"
        model, count = self.dag.model, itertools.count(1 if kind else 2)
        names = itertools.chain([] if kind else [plain], (f"{plain}{'' if kind else '_'}{n}" for n in count))
        return next(name for name in names if name not in model._modules and not hasattr(model, name))

    @property
    def movable(self) -> tuple[Edge, ...]:
        """The members whose weights may move, one with a bias last if there is one."""
        free = [edge for edge in self.members if edge.trainable]
        return tuple(sorted(free, key=lambda edge: edge.bias))

    @property
    def bias(self) -> bool:
        """Whether the new layer needs a bias: only where no member has one that can move."""
        return not any(edge.bias for edge in self.movable)

    def features(self, bias: bool) -> Feature:
        """``p``: what the new layer reads, with the constant 1 or without."""
        if self.pooled:
            return MeanRead(self.reader.name, bias)
        if self.geometry is not None:
            return Slid(self.reader.name, bias, geometry=self.geometry)
        return Reads(self.reader.name, bias)

    @cached_property
    def reads(self) -> Reads | Stacked | None:
        """``b``: what can follow the goal already, the constant 1 last."""
        parts = [Reads(edge.name, edge.bias and edge is self.movable[-1]) for edge in self.movable]
        if len(parts) > 1:
            return Stacked(tuple(parts))
        return parts[0] if parts else None

    @property
    def goal(self) -> Goal:
        return Goal(self.target.name)

    def block(self, features: Feature) -> Block:
        """New features at the pre-activation: what it reads already is regressed out of them, and moves along."""
        return Block(features, self.reads, self.goal, "all")

    def layer(self, outputs: int, bias: bool) -> nn.Module:
        """A new layer that reads the activation, all zero."""
        if self.geometry is None:
            return self._blank(nn.Linear, self._inputs, outputs, bias=bias)
        margins = tuple(before for before, _ in self.geometry.margins)
        kind, *slides = _CONVOLUTIONS[self.geometry.space - 1], self.geometry.kernel, self.geometry.stride, margins
        return self._blank(kind, self._inputs, outputs, *slides, bias=bias)

    def further(self, inputs: int) -> nn.Module:
        """A new layer that reads another new one and writes the pre-activation, all zero and without a bias."""
        if self.geometry is None:
            return self._blank(nn.Linear, inputs, self.outputs, bias=False)
        return self._blank(_CONVOLUTIONS[self.geometry.space - 1], inputs, self.outputs, 1, bias=False)

    def _blank(self, kind: type[nn.Module], *sizes: Any, bias: bool) -> nn.Module:
        made: nn.Module = skip_init(kind, *sizes, bias=bias)  # draws no random numbers
        return blank(made).to(self.target.parameters()["weight"])

    @property
    def outputs(self) -> int:
        return self.target.rule.widths(self.target.module)[1]

    @property
    def _inputs(self) -> int:
        rule, value = self.reader.rule, self.source.meta["val"]
        return value.shape[rule.channel_dim(value.ndim)]

    def branch(self, name: str, layers: Mapping[str, nn.Module]) -> Branch:
        """The new layers by their names, at their place."""
        if self.pooled:
            mean = _MEANS[self.source.meta["val"].ndim - 3](1)
            layers = {"mean": mean, "flatten": nn.Flatten(1), **layers}
        several = nn.Sequential(OrderedDict(layers))
        module = several if len(layers) > 1 else several[0]
        return Branch(
            name, module, self.reading, self.writing, self.source, self.reader.name, self.target.name,
            self.target.path("weight"),
        )  # fmt: skip

    def compensate(self, draft: Draft, delta: Tensor) -> None:
        """Moves the members' weights ``[o, i]``, laid out as in :attr:`reads`."""
        sizes = [edge.rule.widths(edge.module)[0] * edge.rule.taps(edge.module) for edge in self.movable]
        sizes[-1] = delta.shape[1] - sum(sizes[:-1])
        for edge, part in zip(self.movable, delta.split(sizes, 1), strict=True):
            draft.move(edge, part)


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
        beyond, writing = _beyond(nodes[target.name]), nodes[target.name]
        heard = {edge.layer.inputs for edge in members}
        for reader in _readers(edges):
            source, reading = reader.layer.inputs, nodes[reader.name]
            if source in beyond or (source in heard and not known) or _unsafe(dag, reading, writing):
                continue
            form = _form(source, reader, target, writing, kernel)
            if form is not None:
                found.append(Link(dag, reader, source, reading, target, writing, members, *form))
    return found if targets is None else _meant(dag, found, targets)


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


def _beyond(origin: fx.Node) -> set[fx.Node]:
    """Everything that a node leads to."""
    found, waiting = {origin}, [origin]
    while waiting:
        new = [user for user in waiting.pop().users if user not in found]
        found.update(new)
        waiting += new
    return found


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


def _origin(node: fx.Node, dag: Dag) -> str:
    """The layer that an activation comes from, or the input; of several the last, new connections aside."""
    waiting, seen, found = [node], set(), []
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        if one.op == "placeholder":
            found.append((one, str(one.target).lstrip("*")))
        elif one in dag.layers:
            found.append((one, dag.layers[one].name))
        else:
            waiting += one.all_input_nodes
    bypasses = {name for name, *_ in branches_of(dag.model)}
    return max(found, key=lambda one: (one[1] not in bypasses, one[0]))[1] if found else node.name


def _short(name: str, dag: Dag) -> str:
    """A layer's name as part of another: of new layers the name of their branch."""
    branches = {branch for branch, *_ in branches_of(dag.model)}
    first = name.partition(".")[0]
    return first if first in branches else name.replace(".", "_").strip("_")


def filled(layer: nn.Module, matrix: Tensor) -> nn.Module:
    """A layer with the weights ``[o, i]``, the constant's last where it has a bias."""
    weight, bias = layer.get_parameter("weight"), dict(layer.named_parameters()).get("bias")
    with torch.no_grad():
        weight.copy_(matrix[:, : weight[0].numel()].reshape(weight.shape))
        if bias is not None:
            bias.copy_(matrix[:, -1])
    return layer
