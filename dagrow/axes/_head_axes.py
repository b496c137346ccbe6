"""Heads: where a width is laid out over several dimensions, it can grow along one of them at a time.

In come axes that take no single channel more, out go those that stand for them. A projection of h heads of d channels
does not take a channel more, but one more channel in every head, or one more head. So channels that differ along the
other dimensions only are made one unit, and everything that follows is labelled again. The same holds for the groups of
a shuffle, and for parts of one projection that are cut apart.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from dagrow.axes._channel_labels import ChannelLabeller, Labelling
from dagrow.axes._grouping import AxisLayout, group
from dagrow.axes._label_tensors import distinguishing_dims, unexpanded
from dagrow.layers import CUTS, LayerSite, op_name
from dagrow.tracing import Program

_LAYOUTS = {"view", "reshape", "unflatten"}
_RANKS = 3  #: dimensions over which a width may be laid out: parts, heads, channels


def head_axes(
    program: Program,
    layers: Mapping[fx.Node, LayerSite],
    layouts: Sequence[AxisLayout],
    obstacle: Callable[[AxisLayout], str | None],
) -> tuple[list[AxisLayout], list[AxisLayout]]:
    """The axes of heads, head widths and parts that can grow, and those among ``layouts`` that they stand for.

    Args:
        program: the graph of the model's forward.
        layers: its layers.
        layouts: axes of one labelling that take no single channel more.
        obstacle: why an axis cannot widen, or None.

    Returns:
        Axes of another labelling, and those that they stand for.
    """
    labelling = layouts[0].labelling
    dims = dict(_laid_out(program, labelling, _labels_of(layouts)))
    growable: list[AxisLayout] = []
    replaced: dict[AxisLayout, None] = {}
    for rank in range(1, _RANKS + 1):
        unit_dims = {node: node_dims[-rank] for node, node_dims in dims.items() if rank <= len(node_dims)}
        remaining = list(layouts) if unit_dims or rank == 1 else []
        for is_split in (False, True):
            splits = list(_equal_splits(program, labelling, _labels_of(remaining))) if is_split else []
            if not remaining or not (splits if is_split else unit_dims):
                continue
            merged = _merged(program, layers, replace(labelling, unit_dims=unit_dims), splits)
            fitting = [part for part in group(merged, _labels_of(remaining)) if obstacle(part) is None]
            growable += fitting
            grows = merged.classes.membership(_labels_of(fitting))
            replaced |= {layout: None for layout in remaining if bool(grows[merged.classes.roots(layout.labels)].any())}
            remaining = [layout for layout in remaining if layout not in replaced]
    return growable, list(replaced)


def _labels_of(layouts: Iterable[AxisLayout]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.long), *(layout.labels for layout in layouts)])


def _nodes(program: Program) -> Iterator[fx.Node]:
    """Of all examples."""
    return (node for part in program.every for node in part.graph.nodes)


def _laid_out(program: Program, labelling: Labelling, labels: Tensor) -> Iterator[tuple[fx.Node, list[int]]]:
    """Where channels are laid out over several dimensions, and which."""
    is_member = labelling.classes.membership(labels)
    for node in _nodes(program):
        value = labelling.values.get(node)
        if op_name(node) in _LAYOUTS and isinstance(value, Tensor):
            roots = labelling.classes.roots(unexpanded(value))
            dims = distinguishing_dims(roots, is_member[roots])
            if len(dims) > 1:
                yield node, dims


def _equal_splits(program: Program, labelling: Labelling, labels: Tensor) -> Iterator[list[Tensor]]:
    """Parts of the same shape that channels are cut into."""
    is_member = labelling.classes.membership(labels)
    for node in _nodes(program):
        parts = labelling.values.get(node)
        if op_name(node) in CUTS and isinstance(parts, (tuple, list)):
            all_hold = all(bool(is_member[labelling.classes.roots(unexpanded(part))].any()) for part in parts)
            if all_hold and len({part.shape for part in parts}) == 1:
                yield list(parts)


def _merged(
    program: Program, layers: Mapping[fx.Node, LayerSite], before: Labelling, splits: Iterable[Sequence[Tensor]]
) -> Labelling:
    """A labelling in which channels are one along all but the unit dimensions, and the parts of each split are one."""
    labelling = replace(
        before,
        classes=before.classes.copy(),
        values=dict(before.values),
        columns=dict(before.columns),
        entries=dict(before.entries),
        broadcast=list(before.broadcast),
    )
    labeller, values = ChannelLabeller(program.model, layers, labelling), labelling.values
    for first, *others in splits:
        for other in others:
            labelling.classes.unite(unexpanded(first), unexpanded(other))
    for node, dim in labelling.unit_dims.items():
        labeller.unite_units(values[node], dim)
    changed, arrived = set(labelling.unit_dims), set()
    for node in _nodes(program):  # what follows them is labelled again
        if not any(source in changed for source in node.all_input_nodes):
            continue
        layer = layers.get(node)
        if layer is None or layer.name not in labelling.rows:
            labeller.run([node], values)
            changed.add(node)
        elif isinstance(values[layer.inputs], Tensor):
            if layer.name not in arrived:
                del labelling.columns[layer.name]
            arrived.add(layer.name)
            labeller.edge(node, layer, values[layer.inputs])  # what it writes is what it was
    return labelling
