"""From labels to axes, and what has to change where when an axis widens.

Growing is relabelling: the producers' new channels get fresh labels, the part of the graph that they reach runs
again, and every consumer and rider tells where the new channels landed. Three checks are the safety net: no fresh
label froze, fresh labels stayed apart, and the old labels came out in their old order.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from dagrow import ops
from dagrow.labels import NEUTRAL, ChannelRunner, Labelling, Rider, narrow
from dagrow.layers import LayerRule

__all__ = ["Landing", "Layout", "MisfitError", "Widening", "group", "widen"]


class MisfitError(Exception):
    """An axis cannot widen; the message is the reason."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the channels of an axis sit: for each unit (the channels that must grow together), its entries.

    Attributes:
        width: the number of units U.
        rows: producing edge -> its output channels ``[U, slots]``.
        columns: consuming edge -> its input channels ``[U, slots]``.
        entries: rider -> label tensor of the rider's entries, units numbered 0..U-1, NEUTRAL for others.
        reason: why the axis cannot grow, or None.
    """

    width: int
    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    entries: Mapping[Rider, Tensor]
    labels: tuple[int, ...]
    reason: str | None


@dataclass(frozen=True, eq=False)
class Landing:
    """Along one dimension of a tensor: where old entries go and where new ones are.

    Attributes:
        size: the grown size of the dimension.
        old: positions of the old entries, in their old order ``[size before]``.
        new: positions of the new units' entries ``[k, slots]``.
    """

    dim: int
    size: int
    old: Tensor
    new: Tensor


@dataclass(frozen=True, eq=False)
class Widening:
    """What changes where when an axis widens."""

    rows: Mapping[str, Landing]
    columns: Mapping[str, Landing]
    entries: Mapping[Rider, Landing]
    literals: Mapping[fx.Node, tuple[Any, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  #: of modules that state a size


def group(found: Labelling) -> list[Layout]:
    """Groups the classes of labels into axes: channels written, read and carried by the same things."""
    places: dict[int, dict[tuple[str, Any], list[int]]] = defaultdict(lambda: defaultdict(list))
    for kind, table in (("rows", found.rows), ("columns", found.columns), ("entries", found.entries)):
        for key, labels in table.items():
            for index, root in enumerate(found.classes.roots(labels).flatten().tolist()):
                if root != NEUTRAL:
                    places[root][kind, key].append(index)
    axes: dict[tuple, list[int]] = defaultdict(list)
    for root, where in places.items():
        signature = tuple((kind, key, len(indices)) for (kind, key), indices in where.items())
        if any(kind == "rows" for kind, _, _ in signature):
            axes[(*signature, found.classes.cause(root))].append(root)
    return [_layout(found, roots, places) for roots in axes.values()]


def _layout(found: Labelling, roots: Sequence[int], places: Mapping[int, Mapping]) -> Layout:
    tables: dict[str, dict] = {"rows": {}, "columns": {}, "entries": {}}
    for kind, key in places[roots[0]]:
        tables[kind][key] = torch.tensor([places[root][kind, key] for root in roots])
    units = {root: unit for unit, root in enumerate(roots)}
    entries = {
        rider: found.classes.roots(labels).apply_(lambda root: units.get(root, NEUTRAL))
        for rider, labels in found.entries.items()
        if rider in tables["entries"]
    }
    reason = found.classes.cause(roots[0])
    if reason is None and not tables["columns"]:
        reason = "no layer reads it"
    return Layout(len(roots), tables["rows"], tables["columns"], entries, tuple(roots), reason)


def widen(
    graph: fx.Graph, model: nn.Module, rules: Sequence[LayerRule], found: Labelling, layout: Layout, k: int
) -> Widening:
    """Plans k new units on an axis. Raises :class:`MisfitError` with the reason if the model cannot take them."""
    if layout.reason:
        raise MisfitError(layout.reason)
    runner = _GrowthRunner(model, rules, found, layout, k)
    try:
        runner.run_reached(graph)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise MisfitError(f"an operation does not accept the wider axis: {error}") from error
    runner.check()
    columns = {edge: runner.landed(edge, runner.found.columns[edge], found.columns[edge], 1) for edge in layout.columns}
    entries = {
        r: runner.riders.get(r) or runner.landed(r.name, runner.found.entries[r], found.entries[r], 0)
        for r in layout.entries
    }
    return Widening(runner.landings, columns, entries, runner.literals, runner.attributes)


class _GrowthRunner(ChannelRunner):
    """Runs the part of the graph that the new channels of one axis reach."""

    def __init__(self, model: nn.Module, rules: Sequence[LayerRule], before: Labelling, layout: Layout, k: int) -> None:
        classes = before.classes.copy()
        super().__init__(model, rules, Labelling(classes))
        self.before, self.layout, self.k = before, layout, k
        self.old_roots = classes.roots(torch.arange(len(classes.parent)))
        self.fresh = classes.fresh(k)
        self.values = dict(before.values)
        self.literals: dict[fx.Node, tuple[Any, ...]] = {}
        self.attributes: dict[str, dict[str, Any]] = {}
        self.landings: dict[str, Landing] = {}
        self.riders: dict[Rider, Landing] = {}
        for edge, labels in before.rows.items():
            self.found.rows[edge] = labels
            if edge in layout.rows:
                units = torch.full((len(labels),), NEUTRAL)
                units[layout.rows[edge]] = torch.arange(layout.width)[:, None]
                self.landings[edge] = _insert(units, layout.width, k, 0, edge)
                self.found.rows[edge] = self._grown(labels, self.landings[edge])
        for rider, units in layout.entries.items():
            if rider.rule is None:
                landing = _insert_along(units, layout.width, k, rider.name)
                self.riders[rider] = landing
                self.found.entries[rider] = self._grown(before.entries[rider], landing)

    def _grown(self, labels: Tensor, landing: Landing) -> Tensor:
        labels = labels.movedim(landing.dim, 0)
        grown = labels.new_empty(landing.size, *labels.shape[1:])
        grown[landing.old] = labels
        fresh = self.fresh[:, None].expand_as(landing.new).reshape(-1)
        grown[landing.new.reshape(-1)] = fresh.view(-1, *[1] * (labels.ndim - 1)).expand(-1, *labels.shape[1:])
        return grown.movedim(0, landing.dim)

    def run_reached(self, graph: fx.Graph) -> None:
        values, dirty = self.values, set()
        direct = {rider.name for rider in self.riders}
        for node in graph.nodes:
            changed = node.target in (
                self.landings if node.op == "call_module" else direct if node.op == "get_attr" else ()
            )
            if changed or any(source in dirty for source in node.all_input_nodes):
                values[node] = self.node(node, values)
                self._check_reached(node)
                if changed or node.target not in self.before.rows or node.op != "call_module":
                    dirty.add(node)

    def _check_reached(self, node: fx.Node) -> None:
        """Old labels stay where they were among themselves, and no number that is computed with follows the width."""
        value, before = self.values[node], self.before.values[node]
        if not isinstance(value, Tensor) or not isinstance(before, Tensor):
            return
        numbers = [s for s in node.all_input_nodes if isinstance(self.values[s], (int, float))]
        moved = ops.op_name(node) in ops.MOVES | ops.CREATION
        if not moved and any(self.values[s] != self.before.values[s] for s in numbers):
            raise MisfitError("its width is used as a number in the model's forward")
        if [s == 0 for s in value.stride()] == [s == 0 for s in before.stride()]:
            value, before = narrow(value), narrow(before)
        roots, old = self.classes.roots(value).flatten(), self.classes.roots(before).flatten()
        if not torch.equal(roots[~torch.isin(roots, self.classes.roots(self.fresh))], old):
            raise MisfitError(f"{ops.op_name(node) or node.target} would take other channels than before")

    def edge(self, node: fx.Node, rule: Any, inputs: Tensor) -> Any:
        before = node.all_input_nodes[0].meta["val"].shape
        dim = rule.channel_dim(inputs.ndim)
        if [s for d, s in enumerate(inputs.shape) if d != dim] != [s for d, s in enumerate(before) if d != dim]:
            raise MisfitError(f"new channels would land beside the features that {node.target} reads")
        return super().edge(node, rule, inputs)

    def move(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        expected = self._expected_shape(node)
        try:
            value = super().move(node, args, kwargs)
            if expected is None or not isinstance(value, Tensor) or value.shape == expected:
                return value
        except (RuntimeError, IndexError):
            if expected is None:
                raise
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        if isinstance(module, nn.Unflatten) and isinstance(module.dim, int) and expected is not None:
            sizes = _unflattened(module.dim, module.unflattened_size, node, expected)
            self.attributes[str(node.target)] = {"unflattened_size": sizes}
            return args[0].unflatten(module.dim, sizes)
        literals = _rewritten(node, expected)
        if literals is None:
            where = node.meta.get("source", "")
            raise MisfitError(f"what {ops.op_name(node) or node.target} gives does not follow the axis {where}".strip())
        self.literals[node] = literals
        return super().move(node, fx.map_arg(literals, lambda n: self.values[n]), kwargs)

    def _expected_shape(self, node: fx.Node) -> torch.Size | None:
        """The output's shape in the grown network, where one dimension holds all units of the axis."""
        labels = self.before.values[node]
        if not isinstance(labels, Tensor) or not labels.numel():
            return None
        labels = self.before.classes.roots(labels)
        members = torch.isin(labels, torch.tensor(self.layout.labels))
        carrying = [d for d in range(labels.ndim) if _differs(labels, members, d)]
        if len(carrying) != 1:
            return None
        d = carrying[0]
        count = int(members.movedim(d, 0).reshape(labels.shape[d], -1).any(dim=1).sum())
        shape = list(labels.shape)
        if count % self.layout.width:  # a part of the axis: what it must be is seen from the labels
            return None
        shape[d] += count * self.k // self.layout.width
        return torch.Size(shape)

    def check(self) -> None:
        """The safety net."""
        for label in self.fresh.tolist():
            cause = self.classes.cause(label)
            if cause:
                raise MisfitError(cause)
        roots = self.classes.roots(torch.arange(len(self.classes.parent)))
        if (
            not torch.equal(roots[: len(self.old_roots)], self.old_roots)
            or len(set(roots[self.fresh].tolist())) < self.k
        ):
            raise MisfitError("new channels would meet channels that they must stay apart from")
        missed = [edge for edge in self.layout.columns if edge not in self.found.columns]
        missed += [r.name for r in self.layout.entries if r not in self.found.entries]
        if missed:
            raise MisfitError(f"new channels do not arrive at {', '.join(missed)}")

    def landed(self, name: str, grown: Tensor, old: Tensor, dim: int) -> Landing:
        roots, fresh = self.classes.roots(grown), self.classes.roots(self.fresh)
        new = [torch.nonzero(roots == f).flatten().tolist() for f in fresh.tolist()]
        kept = torch.nonzero(~torch.isin(roots, fresh)).flatten()
        if not torch.equal(roots[kept], self.classes.roots(old)):
            raise MisfitError(f"the channels that {name} reads would change their order")
        if not new or len(set(map(len, new))) != 1 or not new[0]:
            raise MisfitError(f"new channels do not arrive at {name} as the old ones do")
        return Landing(dim, len(grown), kept, torch.tensor(new))


