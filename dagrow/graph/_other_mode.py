"""The mode that a model was not traced in: what runs there only, such as an auxiliary head, must not miss a channel."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from dagrow._model_state import preserve_state
from dagrow.axes import AxisLayout, CannotWidenError, Labelling, WideningPlan, group, labelled, widen
from dagrow.errors import first_line
from dagrow.layers import LayerRule, LayerSite, layer_sites
from dagrow.tracing import CAST, Program, device_of, tensor_at


def in_other_mode(model: nn.Module, trace: Callable[[], Program]) -> Program | str:
    """What ``trace`` gives in evaluation for a model in training and the other way round, or why it gives nothing."""
    with preserve_state(model, weights=True):
        try:
            model.train(not model.training)
            return trace()
        except Exception as error:  # the user's forward may raise anything in a mode that nobody asked for
            return first_line(error)


def under_autocast(model: nn.Module, trace: Callable[[], Program]) -> Program | str:
    """What ``trace`` gives with autocast on where it is off and the other way round, or why it gives nothing."""
    device = device_of(model)
    with preserve_state(model, weights=True):
        try:
            with torch.autocast(device, CAST, enabled=not torch.is_autocast_enabled(device)):
                return trace()
        except Exception as error:  # the user's forward may raise anything there
            return first_line(error)


def unused(program: Program) -> set[str]:
    """Parameters and buffers of numbers that the graphs of no example use."""
    tensors = dict(_tensors(program.model))
    used: set[int] = set()
    for node in (node for part in program.every for node in part.graph.nodes):
        if node.op == "call_module":
            used |= {id(tensor) for _, tensor in _tensors(program.model.get_submodule(str(node.target)))}
        elif node.op == "get_attr" and node.target not in program.constants:
            used.add(id(tensor_at(program.model, str(node.target))))
    return {name for name, tensor in tensors.items() if id(tensor) not in used}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if buffer.is_floating_point())


def on_labels(program: Program, rules: Sequence[LayerRule]) -> tuple[dict[fx.Node, LayerSite], Labelling]:
    """The layers of all examples, and what a run of their graphs on labels shows."""
    sites: dict[fx.Node, LayerSite] = {}
    for part in program.every:
        sites |= layer_sites(part.graph, part.model, rules)
    return labelled(program.graph, program.model, sites, [part.graph for part in program.also])


@dataclass(frozen=True, eq=False)
class OtherMode:
    """The graph in the other mode, run on labels."""

    program: Program
    layers: Mapping[fx.Node, LayerSite]
    labels: Labelling

    @classmethod
    def of(cls, program: Program, rules: Sequence[LayerRule]) -> "OtherMode":
        return cls(program, *on_labels(program, rules))

    def obstacle(self, layout: AxisLayout, widening: WideningPlan) -> str | None:
        """Why an axis that can widen in the mode that was traced cannot in the other.

        Args:
            layout: of the axis.
            widening: how it widens in the mode that was traced.

        Returns:
            The reason. None if it can, and where the other mode cuts it into other axes: that shows when a growth is
            tried out.
        """
        mode = "evaluation" if self.program.model.training else "training"
        labels = self.labels.rows
        rows = [labels[edge][channels.flatten()] for edge, channels in layout.rows.items() if edge in labels]
        parts = group(self.labels, only=torch.cat(rows)) if rows else []
        names = {name for part in parts for name in _names(part)} - _names(layout)
        if names:
            return f"in {mode}, {min(names)} has its channels too; trace the model in that mode"
        frozen = [part.reason for part in parts if part.reason]
        if frozen:
            return f"in {mode} it {frozen[0]}"
        if len(parts) != 1 or _units(parts[0]) != _units(layout):
            return None
        try:
            plan = widen(self.program, self.layers, parts[0], 1)
        except CannotWidenError as misfit:
            return f"in {mode}: {misfit}"
        columns = widening.columns
        moved = [name for name, there in plan.columns.items() if not torch.equal(there.new, columns[name].new)]
        return f"in {mode} new channels would arrive at other places of {moved[0]}" if moved else None


def _names(layout: AxisLayout) -> set[str]:
    return {*layout.rows, *layout.columns, *(rider.name for rider in layout.entries)}


def _units(layout: AxisLayout) -> dict[str, list[list[int]]]:
    return {edge: rows.tolist() for edge, rows in layout.rows.items()}
