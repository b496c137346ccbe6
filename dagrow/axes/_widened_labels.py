"""The run on labels of a network in which one axis is wider.

The producers' new channels get fresh labels, and the part of the graph that they reach runs again. Three checks are
the safety net: no fresh label froze, fresh labels of different units stayed apart from each other and from all old
ones, and the old labels came out in their old order.
"""

import collections
import heapq
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from dagrow._pytree import leaf_values, tensors_in
from dagrow.axes._channel_labels import ChannelLabeller, Labelling, Rider
from dagrow.axes._grouping import AxisLayout
from dagrow.axes._index_map import CannotWidenError, IndexMap, insert_along, insert_units
from dagrow.axes._label_interpreter import Values
from dagrow.axes._size_rewriting import Arguments, expected, rewritten, unflattened, with_attributes
from dagrow.axes._union_find import NO_CHANNEL, narrow
from dagrow.layers import (
    ATTENTION,
    ATTENTION_ARGUMENTS,
    CREATION,
    CUTS,
    MOVES,
    UNIFORM,
    Contraction,
    EdgeRule,
    LayerSite,
    RiderRule,
    Tables,
    op_name,
    reduced_dims,
)
from dagrow.tracing import AttributeInt, AttributePath, Program

_SHAPING = MOVES | CREATION | UNIFORM - {"full", "full_like", "new_full"} | {ATTENTION}
_FILLING = {"full", "full_like", "new_full"}


