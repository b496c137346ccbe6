"""New entries that start at zero, so that sums over an axis that widens keep their value.

Where two operands are multiplied and summed over the axis, new channels change nothing if those of one operand are
zero; so the rows that write these start at zero, and must arrive at the sum as zero.
"""

import torch
from torch import Tensor, fx

from dagrow import ops
from dagrow.classes import narrow
from dagrow.landings import MisfitError
from dagrow.relabelling import GrowthRunner

__all__ = ["zeros"]


def zeros(run: GrowthRunner) -> dict[str, Tensor]:
    """Producer -> which slots of a new unit must start at zero, if any. Raises MisfitError if none would do."""
    zero = torch.empty(0, dtype=torch.long)
    for node, left, right in run.sums:
        left, right = run.classes.roots(left), run.classes.roots(right)
        if not any(len(side) and bool(torch.isin(side, zero).all()) for side in (left, right)):
            side = right if len(right) else left
            _check_arrives(run, node, side)
            zero = torch.cat([zero, torch.unique(side)])
    masks = {edge: torch.isin(run.classes.roots(labels), zero)[0] for edge, labels in run.written.items()}
    if run.sums and all(bool(mask.all()) for mask in masks.values()):
        raise MisfitError("all that is written there would have to start at zero, so that it could not learn")
    return {edge: mask for edge, mask in masks.items() if bool(mask.any())}


def _check_arrives(run: GrowthRunner, sum_: fx.Node, side: Tensor) -> None:
    """Raises MisfitError if what is written as zero does not arrive at a sum as zero."""
    sums, zero = {node for node, _, _ in run.sums}, run.classes.chosen(side)
    for node in run.reached:
        value = run.values[node]
        if node in sums or node.op == "get_attr" or not isinstance(value, Tensor):
            continue
        if bool(zero[run.classes.roots(narrow(value))].any()) and not _keeps_zero(run, node, zero):
            text = f"new channels that start at zero do not stay zero before {ops.op_name(sum_)}"
            raise MisfitError(run.located(node, text))


def _keeps_zero(run: GrowthRunner, node: fx.Node, zero: Tensor) -> bool:
    if node in run.layers:
        return True
    if node.op == "call_module":
        module = node.meta["module"]
        return ops.is_move_module(module) or ops.keeps_zero(module)
    name = ops.op_name(node)
    if name in {"add", "sub", "subtract"}:  # of two that are zero at the same places
        operands = [run.values[source] for source in node.all_input_nodes]
        held = zero[run.classes.roots(run.values[node])]
        whole = [zero[run.classes.roots(o)].expand_as(held) for o in operands if isinstance(o, Tensor)]
        return len(whole) == 2 and all(torch.equal(w, held) for w in whole)
    if name in {"div", "divide", "truediv"}:
        return isinstance(node.args[0], fx.Node)
    return name in ops.MOVES | ops.ZERO_KEEPING
