"""The safety net of widening: what must hold of labels in a network in which one axis is wider.

In come labels, or shapes of labels, now and before; each function raises CannotWidenError, with the reason, where its
condition fails. No fresh label froze; fresh labels of different units stayed apart from each other and from all old
ones; old labels kept their order; no size stopped to fit.
"""

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from dagrow._pytree import leaf_values
from dagrow.axes._channel_labels import Labelling
from dagrow.axes._grouping import AxisLayout
from dagrow.axes._index_map import CannotWidenError
from dagrow.axes._label_interpreter import Values, located, name_of
from dagrow.axes._label_tensors import unexpanded
from dagrow.axes._union_find import UnionFind
from dagrow.layers import ATTENTION, CUTS, MOVES, UNIFORM, EdgeRule, LayerSite, op_name
from dagrow.tracing import AttributeInt, AttributePath

_FILLING = {"full", "full_like", "new_full"}
_SHAPING = MOVES | UNIFORM - _FILLING | {ATTENTION}


def check_new_labels(classes: UnionFind, first_new: int, units: Tensor) -> None:
    """No new label froze, and those of different units stayed apart from each other and from all old ones.

    Args:
        classes: of all labels.
        first_new: the first of the new labels.
        units: the unit of each of the new labels.

    Raises:
        CannotWidenError: they did not.
    """
    roots = classes.roots(torch.arange(first_new, len(classes)))
    frozen = roots[classes.reason_numbers(roots) > 0]
    if len(frozen):
        raise CannotWidenError(str(classes.reason(int(frozen[0]))))
    meets_old = bool((roots < first_new).any()) or classes.first_changed < first_new  # or unites old ones
    if meets_old or not torch.equal(units[roots - first_new], units):
        raise CannotWidenError("new channels would meet channels that they must stay apart from")


def check_arrivals(
    layers: Iterable[LayerSite], layout: AxisLayout, labelling: Labelling, reads: Mapping[str, int], is_summed: bool
) -> None:
    """New channels arrive wherever old ones are read, at all calls of a layer or at none.

    Args:
        layers: of the graph, one for each call.
        layout: of the axis.
        labelling: of the wider network.
        reads: layer -> how many of its calls were reached.
        is_summed: whether the axis is summed over in a product of activations.

    Raises:
        CannotWidenError: they do not, or nothing reads the axis.
    """
    missed = [edge for edge in layout.columns if edge not in labelling.columns]
    missed += [rider.name for rider in layout.entries if rider not in labelling.entries]
    calls = Counter(layer.name for layer in layers if layer.name in layout.columns)
    missed += [edge for edge in layout.columns if reads[edge] not in (0, calls[edge])]
    if missed:
        raise CannotWidenError(f"new channels do not arrive at {', '.join(missed)}")
    if not layout.columns and not is_summed:
        raise CannotWidenError("no layer reads it")


def check_order(node: fx.Node, classes: UnionFind, first_new: int, labels: Tensor, before: Tensor) -> None:
    """Old labels stay where they were among themselves."""
    if [s == 0 for s in labels.stride()] == [s == 0 for s in before.stride()]:
        labels, before = unexpanded(labels), unexpanded(before)
    roots = classes.roots(labels).numpy().ravel()
    if not np.array_equal(roots[roots < first_new], classes.roots(before).numpy().ravel()):
        raise CannotWidenError(located(node, f"{name_of(node)} would take other channels than before"))


def check_read(layer: LayerSite, shape: torch.Size, layout: AxisLayout) -> None:
    """A layer reads more channels only if it reads the axis, and no more of anything else."""
    before = layer.inputs.meta["val"].shape
    dim = layer.rule.channel_dim(len(shape))
    if isinstance(layer.rule, EdgeRule):
        others = [[size for d, size in enumerate(sizes) if d != dim] for sizes in (shape, before)]
        fits = others[0] == others[1] and (shape == before or layer.name in layout.columns)
    else:
        fits = shape[dim] == before[dim] or any(rider.name == layer.name for rider in layout.entries)
    if not fits:
        raise CannotWidenError(f"new channels would land beside the features that {layer.name} reads")


def check_size(node: fx.Node, shape: torch.Size, before: torch.Size, dims: Iterable[int]) -> None:
    """A constant as wide as an axis, whose entries are taken together, would change."""
    if any(shape[d] != before[d] for d in dims):
        raise CannotWidenError(located(node, f"{name_of(node)} takes all channels together"))


def check_split(node: fx.Node, inputs: Any, before: Any, parts: Sequence[Any], parts_before: Sequence[Any]) -> None:
    """A number of parts, or a size of parts, that does not fit the width cuts elsewhere when it grows."""
    arguments = [*node.args[1:], *node.kwargs.values()]
    if op_name(node) not in CUTS or any(isinstance(argument, (tuple, list)) for argument in arguments):
        return
    changed = [d for d in range(before.ndim) if inputs.shape[d] != before.shape[d]]
    if any(len({part.shape[d] for part in each}) > 1 for d in changed for each in (parts_before, parts)):
        raise CannotWidenError(located(node, f"{op_name(node)} cuts it into uneven parts"))


def check_numbers(
    node: fx.Node, is_layer: bool, values: Values, before: Values, sizes: Mapping[AttributePath, int]
) -> None:
    """No number that follows the width is rounded, no tensor is computed with one, and none is given out.

    Args:
        node: any node.
        is_layer: whether it is a layer that a rule knows.
        values: of nodes in the wider network.
        before: the same before it became wider.
        sizes: what numbers that modules state become.

    Raises:
        CannotWidenError: one is.
    """
    if node.target is operator.floordiv and any(_rounds(node, numbers) for numbers in (values, before)):
        raise CannotWidenError(located(node, "its width is rounded in the model's forward"))
    name = op_name(node)
    computes = isinstance(node.meta.get("val"), Tensor) and name not in _SHAPING and not is_layer
    if not computes and node.op != "output":
        return
    operands = list(leaf_values((node.args, dict(node.kwargs))))
    if name in _FILLING:
        operands = [*node.args[2 if name == "new_full" else 1 :][:1], node.kwargs.get("fill_value")]
    sources = [source for source in operands if isinstance(source, fx.Node)]
    follows = any(isinstance(values[n], (int, float)) and values[n] != before[n] for n in sources)
    if follows or any(isinstance(n, AttributeInt) and sizes.get(n.path, n) != n for n in operands):
        use = "given out by" if node.op == "output" else "used as a number in"
        raise CannotWidenError(located(node, f"its width is {use} the model's forward"))


def _rounds(node: fx.Node, values: Values) -> bool:
    left, right = fx.map_arg(node.args, lambda n: values[n])
    return isinstance(left, int) and isinstance(right, int) and left % right != 0