class WidenedLabeller(ChannelLabeller):
    """Runs the part of the graph that the new channels of one axis reach."""

    def __init__(
        self,
        program: Program,
        layers: Mapping[fx.Node, LayerSite],
        layout: AxisLayout,
        k: int,
        restated: Mapping[AttributePath, int],
    ) -> None:
        before = layout.found
        classes = before.classes.copy()
        found = Labelling(
            classes, riders=before.riders, joined=before.joined, channels=before.channels, named=before.named
        )
        super().__init__(program.model, layers, found)
        self.program, self.restated = program, restated
        self.before, self.layout, self.k, self.first = before, layout, k, len(classes)
        self.units = torch.empty(0, dtype=torch.long)  #: of fresh labels
        self.values = dict(before.values)
        self.literals: dict[fx.Node, Arguments] = {}
        self.attributes: dict[str, dict[str, Any]] = {}
        self.landings: dict[str, IndexMap] = {}
        self.riders: dict[Rider, IndexMap] = {}
        self.written: dict[str, Tensor] = {}  #: producer -> labels of new rows ``[k, slots]``
        self.sums: list[tuple[fx.Node, Tensor, Tensor]] = []  #: fresh labels that both sides of a sum hold
        self.reached: list[fx.Node] = []
        self.checked: dict[fx.Node, int] = {}  #: reached nodes, and how many unions there had been when they were
        self.reading: dict[str, int] = collections.Counter()  #: layer -> how many of its calls were reached
        found.rows.update(before.rows)
        for edge, rows in layout.rows.items():
            units = torch.full((len(before.rows[edge]),), NO_CHANNEL)
            units[rows] = torch.arange(layout.width)[:, None]
            landing = self.landings[edge] = insert_units(units, layout.width, k, 0, edge)
            self.written[edge] = self._fresh(landing)
            found.rows[edge] = self._grown(before.rows[edge], landing, self.written[edge])
        for rider, units in layout.entries.items():
            if rider.rule is None:
                landing = self.riders[rider] = insert_along(units, layout.width, k, rider.name)
                found.entries[rider] = self._grown(before.entries[rider], landing, self._fresh(landing))

    def _fresh(self, landing: IndexMap) -> Tensor:
        """A label for each entry of each new unit ``[k, slots]``."""
        labels = self.classes.fresh(landing.new.numel()).view(landing.new.shape)
        self.units = torch.cat([self.units, torch.arange(self.k)[:, None].expand_as(labels).flatten()])
        return labels

    @staticmethod
    def _grown(labels: Tensor, landing: IndexMap, fresh: Tensor) -> Tensor:
        labels = labels.movedim(landing.dim, 0)
        grown = labels.new_empty(landing.size, *labels.shape[1:])
        grown[landing.old] = labels
        grown[landing.new.flatten()] = fresh.reshape(-1, *[1] * (labels.ndim - 1)).expand(-1, *labels.shape[1:])
        return grown.movedim(0, landing.dim)

    def is_fresh(self, labels: Tensor) -> Tensor:
        return self.classes.roots(labels) >= self.first

    def is_channel(self, labels: Tensor) -> Tensor:
        return super().is_channel(labels) | self.is_fresh(labels)

    def arguments(self, node: fx.Node, values: Values) -> tuple[Any, Any]:
        return fx.map_arg(with_attributes((node.args, dict(node.kwargs)), self.restated), lambda n: values[n])

    def run_reached(self) -> None:
        """Nodes in their order, from those that write new channels up to the layers that read them."""
        direct = {rider.name for rider in self.riders}
        waiting = [node for node, layer in self.layers.items() if layer.name in self.landings]
        waiting += [node for name in direct for node in self.program.graph.find_nodes(op="get_attr", target=name)]
        waiting += [node for place in self.restated for node in self.program.stated[place] if node not in self.layers]
        starts = seen = set(waiting)
        waiting, seen = sorted(starts), set(starts)
        while waiting:
            node = heapq.heappop(waiting)
            layer = self.layers.get(node)
            if self._reach(node) and (node in starts or layer is None or layer.name not in self.before.rows):
                self.reached.append(node)
                for user in node.users:
                    if user not in seen:
                        seen.add(user)
                        heapq.heappush(waiting, user)

    def _reach(self, node: fx.Node) -> bool:
        """Runs a node. Whether its value is another than before."""
        try:
            value = self.node(node, self.values)
        except CannotWidenError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            name = op_name(node) or str(node.target)
            raise CannotWidenError(self.located(node, f"{name} does not accept the wider axis")) from error
        before = self.before.values[node]
        self._check_numbers(node)
        if self._unchanged(value, before):
            return False
        if not self._passed_on(node, value, before):
            self.values[node] = value
            self._check_reached(node)
        self.values[node] = value
        self.checked[node] = self.classes.unions
        return True

    def _passed_on(self, node: fx.Node, value: Any, before: Any) -> bool:
        """Whether a node gives out the very tensor of labels that it got, now and before, and that was checked as the
        classes are now."""
        return isinstance(value, Tensor) and any(
            self.checked.get(source) == self.classes.unions
            and value is self.values[source]
            and before is self.before.values[source]
            for source in node.all_input_nodes
        )

    def _unchanged(self, value: Any, before: Any) -> bool:
        if value is before:
            return True
        if not (isinstance(value, Tensor) and isinstance(before, Tensor)):
            return not tensors_in((value, before)) and bool(value == before)
        return value.shape == before.shape and torch.equal(
            self.classes.roots(narrow(value)), self.classes.roots(narrow(before))
        )

    def _check_reached(self, node: fx.Node) -> None:
        """Old labels stay where they were among themselves, and no number that is computed with follows the width."""
        value, before = self.values[node], self.before.values[node]
        if node.meta.get("baked") and value != before:
            self.literals[node] = node.args, dict(node.kwargs)
        if not isinstance(value, Tensor) or not isinstance(before, Tensor):
            return
        if [s == 0 for s in value.stride()] == [s == 0 for s in before.stride()]:
            value, before = narrow(value), narrow(before)
        roots = self.classes.roots(value).numpy().ravel()
        if not np.array_equal(roots[roots < self.first], self.classes.roots(before).numpy().ravel()):
            raise CannotWidenError(
                self.located(node, f"{op_name(node) or node.target} would take other channels than before")
            )

    def _check_numbers(self, node: fx.Node) -> None:
        """No number that follows the width is rounded, no tensor is computed with one, and none is given out."""
        name = op_name(node)
        if node.target is operator.floordiv and any(
            self._rounds(node, values) for values in (self.values, self.before.values)
        ):
            raise CannotWidenError(self.located(node, "its width is rounded in the model's forward"))
        makes = isinstance(node.meta.get("val"), Tensor) and name not in _SHAPING and node not in self.layers
        if not makes and node.op != "output":
            return
        used = list(leaf_values((node.args, dict(node.kwargs))))
        if name in _FILLING:
            used = [*node.args[2 if name == "new_full" else 1 :][:1], node.kwargs.get("fill_value")]
        followed = [n for n in used if isinstance(n, fx.Node) and isinstance(self.values[n], (int, float))]
        if any(self.values[n] != self.before.values[n] for n in followed) or any(
            isinstance(n, AttributeInt) and self.restated.get(n.place, n) != n for n in used
        ):
            how = "given out by" if node.op == "output" else "used as a number in"
            raise CannotWidenError(self.located(node, f"its width is {how} the model's forward"))

    @staticmethod
    def _rounds(node: fx.Node, values: Values) -> bool:
        left, right = fx.map_arg(node.args, lambda n: values[n])
        return isinstance(left, int) and isinstance(right, int) and left % right != 0

    def multiply(self, node: fx.Node, product: Contraction, left: Tensor, right: Tensor) -> Tensor:
        before = [value for n in node.all_input_nodes if isinstance(value := self.before.values[n], Tensor)]
        if len(before) == 2 and not any(bool(self.is_fresh(narrow(side)).any()) for side in (left, right)):
            now, then = (product.aligned(*sides)[0].shape for sides in ((left, right), before))
            if now[len(product.out) :] != then[len(product.out) :]:
                raise CannotWidenError(self.located(node, f"{op_name(node)} takes all channels together"))
        return super().multiply(node, product, left, right)

    def spatial(self, node: fx.Node, tables: Tables, inputs: Tensor) -> Any:
        last = range(inputs.ndim - len(tables(inputs.shape)), inputs.ndim)
        self._check_size(node, inputs, [d for d in last if not self.varies(inputs, d)])
        return super().spatial(node, tables, inputs)

    def reduce(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        self._check_size(node, args[0], reduced_dims(node, args, kwargs))
        return super().reduce(node, args, kwargs)

    def mixed(self, node: fx.Node, name: str, dims: Sequence[int], inputs: Tensor) -> Any:
        self._check_size(node, inputs, dims)
        return super().mixed(node, name, dims, inputs)

    def _check_size(self, node: fx.Node, inputs: Tensor, dims: Sequence[int]) -> None:
        """A constant as wide as an axis, whose entries are taken together, would change."""
        before = self.before.values[node.all_input_nodes[0]].shape
        if any(inputs.shape[d] != before[d] for d in dims):
            raise CannotWidenError(self.located(node, f"{op_name(node) or node.target} takes all channels together"))

    def edge(self, node: fx.Node, layer: LayerSite, inputs: Tensor) -> Any:
        before = layer.inputs.meta["val"].shape
        dim = layer.rule.channel_dim(inputs.ndim)
        fixed = [s for d, s in enumerate(inputs.shape) if d != dim] == [s for d, s in enumerate(before) if d != dim]
        if not fixed or (inputs.shape != before and layer.name not in self.layout.columns):
            raise CannotWidenError(f"new channels would land beside the features that {layer.name} reads")
        self.reading[layer.name] += 1
        value, rows = super().edge(node, layer, inputs), self.found.rows.get(layer.name)
        return self.before.values[node] if rows is self.before.rows.get(layer.name) is not None else value

    def rider(self, node: fx.Node, layer: LayerSite, inputs: Tensor) -> Any:
        dim = layer.rule.channel_dim(inputs.ndim)
        grown = inputs.shape[dim] != layer.inputs.meta["val"].shape[dim]
        if grown and all(rider.name != layer.name for rider in self.layout.entries):
            raise CannotWidenError(f"new channels would land beside the features that {layer.name} reads")
        return super().rider(node, layer, inputs)

    def attend(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        """The softmax scale stays what it was."""
        width = self.before.values[node.all_input_nodes[0]].shape[-1]
        given = dict(zip(ATTENTION_ARGUMENTS, args, strict=False)) | kwargs
        if given["query"].shape[-1] != width and given.get("scale") is None:
            end = ATTENTION_ARGUMENTS.index("scale")
            self.literals[node] = node.args[:end], {**node.kwargs, "scale": width**-0.5}
        return super().attend(node, args, kwargs)

    def summed(self, node: fx.Node, left: Tensor, right: Tensor) -> None:
        """New channels are summed with old ones: those of one side will have to be zero."""
        a, b = torch.broadcast_tensors(self._unit(left), self._unit(right))
        if bool(((a != b) & (a != NO_CHANNEL) & (b != NO_CHANNEL)).any()):
            raise CannotWidenError(self.located(node, f"{op_name(node)} would multiply different new channels"))
        sides = [torch.unique(labels[self.is_fresh(labels)]) for labels in (left, right)]
        self.sums.append((node, *sides))

    def _unit(self, labels: Tensor) -> Tensor:
        roots = self.classes.roots(labels)
        found = self.units.numpy()[np.maximum(roots.numpy() - self.first, 0)]
        return torch.from_numpy(np.asarray(np.where(roots.numpy() >= self.first, found, NO_CHANNEL)))

    def move(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        before = self.before.values[node]
        shapes = [expected(self.layout, b, self.k) if isinstance(b, Tensor) else None for b in _each(before)]
        known = any(shape is not None for shape in shapes)
        try:
            value = super().move(node, args, kwargs)
            if all(shape in (None, v.shape) for shape, v in zip(shapes, _each(value), strict=False)):
                self._check_cut(node, args[0], _each(value))
                return value
        except (RuntimeError, IndexError):
            if not known:
                raise
        module = node.meta["module"]
        if isinstance(module, nn.Unflatten) and isinstance(module.dim, int) and shapes[0] is not None:
            sizes = unflattened(module.dim, module.unflattened_size, node, shapes[0])
            self.attributes[str(node.target)] = {"unflattened_size": sizes}
            return args[0].unflatten(module.dim, sizes)
        arguments = with_attributes((node.args, dict(node.kwargs)), self.restated)
        literals = None
        if known:
            literals = rewritten(
                node, arguments, self.values, self.before.values, shapes, lambda labels: ~self.is_fresh(labels)
            )
        if literals is None:
            raise CannotWidenError(
                self.located(node, f"what {op_name(node) or node.target} gives does not follow the axis")
            )
        self.literals[node] = literals
        return super().move(node, *fx.map_arg(literals, lambda n: self.values[n]))

    def _check_cut(self, node: fx.Node, inputs: Any, pieces: Sequence[Any]) -> None:
        """A number of parts, or a size of parts, that does not fit the width cuts elsewhere when it grows."""
        given = [*node.args[1:], *node.kwargs.values()]
        if op_name(node) in CUTS and not any(isinstance(leaf, (tuple, list)) for leaf in given):
            old, before = _each(self.before.values[node]), self.before.values[node.all_input_nodes[0]].shape
            for d in (d for d in range(len(before)) if inputs.shape[d] != before[d]):
                if any(len({piece.shape[d] for piece in parts}) > 1 for parts in (old, pieces)):
                    raise CannotWidenError(self.located(node, f"{op_name(node)} cuts it into uneven parts"))

    def restate(self) -> None:
        """Functions that are called with a number of groups get the new one."""
        for node in self.reached:
            layer = self.layers.get(node)
            if layer is not None and layer.paths:
                sizes = self._sizes(layer, self.found)
                given = {**dict(zip(layer.names, node.args, strict=False)), **node.kwargs}
                stated = {name: given[name] for name in given.keys() & sizes.keys()}
                if any(fx.map_arg(value, lambda n: self.values[n]) != sizes[name] for name, value in stated.items()):
                    args = tuple(sizes.get(name, arg) for name, arg in zip(layer.names, node.args, strict=False))
                    self.literals[node] = args, {name: sizes.get(name, arg) for name, arg in node.kwargs.items()}

    def _sizes(self, layer: LayerSite, found: Labelling) -> dict[str, Any]:
        """What the layer states as a module, in the network that was run on these labels."""
        if isinstance(layer.rule, EdgeRule):
            columns = found.columns.get(layer.name, self.before.columns[layer.name])
            rows = found.rows.get(layer.name, self.before.rows[layer.name])
            return dict(layer.rule.attributes(len(columns), len(rows)))
        assert isinstance(layer.rule, RiderRule)
        width = next(len(labels) for rider, labels in found.entries.items() if rider.name == layer.name)
        return dict(layer.rule.attributes(layer.module, width))

    def resized(self) -> dict[AttributePath, int]:
        """Attributes that layers restate when they are widened, by their owners."""
        names = {*self.layout.rows, *self.layout.columns, *(r.name for r in self.layout.entries if r.rule is not None)}
        found: dict[AttributePath, int] = {}
        for layer in (layer for layer in self.layers.values() if layer.name in names):
            owner, before = self.model.get_submodule(layer.owner), self._sizes(layer, self.before)
            for name, size in self._sizes(layer, self.found).items():
                if getattr(owner, name, None) == before[name]:  # the owner of a function's weight may state others
                    found[layer.owner, name, None] = size
        return found

    def check(self) -> None:
        """The safety net."""
        fresh = torch.arange(self.first, len(self.classes))
        roots = self.classes.roots(fresh)
        frozen = roots[self.classes.numbers(roots) > 0]
        if len(frozen):
            raise CannotWidenError(str(self.classes.cause(int(frozen[0]))))
        units = self._unit(fresh)
        meets = bool((roots < self.first).any()) or not torch.equal(units, self.units)
        if meets or self.classes.changed < self.first:  # old channels would be united
            raise CannotWidenError("new channels would meet channels that they must stay apart from")
        missed = [edge for edge in self.layout.columns if edge not in self.found.columns]
        missed += [r.name for r in self.layout.entries if r not in self.found.entries]
        calls = collections.Counter(layer.name for layer in self.layers.values() if layer.name in self.layout.columns)
        missed += [edge for edge in self.layout.columns if self.reading[edge] not in (0, calls[edge])]
        if missed:
            raise CannotWidenError(f"new channels do not arrive at {', '.join(missed)}")
        if not self.layout.columns and not self.sums:
            raise CannotWidenError("no layer reads it")

    def landed(self, name: str, grown: Tensor, old: Tensor, dim: int) -> IndexMap:
        roots = self.classes.roots(grown).numpy()
        kept, fresh = np.flatnonzero(roots < self.first), np.flatnonzero(roots >= self.first)
        units = self.units.numpy()[roots[fresh] - self.first]
        new = [fresh[units == unit].tolist() for unit in range(self.k)]
        if not np.array_equal(roots[kept], self.classes.roots(old).numpy()):
            raise CannotWidenError(f"the channels that {name} reads would change their order")
        if len(set(map(len, new))) != 1 or not new[0]:
            raise CannotWidenError(f"new channels do not arrive at {name} as the old ones do")
        return IndexMap(dim, len(grown), torch.from_numpy(kept), torch.tensor(new))


def _each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else [value]