def _differs(labels: Tensor, members: Tensor, dim: int) -> bool:
    """Whether members of the axis differ along a dimension."""
    first = labels.select(dim, 0).unsqueeze(dim)
    return labels.shape[dim] > 1 and bool((members & (labels != first)).any())


def _insert(units: Tensor, width: int, k: int, dim: int, name: str) -> Landing:
    """Puts k new units behind each block of old ones, where a block is 0..U-1, each repeated ``inner`` times."""
    positions = torch.nonzero(units != NEUTRAL).flatten()
    sequence = units[positions]
    inner = int((sequence == sequence[0]).int().cumprod(0).sum())
    block = width * inner
    outer = len(sequence) // block
    pattern = torch.arange(width).repeat_interleave(inner).repeat(outer)
    if not torch.equal(sequence, pattern):
        raise MisfitError(f"the channels of the axis lie in {name} in an order that is not a repeated block")
    ends = positions[block - 1 :: block]  # behind these, k * inner new entries
    position = torch.arange(len(units))
    old = position + (position[:, None] > ends).sum(1) * k * inner
    starts = old[ends] + 1
    new = starts[:, None, None] + torch.arange(k * inner).view(1, k, inner)
    return Landing(dim, len(units) + outer * k * inner, old, new.permute(1, 0, 2).reshape(k, outer * inner))


