"""What has to change where when an axis widens: growing is relabelling.

Every consumer and rider tells where the new channels landed. Where two operands are multiplied and summed over the
axis, as in attention over the width of a head, new channels change nothing if those of one operand are zero; so the
rows that write these start at zero, and must arrive at the sum as zero.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from dagrow.axes._channel_labels import Rider
from dagrow.axes._grouping import AxisLayout
from dagrow.axes._index_map import CannotWidenError, IndexMap
from dagrow.axes._size_rewriting import Arguments, changed_attributes, resolve_sizes
from dagrow.axes._union_find import narrow
from dagrow.axes._widened_labels import WidenedLabeller
from dagrow.layers import MOVES, ZERO_KEEPING, LayerSite, is_move_module, keeps_zero, op_name
from dagrow.tracing import AttributePath, Program


def zeros(run: WidenedLabeller) -> dict[str, Tensor]:
    """Producer -> which slots of a new unit must start at zero, if any. Raises CannotWidenError if none would do."""
    zero = torch.empty(0, dtype=torch.long)
    for node, left, right in run.sums:
        left, right = run.classes.roots(left), run.classes.roots(right)
        if not any(len(side) and bool(torch.isin(side, zero).all()) for side in (left, right)):
            side = right if len(right) else left
            _check_arrives(run, node, side)
            zero = torch.cat([zero, torch.unique(side)])
    masks = {edge: torch.isin(run.classes.roots(labels), zero)[0] for edge, labels in run.written.items()}
    if run.sums and all(bool(mask.all()) for mask in masks.values()):
        raise CannotWidenError("all that is written there would have to start at zero, so that it could not learn")
    return {edge: mask for edge, mask in masks.items() if bool(mask.any())}


def _check_arrives(run: WidenedLabeller, sum_: fx.Node, side: Tensor) -> None:
    """Raises CannotWidenError if what is written as zero does not arrive at a sum as zero."""
    sums, zero = {node for node, _, _ in run.sums}, run.classes.chosen(side)
    for node in run.reached:
        value = run.values[node]
        if node in sums or node.op == "get_attr" or not isinstance(value, Tensor):
            continue
        if bool(zero[run.classes.roots(narrow(value))].any()) and not _keeps_zero(run, node, zero):
            text = f"new channels that start at zero do not stay zero before {op_name(sum_)}"
            raise CannotWidenError(run.located(node, text))


def _keeps_zero(run: WidenedLabeller, node: fx.Node, zero: Tensor) -> bool:
    if node in run.layers:
        return True
    if node.op == "call_module":
        module = node.meta["module"]
        return is_move_module(module) or keeps_zero(module)
    name = op_name(node)
    if name in {"add", "sub", "subtract"}:  # of two that are zero at the same places
        operands = [run.values[source] for source in node.all_input_nodes]
        held = zero[run.classes.roots(run.values[node])]
        whole = [zero[run.classes.roots(o)].expand_as(held) for o in operands if isinstance(o, Tensor)]
        return len(whole) == 2 and all(torch.equal(w, held) for w in whole)
    if name in {"div", "divide", "truediv"}:
        return isinstance(node.args[0], fx.Node)
    return name in MOVES | ZERO_KEEPING


T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class WideningPlan:
    """What changes where when an axis widens.

    Attributes:
        literals: node -> its arguments in the grown network.
        attributes: of modules that state a size.
        written: whether the forward must be written anew, with the literals in it; else the attributes change it.
        zeros: producer -> which slots of a new unit must start at zero ``[slots]``.
    """

    rows: Mapping[str, IndexMap]
    columns: Mapping[str, IndexMap]
    entries: Mapping[Rider, IndexMap]
    literals: Mapping[fx.Node, Arguments] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    written: bool = False
    zeros: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def touched(self) -> set[tuple[str, str]]:
        """The sides of layers, nodes and modules that change."""
        return {
            *(("read", name) for name in self.columns),
            *(("written", name) for name in self.rows),
            *(("rider", rider.name) for rider in self.entries),
            *(("literal", node.name) for node in self.literals),
            *(("module", name) for name in self.attributes),
        }


def disjoint(items: Sequence[T], widening: Callable[[T], WideningPlan]) -> list[list[T]]:
    """Groups what widens axes so that no two of a group change the same side of a layer, or the same size."""
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
    """Plans k new units on an axis. Raises :class:`CannotWidenError` with the reason if the model cannot take them."""
    if layout.reason:
        raise CannotWidenError(layout.reason)
    runner, before = _settled_run(program, layers, layout, k), layout.found
    columns = {
        edge: runner.landed(edge, runner.found.columns[edge], before.columns[edge], 1) for edge in layout.columns
    }
    entries = {
        r: runner.riders.get(r) or runner.landed(r.name, runner.found.entries[r], before.entries[r], 0)
        for r in layout.entries
    }
    literals, attributes, written = resolve_sizes(
        program, runner.literals, runner.attributes, runner.resized(), runner.restated
    )
    return WideningPlan(runner.landings, columns, entries, literals, attributes, written, zeros(runner))


def _settled_run(program: Program, layers: Mapping[fx.Node, LayerSite], layout: AxisLayout, k: int) -> WidenedLabeller:
    """A run in which a number that a module states changes wherever it is used, if there is one that fits; else one
    in which sizes change only where they must."""
    restated: dict[AttributePath, int] = {}
    fitting, misfit = None, None
    while True:
        runner = WidenedLabeller(program, layers, layout, k, restated)
        try:
            runner.run_reached()
            runner.check()
            runner.restate()
            fitting = runner
        except CannotWidenError as error:
            misfit = misfit or error
        more = changed_attributes(runner.literals)
        if more.keys() <= restated.keys():
            break
        restated = {**more, **restated}
    if fitting is None:
        assert misfit is not None
        raise misfit
    return fitting
