"""The run on labels of a network in which one axis is wider.

In come a graph, an axis and a number of new units, out go the labels of what these reach, and the sizes that they need.
The producers' new channels get fresh labels, and the part of the graph that they reach runs again, under the checks of
the safety net.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from dagrow._pytree import tensors_in
from dagrow.axes._attribute_sizes import AttributeSizes, layer_sizes, resized_call, with_attributes
from dagrow.axes._channel_labels import ChannelLabeller, Labelling, Rider
from dagrow.axes._grouping import AxisLayout
from dagrow.axes._index_map import CannotWidenError, IndexMap, arrived_units, insert_along, insert_units
from dagrow.axes._label_interpreter import located, moved, name_of
from dagrow.axes._label_tensors import NO_CHANNEL, unexpanded
from dagrow.axes._size_rewriting import Arguments, Shapes, expected_shape, rewritten_arguments, unflattened_sizes
from dagrow.axes._widening_checks import (
    check_arrivals,
    check_new_labels,
    check_numbers,
    check_order,
    check_read,
    check_size,
    check_split,
)
from dagrow.layers import ATTENTION, ATTENTION_ARGUMENTS, UNIFORM, Contraction, EdgeRule, LayerSite, op_name
from dagrow.tracing import Program


class WidenedLabeller(ChannelLabeller):
    """Runs the part of the graph that the new channels of one axis reach.

    Attributes:
        before: the run on labels before the axis became wider.
        sizes: what numbers that modules state become.
        values: every node's labels in the wider network.
        first_new: labels from this one on are those of new channels.
        units: the unit of each new label.
        literals: node -> its arguments in the wider network, where they change.
        attributes: module -> its attributes that change.
        row_maps: producer -> where its new rows are.
        rider_maps: parameter or buffer used directly -> where its new entries are.
        sums: products of activations, and the new labels that both operands sum over.
        reached: nodes whose values change.
        reads: layer -> how many of its calls were reached.
    """

    def __init__(
        self, program: Program, layers: Mapping[fx.Node, LayerSite], layout: AxisLayout, k: int, sizes: AttributeSizes
    ) -> None:
        before = layout.labelling
        labelling = Labelling(
            before.classes.copy(),
            rows=dict(before.rows),
            riders=before.riders,
            unit_dims=before.unit_dims,
            channels=before.channels,
            tensor_names=before.tensor_names,
        )
        super().__init__(program.model, layers, labelling)
        self.program, self.layout, self.k, self.sizes = program, layout, k, sizes
        self.before, self.values, self.first_new = before, dict(before.values), len(before.classes)
        self.units = torch.empty(0, dtype=torch.long)
        self.literals: dict[fx.Node, Arguments] = {}
        self.attributes: dict[str, dict[str, Any]] = {}
        self.row_maps: dict[str, IndexMap] = {}
        self.rider_maps: dict[Rider, IndexMap] = {}
        self.sums: list[tuple[fx.Node, Tensor, Tensor]] = []
        self.reached: list[fx.Node] = []
        self.reads: dict[str, int] = Counter()
        self._checked: dict[fx.Node, int] = {}  #: reached nodes, and how many unions there had been when they were
        self._widen_sources()

    def _widen_sources(self) -> None:
        """Gives new labels to the new channels of producers, and of parameters and buffers used directly."""
        layout, labelling, before = self.layout, self.labelling, self.before
        for edge, rows in layout.rows.items():
            units = torch.full((len(before.rows[edge]),), NO_CHANNEL)
            units[rows] = torch.arange(layout.width)[:, None]
            index_map = self.row_maps[edge] = insert_units(units, layout.width, self.k, 0, edge)
            labelling.rows[edge] = self._widened(before.rows[edge], index_map)
        for rider, units in layout.entries.items():
            if rider.rule is None:
                index_map = self.rider_maps[rider] = insert_along(units, layout.width, self.k, rider.name)
                labelling.entries[rider] = self._widened(before.entries[rider], index_map)

    def _widened(self, labels: Tensor, index_map: IndexMap) -> Tensor:
        """Labels, and among them new ones: one for each entry of each new unit."""
        new = self.classes.fresh(index_map.new.numel())
        self.units = torch.cat([self.units, torch.arange(self.k)[:, None].expand_as(index_map.new).flatten()])
        labels = labels.movedim(index_map.dim, 0)
        widened = labels.new_empty(index_map.size, *labels.shape[1:])
        widened[index_map.old] = labels
        widened[index_map.new.flatten()] = new.view(-1, *[1] * (labels.ndim - 1)).expand(-1, *labels.shape[1:])
        return widened.movedim(0, index_map.dim)

    def is_new(self, labels: Tensor) -> Tensor:
        """Which labels are those of new channels."""
        return self.classes.roots(labels) >= self.first_new

    def units_of(self, roots: Tensor) -> Tensor:
        """The new units that labels' representatives are of; NO_CHANNEL for those of old channels."""
        new = roots.numpy() - self.first_new
        return torch.from_numpy(np.asarray(np.where(new >= 0, self.units.numpy()[np.maximum(new, 0)], NO_CHANNEL)))

    def index_map(self, name: str, grown: Tensor, before: Tensor, dim: int) -> IndexMap:
        """Where new units arrived among the channels that a layer reads or carries."""
        roots = self.classes.roots(grown)
        return arrived_units(roots, self.classes.roots(before), self.units_of(roots), self.k, dim, name)

    def run_reached(self) -> None:
        """Nodes in their order, from those that write new channels up to the layers that read them.

        Raises:
            CannotWidenError: a check of the safety net failed.
        """
        uses = self.program.attribute_uses
        starts = {node for node, layer in self.layers.items() if layer.name in self.row_maps}
        starts |= {node for place in self.sizes for node in uses[place] if node not in self.layers}
        for graph in (program.graph for program in self.program.every):
            starts |= {node for rider in self.rider_maps for node in graph.find_nodes(op="get_attr", target=rider.name)}
            self._run_from([node for node in starts if node.graph is graph])
        check_new_labels(self.classes, self.first_new, self.units)
        check_arrivals(self.layers.values(), self.layout, self.labelling, self.reads, bool(self.sums))
        self._resize_calls()

    def _run_from(self, starts: Iterable[fx.Node]) -> None:
        """Runs nodes of one graph, and what follows those whose value changes."""
        waiting, seen = sorted(starts), set(starts)
        while waiting:
            node = heapq.heappop(waiting)
            if self._changes(node):
                self.reached.append(node)
                for user in node.users:
                    if user not in seen:
                        seen.add(user)
                        heapq.heappush(waiting, user)

    def _changes(self, node: fx.Node) -> bool:
        """Runs a node. Whether its value is another than before."""
        try:
            self._prepare(node)
            value = self.evaluate(node, self.values)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise CannotWidenError(located(node, f"{name_of(node)} does not accept the wider axis")) from error
        layer, before = self.layers.get(node), self.before.values[node]
        check_numbers(node, layer is not None, self.values, self.before.values, self.sizes)
        only_reads = layer is not None and layer.name in self.before.rows and layer.name not in self.row_maps
        if only_reads or self._is_unchanged(value, before):
            return False
        if isinstance(value, Tensor) and isinstance(before, Tensor) and not self._is_checked(node, value, before):
            check_order(node, self.classes, self.first_new, value, before)
        self.values[node] = value
        self._checked[node] = self.classes.unions
        return True

    def _prepare(self, node: fx.Node) -> None:
        """What is to be known of a node before it runs."""
        layer = self.layers.get(node)
        if layer is not None and isinstance(inputs := self.values[layer.inputs], Tensor):
            check_read(layer, inputs.shape, self.layout)
            if isinstance(layer.rule, EdgeRule):
                self.reads[layer.name] += 1
        if op_name(node) == ATTENTION:
            self._keep_scale(node)

    def _keep_scale(self, node: fx.Node) -> None:
        """The scale of attention's softmax stays what it was."""
        args, kwargs = self.arguments(node, self.values)
        arguments = dict(zip(ATTENTION_ARGUMENTS, args, strict=False)) | kwargs
        width = self.before.values[node.all_input_nodes[0]].shape[-1]
        if arguments["query"].shape[-1] != width and arguments.get("scale") is None:
            end = ATTENTION_ARGUMENTS.index("scale")
            self.literals[node] = node.args[:end], {**node.kwargs, "scale": width**-0.5}

    def _is_checked(self, node: fx.Node, value: object, before: object) -> bool:
        """Whether a node gives out the labels that it got, now and before, checked as the classes are now."""
        return isinstance(value, Tensor) and any(
            self._checked.get(source) == self.classes.unions
            and value is self.values[source]
            and before is self.before.values[source]
            for source in node.all_input_nodes
        )

    def _is_unchanged(self, value: object, before: object) -> bool:
        if value is before:
            return True
        if not (isinstance(value, Tensor) and isinstance(before, Tensor)):
            return not tensors_in((value, before)) and bool(value == before)
        return value.shape == before.shape and torch.equal(
            self.classes.roots(unexpanded(value)), self.classes.roots(unexpanded(before))
        )

    def _resize_calls(self) -> None:
        """Functions that are called with a number of groups get the new one."""
        for node in self.reached:
            layer = self.layers.get(node)
            if layer is not None and layer.paths:
                sizes = layer_sizes(layer, self.labelling, self.before)
                arguments = resized_call(node, layer, sizes, self.values)
                if arguments is not None:
                    self.literals[node] = arguments

    def call_arguments(self, node: fx.Node) -> Arguments:
        return with_attributes((node.args, dict(node.kwargs)), self.sizes)

    def is_channel(self, labels: Tensor) -> Tensor:
        roots = self.classes.roots(labels)
        return ((roots >= 0) & (roots < self.labelling.channels)) | (roots >= self.first_new)

    def check_taken_together(self, node: fx.Node, inputs: Tensor, dims: Iterable[int]) -> None:
        check_size(node, inputs.shape, self.before.values[node.all_input_nodes[0]].shape, dims)

    def created(self, node: fx.Node, args: tuple, kwargs: dict) -> object:
        if op_name(node) not in UNIFORM:  # what it is called with follows the width, or nobody would ask
            raise CannotWidenError(located(node, f"what {name_of(node)} makes follows the width"))
        return super().created(node, args, kwargs)

    def check_product(self, node: fx.Node, product: Contraction, left: Tensor, right: Tensor) -> None:
        before = [labels for n in node.all_input_nodes if isinstance(labels := self.before.values[n], Tensor)]
        if len(before) == 2 and not any(bool(self.is_new(unexpanded(side)).any()) for side in (left, right)):
            shape, shape_before = (product.aligned(*sides)[0].shape for sides in ((left, right), before))
            check_size(node, shape, shape_before, range(len(product.out), len(shape)))

    def sum_products(self, node: fx.Node, left: Tensor, right: Tensor) -> None:
        """New channels are summed with old ones: those of one side will have to be zero."""
        a, b = torch.broadcast_tensors(*(self.units_of(self.classes.roots(side)) for side in (left, right)))
        if bool(((a != b) & (a != NO_CHANNEL) & (b != NO_CHANNEL)).any()):
            raise CannotWidenError(located(node, f"{op_name(node)} would multiply different new channels"))
        new_left, new_right = (torch.unique(side[self.is_new(side)]) for side in (left, right))
        self.sums.append((node, new_left, new_right))

    def moved(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        """What the operation gives, with the sizes that it needs."""
        before = _parts(self.before.values[node])
        shapes = [expected_shape(self.layout, b, self.k) if isinstance(b, Tensor) else None for b in before]
        try:
            value = moved(node, args, kwargs)
            if all(shape in (None, v.shape) for shape, v in zip(shapes, _parts(value), strict=False)):
                source = self.before.values[node.all_input_nodes[0]]
                check_split(node, args[0], source, _parts(value), before)
                return value
        except (RuntimeError, IndexError):
            if all(shape is None for shape in shapes):
                raise
        return self._moved_otherwise(node, args, shapes)

    def _moved_otherwise(self, node: fx.Node, args: tuple, shapes: Shapes) -> object:
        """What the operation gives with other sizes, where some of the shapes that it must give are known."""
        module = node.meta["module"]
        if isinstance(module, nn.Unflatten) and isinstance(module.dim, int) and shapes[0] is not None:
            sizes = unflattened_sizes(module.dim, module.unflattened_size, node, shapes[0])
            self.attributes[str(node.target)] = {"unflattened_size": sizes}
            return args[0].unflatten(module.dim, sizes)
        call, before = self.call_arguments(node), self.before.values
        arguments = rewritten_arguments(node, call, self.values, before, shapes, self.is_new)
        if arguments is None:
            raise CannotWidenError(located(node, f"what {name_of(node)} gives does not follow the axis"))
        self.literals[node] = arguments
        return moved(node, *fx.map_arg(arguments, lambda n: self.values[n]))


def _parts(value: object) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else [value]