def _insert_along(units: Tensor, width: int, k: int, name: str) -> Landing:
    """The same for a tensor that carries the axis along one of its dimensions."""
    members = units != NEUTRAL
    carrying = [d for d in range(units.ndim) if _differs(units, members, d)]
    if width == 1:
        carrying = [units.ndim - 1]
    if len(carrying) != 1:
        raise MisfitError(f"the axis lies across several dimensions of {name}")
    dim = carrying[0]
    flat = units.movedim(dim, 0).reshape(units.shape[dim], -1)
    flat = flat[:, (flat != NEUTRAL).any(0)]  # positions that no activation reached carry nothing
    if not bool((flat == flat[:, :1]).all()):
        raise MisfitError(f"the axis does not lie along one dimension of {name}")
    return _insert(flat[:, 0], width, k, dim, name)


def _rewritten(node: fx.Node, expected: torch.Size | None) -> tuple[Any, ...] | None:
    """The node's arguments with the literal sizes that the wider axis needs, or None."""
    if expected is None or ops.op_name(node) not in ("view", "reshape", "unflatten") or node.kwargs:
        return None
    if ops.op_name(node) == "unflatten":
        source, dim, sizes = node.args
        if not isinstance(dim, int) or any(isinstance(size, fx.Node) for size in sizes):  # type: ignore[union-attr]
            return None
        return source, dim, _unflattened(dim, sizes, node, expected)
    first: Any = node.args[1]
    nested = isinstance(first, (tuple, list))
    given = tuple(first) if nested else node.args[1:]
    if len(given) != len(expected):  # view(dtype)
        return None
    sizes = []
    for size, before, after in zip(given, node.meta["val"].shape, expected, strict=True):
        live = isinstance(size, fx.Node) or size == -1
        if not live and size != before:
            return None
        sizes.append(size if live else after)
    return (node.args[0], tuple(sizes)) if nested else (node.args[0], *sizes)


def _unflattened(dim: int, given: Any, node: fx.Node, expected: torch.Size) -> tuple[int, ...]:
    """The sizes of an ``unflatten``, as the wider axis needs them; a -1 stays."""
    start = dim % (node.meta["val"].ndim - len(given) + 1)
    return tuple(-1 if size == -1 else expected[start + i] for i, size in enumerate(given))
