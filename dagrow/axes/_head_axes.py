"""Heads: where a width is laid out over several dimensions, it can grow along one of them at a time.

A projection of h heads of d channels does not take a channel more, but one more channel in every head, or one more
head. So channels that differ along the other dimensions only are made one unit, and everything that follows is labelled
again. The same holds for the groups of a shuffle, and for parts of one projection that are cut apart.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from dagrow.axes._channel_labels import ChannelLabeller, Labelling
from dagrow.axes._grouping import AxisLayout, group
from dagrow.axes._size_rewriting import carrying
from dagrow.axes._union_find import narrow
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
        layouts: axes of one labelling that take no single channel more.
        obstacle: why an axis cannot widen, or None.
    """
    found, labels = layouts[0].found, torch.cat([layout.labels for layout in layouts])
    spread = dict(_spread(program.graph, found, labels))
    grown: list[AxisLayout] = []
    replaced: dict[AxisLayout, None] = {}
    for rank in range(1, _RANKS + 1):
        joined = {node: dims[-rank] for node, dims in spread.items() if rank <= len(dims)}
        left = list(layouts) if joined or rank == 1 else []
        for together in (False, True):
            cuts = list(_cut(program.graph, found, torch.cat([at.labels for at in left]))) if left and together else []
            if not left or not (cuts if together else joined):
                continue
            runner = _HeadLabeller(program.model, layers, replace(found, joined=joined))
            runner.join(program.graph, cuts)
            parts = group(runner.found, torch.cat([layout.labels for layout in left]))
            able = [part for part in parts if obstacle(part) is None]
            grown += able
            held = runner.classes.chosen(torch.cat([part.labels for part in able]) if able else labels[:0])
            done = [layout for layout in left if bool(held[runner.classes.roots(layout.labels)].any())]
            replaced |= dict.fromkeys(done)
            left = [layout for layout in left if layout not in replaced]
    return grown, list(replaced)


def _spread(graph: fx.Graph, found: Labelling, labels: Tensor) -> Iterator[tuple[fx.Node, list[int]]]:
    """Where channels are laid out over several dimensions, and which."""
    chosen = found.classes.chosen(labels)
    for node in graph.nodes:
        value = found.values.get(node)
        if op_name(node) not in _LAYOUTS or not isinstance(value, Tensor):
            continue
        thin = found.classes.roots(narrow(value))
        members = chosen[thin]
        if bool(members.any()):
            dims = carrying(thin, members)
            if len(dims) > 1:
                yield node, dims


def _cut(graph: fx.Graph, found: Labelling, labels: Tensor) -> Iterator[list[Tensor]]:
    """Parts of the same shape that channels are cut into."""
    chosen = found.classes.chosen(labels)
    for node in graph.nodes:
        pieces = found.values.get(node)
        if op_name(node) in CUTS and isinstance(pieces, (tuple, list)):
            inside = all(bool(chosen[found.classes.roots(narrow(p))].any()) for p in pieces)
            if inside and len({piece.shape for piece in pieces}) == 1:
                yield list(pieces)


class _HeadLabeller(ChannelLabeller):
    """Labels again what follows nodes where channels became one."""

    def __init__(self, model: nn.Module, layers: Mapping[fx.Node, LayerSite], before: Labelling) -> None:
        found = replace(
            before,
            classes=before.classes.copy(),
            values=dict(before.values),
            columns=dict(before.columns),
            entries=dict(before.entries),
            aside=list(before.aside),
        )
        super().__init__(model, layers, found)
        self.arrived: set[str] = set()

    def join(self, graph: fx.Graph, cuts: Iterable[Sequence[Tensor]]) -> None:
        """Makes channels one along all but the chosen dimensions, and parts among each other."""
        values = self.found.values
        for first, *others in cuts:
            for other in others:
                self.classes.unite(narrow(first), narrow(other))
        for node, dim in self.found.joined.items():
            together = narrow(values[node]).movedim(dim, 0).flatten(1)
            self.classes.unite(together[:, :1], together)
        dirty = set(self.found.joined)
        for node in graph.nodes:
            if any(source in dirty for source in node.all_input_nodes):
                layer = self.layers.get(node)
                if layer is not None and layer.name in self.found.rows:
                    self._arrive(node, layer)
                else:
                    self.run([node], values)
                    dirty.add(node)

    def _arrive(self, node: fx.Node, layer: LayerSite) -> None:
        """The edge's own output is what it was."""
        if isinstance(self.found.values[layer.inputs], Tensor):
            if layer.name not in self.arrived:
                del self.found.columns[layer.name]
            self.arrived.add(layer.name)
            self.edge(node, layer, self.found.values[layer.inputs])
