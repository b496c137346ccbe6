"""What has to change where when an axis widens: growing is relabelling.

In come an axis and a number of new units, out goes a plan. Every consumer and rider tells where the new channels
arrived. Where two operands are multiplied and summed over the axis, as in attention over the width of a head, new
channels change nothing if those of one operand are zero; so the rows that write these start at zero, and must arrive
at the sum as zero.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, fx

from dagrow.axes._attribute_sizes import (
    Attributes,
    AttributeSizes,
    changed_attributes,
    resized_attributes,
    resolve_sizes,
)
from dagrow.axes._channel_labels import Rider
from dagrow.axes._grouping import AxisLayout
from dagrow.axes._index_map import CannotWidenError, IndexMap
from dagrow.axes._label_interpreter import located
from dagrow.axes._label_tensors import unexpanded
from dagrow.axes._size_rewriting import Arguments
from dagrow.axes._widened_labels import WidenedLabeller
from dagrow.layers import MOVES, ZERO_KEEPING, LayerSite, is_move_module, keeps_zero, op_name
from dagrow.tracing import AttributeInt, AttributePath, Comparison, Program, Trial

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class WideningPlan:
    """What changes where when an axis widens.

    Attributes:
        rows: producer -> where its new rows are.
        columns: consumer -> where its new columns are.
        entries: rider -> where its new entries are.
        literals: node -> its arguments in the grown network.
        attributes: of modules that state a size.
        written: whether the forward must be written anew, with the literals in it; else the attributes change it.
        zeros: producer -> which slots of a new unit must start at zero ``[slots]``.
        silent: whether some of what layers read of a new unit starts at zero.
        trials: for each example of which a comparison of sizes comes out otherwise, its number and its sizes.
    """

    rows: Mapping[str, IndexMap]
    columns: Mapping[str, IndexMap]
    entries: Mapping[Rider, IndexMap]
    literals: Mapping[fx.Node, Arguments] = field(default_factory=dict)
    attributes: Attributes = field(default_factory=dict)
    written: bool = False
    zeros: Mapping[str, Tensor] = field(default_factory=dict)
    silent: bool = False
    trials: Sequence[tuple[int, Trial]] = ()

    @property
    def touched(self) -> set[tuple[str, str]]:
        """The sides of layers, nodes and modules that change."""
        sides = {("read", name) for name in self.columns} | {("written", name) for name in self.rows}
        sides |= {("rider", rider.name) for rider in self.entries}
        sides |= {("literal", node.name) for node in self.literals}
        return sides | {("module", name) for name in self.attributes}


def disjoint(items: Sequence[T], widening: Callable[[T], WideningPlan]) -> list[list[T]]:
    """Groups what widens axes so that no two of a group change the same side of a layer, or the same size.

    Args:
        items: what widens an axis each.
        widening: the plan of one.

    Returns:
        Groups of items, in their order.
    """
    groups: list[tuple[set[tuple[str, str]], list[T]]] = []
    for item in items:
        touched = widening(item).touched
        for taken, group in groups:
            if not taken & touched:
                taken |= touched
                group.append(item)
                break
        else:
            groups.append((touched, [item]))
    return [group for _, group in groups]


def widen(program: Program, layers: Mapping[fx.Node, LayerSite], layout: AxisLayout, k: int) -> WideningPlan:
    """Plans k new units on an axis. Changes nothing.

    Args:
        program: the graph of the model's forward.
        layers: its layers, as :func:`labelled` gives them.
        layout: of the axis.
        k: how many units.

    Returns:
        The plan.

    Raises:
        CannotWidenError: the model cannot take them; the message is the reason.
    """
    if layout.reason:
        raise CannotWidenError(layout.reason)
    run, before = _fitting_run(program, layers, layout, k), layout.labelling
    columns = {
        edge: run.index_map(edge, run.labelling.columns[edge], before.columns[edge], 1) for edge in layout.columns
    }
    entries = {
        rider: run.rider_maps.get(rider)
        or run.index_map(rider.name, run.labelling.entries[rider], before.entries[rider], 0)
        for rider in layout.entries
    }
    resized = resized_attributes(program.model, layers, layout, run.labelling)
    stated = {**resized, **run.sizes}
    trials, otherwise = _comparisons(run, stated)
    fixed = _as_they_are(otherwise) | run.literals
    literals, attributes, written = resolve_sizes(program, fixed, run.attributes, resized, run.sizes)
    if written:  # a forward that is written anew has no attributes to compare with
        literals = _as_they_are(_with_attributes(program, stated)) | dict(literals)
    read = torch.cat(
        [torch.empty(0, dtype=torch.long)]
        + [run.classes.roots(run.labelling.columns[edge][columns[edge].new.flatten()]) for edge in columns]
    )
    zero = _zero_labels(run, read)
    zeros, silent = _zero_slots(run, zero), bool(torch.isin(read, zero).any())
    return WideningPlan(run.row_maps, columns, entries, literals, attributes, written, zeros, silent, trials)


def _as_they_are(comparisons: Iterable[Comparison]) -> dict[fx.Node, Arguments]:
    """The nodes that are compared, as literals: the graph holds for them in the wider network."""
    return {node: (node.args, dict(node.kwargs)) for each in comparisons for node in each.nodes}


def _with_attributes(program: Program, stated: AttributeSizes) -> Iterator[Comparison]:
    """Comparisons with numbers that modules state, where these change."""
    for each in (each for part in program.every for each in part.comparisons):
        sides = [side for side in (each.left, each.right) if isinstance(side, AttributeInt)]
        if any(stated.get(side.path, side) != side for side in sides):
            yield each


def _comparisons(run: WidenedLabeller, attributes: AttributeSizes) -> tuple[list[tuple[int, Trial]], list[Comparison]]:
    """What comes out otherwise in the wider network: trials of it, and the comparisons."""

    def value(side: object) -> object:
        if isinstance(side, AttributeInt):
            return attributes.get(side.path, int(side))
        return run.values[side] if isinstance(side, fx.Node) else side

    trials, found = [], list[Comparison]()
    for number, program in enumerate(run.program.every):
        otherwise = [each for each in program.comparisons if each.comes_out_otherwise(value)]
        if otherwise:
            values = {node.name: run.values[node] for node in program.graph.nodes}
            sizes = {name: v.shape if isinstance(v, Tensor) else v for name, v in values.items()}
            sizes = {name: v for name, v in sizes.items() if isinstance(v, (int, torch.Size))}
            trials.append((number, Trial(sizes, attributes)))
            found += otherwise
    return trials, found


def _fitting_run(program: Program, layers: Mapping[fx.Node, LayerSite], layout: AxisLayout, k: int) -> WidenedLabeller:
    """A run in which numbers that modules state change wherever they are used; else only where they must."""
    sizes: dict[AttributePath, int] = {}
    fitting, first_error = None, None
    while True:
        run = WidenedLabeller(program, layers, layout, k, sizes)
        try:
            run.run_reached()
            fitting = run
        except CannotWidenError as error:
            first_error = first_error or error
        changed = changed_attributes(run.literals)
        if changed.keys() <= sizes.keys():
            break
        sizes = {**changed, **sizes}
    if fitting is None:
        assert first_error is not None
        raise first_error
    return fitting


def _zero_labels(run: WidenedLabeller, read: Tensor) -> Tensor:
    """Of the new labels those that must start at zero: of one side of each sum, one that no layer reads if there is."""
    zero = torch.empty(0, dtype=torch.long)
    for node, *sides in run.sums:
        left, right = (torch.unique(run.classes.roots(side)) for side in sides)
        if not any(len(side) and bool(torch.isin(side, zero).all()) for side in (left, right)):
            given = sorted((s for s in (right, left) if len(s)), key=lambda side: bool(torch.isin(side, read).any()))
            zero = torch.cat([zero, _staying_zero(run, node, given)])
    return zero


def _staying_zero(run: WidenedLabeller, product: fx.Node, sides: Sequence[Tensor]) -> Tensor:
    """The first of the sides of a sum that arrives there as zero if it is written so."""
    for last, side in enumerate(sides, start=1 - len(sides)):
        try:
            _check_stays_zero(run, product, side)
        except CannotWidenError:
            if not last:
                raise
        else:
            return side
    return torch.empty(0, dtype=torch.long)


def _zero_slots(run: WidenedLabeller, zero: Tensor) -> dict[str, Tensor]:
    """Producer -> which slots of a new unit must start at zero, if any. Raises CannotWidenError if none would do."""
    slots = {}
    for edge, index_map in run.row_maps.items():
        unit = run.labelling.rows[edge][index_map.new[0]]  # the first new one, as which all are
        slots[edge] = torch.isin(run.classes.roots(unit), zero)
    if run.sums and all(bool(is_zero.all()) for is_zero in slots.values()):
        raise CannotWidenError("all that is written there would have to start at zero, so that it could not learn")
    return {edge: is_zero for edge, is_zero in slots.items() if bool(is_zero.any())}


def _check_stays_zero(run: WidenedLabeller, product: fx.Node, side: Tensor) -> None:
    """Raises CannotWidenError if what is written as zero does not arrive at a sum of products as zero."""
    sums, is_zero = {node for node, _, _ in run.sums}, run.classes.membership(side)
    for node in run.reached:
        value = run.values[node]
        if node in sums or node.op == "get_attr" or not isinstance(value, Tensor):
            continue
        if bool(is_zero[run.classes.roots(unexpanded(value))].any()) and not _keeps_zero(run, node, is_zero):
            reason = f"new channels that start at zero do not stay zero before {op_name(product)}"
            raise CannotWidenError(located(node, reason))


def _keeps_zero(run: WidenedLabeller, node: fx.Node, is_zero: Tensor) -> bool:
    """Whether a node gives zeros where its value is of labels that are zero."""
    if node in run.layers:
        return True
    if node.op == "call_module":
        module = node.meta["module"]
        return is_move_module(module) or keeps_zero(module)
    name = op_name(node)
    if name in {"add", "sub", "subtract"}:  # of two that are zero at the same places
        zeros = is_zero[run.classes.roots(run.values[node])]
        operands = [operand for n in node.all_input_nodes if isinstance(operand := run.values[n], Tensor)]
        return len(operands) == 2 and all(
            torch.equal(is_zero[run.classes.roots(operand)].expand_as(zeros), zeros) for operand in operands
        )
    if name in {"div", "divide", "truediv"}:
        return isinstance(node.args[0], fx.Node)
    return name in MOVES | ZERO_KEEPING
