"""New paths: new layers between an activation and a pre-activation that was computed without them.

A path ``f`` turns ``a = W b`` into ``a = W b + f(x)``, where ``x`` is what some other layer reads.
"""

import copy
import inspect
import operator
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import skip_init
from torch.utils.flop_counter import FlopCounterMode

from dagrow.errors import GrowthError, StoreError
from dagrow.layers import LayerSite
from dagrow.tracing import PathRecord

#: of a weighted layer's arguments, those that state what it reads and writes
WIDTHS = {"in_features", "out_features", "in_channels", "out_channels"}


@dataclass(frozen=True, eq=False)
class NewPath:
    """New layers at their place in a graph.

    Attributes:
        name: of the new module, an attribute of the model.
        module: what is computed, a layer or several in a row, with its weights at gamma = 0.
        reader: the node before which they run: a layer that reads ``source`` as well.
        writer: the node of a layer; what they compute is added to what it writes. Or ``source`` itself, in a residual
            block ``x + f(x)``; then ``reader`` is whatever comes next.
        reads: the name of a layer that reads ``source``.
        writes: the name of the layer that writes, "" in a residual block.
        beside: the parameter that the new ones are optimized with.
    """

    name: str
    module: nn.Module = field(repr=False)
    reader: fx.Node = field(repr=False)
    writer: fx.Node = field(repr=False)
    source: fx.Node = field(repr=False)
    reads: str
    writes: str
    beside: str

    @property
    def record(self) -> PathRecord:
        """How the path is known once it is part of a model."""
        return self.name, self.reads, self.writes

    def cost(self) -> tuple[int, int]:
        """Parameters, and FLOPs of a sample of the example that was traced."""
        inputs = torch.empty(self.source.meta["val"].shape, device="meta")
        twin = copy.deepcopy(self.module).to("meta", torch.float32)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            twin(inputs)  # their graph is not written yet, so that its shapes could not be counted
        return sum(p.numel() for p in self.module.parameters()), counter.get_total_flops() // len(inputs)


def parameters_of(new_paths: Iterable[NewPath]) -> dict[str, Tensor]:
    """The parameters of new layers, by the names that they will have in the model."""
    return {f"{path.name}.{name}": p for path in new_paths for name, p in path.module.named_parameters()}


def attach(model: nn.Module, new_paths: Iterable[NewPath], *, copied: bool) -> None:
    """Makes new layers part of a model: the modules themselves, for a look, or copies, for good."""
    for path in new_paths:
        module = copy.deepcopy(path.module) if copied else path.module
        module.train(model.training)
        model._modules[path.name] = module


def detach(model: nn.Module, new_paths: Iterable[NewPath]) -> None:
    """Takes new layers out of a model. May run twice."""
    for path in new_paths:
        model._modules.pop(path.name, None)


def insert_paths(
    graph: fx.Graph,
    copies: Mapping[fx.Node, fx.Node],
    new_paths: Iterable[NewPath],
    layers: Mapping[fx.Node, LayerSite],
) -> None:
    """Puts new layers into a copy of the graph that they were made for, or of that of another example.

    What reads the sum and comes before them has to wait for it.

    Args:
        graph: the copy.
        copies: nodes of that graph and their copies.
        new_paths: what is put in; in the graph of another example only where both layers run.
        layers: of the graphs of all examples.
    """
    nodes = {layer.name: node for node, layer in reversed([*layers.items()]) if node in copies}
    for path in new_paths:
        place = path if path.reader in copies else _in_other_graph(path, nodes, layers)
        if place is None:
            continue
        reader, writer = copies[place.reader], copies[place.writer]
        with graph.inserting_before(reader):
            added = graph.call_module(place.name, (copies[place.source],))
        dependents, users = dependent(writer), [user for user in writer.users if user is not added]
        late_nodes = [node for node in crossed(writer, added) if node in dependents]
        with graph.inserting_after(max(writer, added)):
            total = graph.call_function(operator.add, (writer, added))
        for user in users:
            user.replace_input_with(writer, total)
        last = total
        for node in late_nodes:
            last.append(node)
            last = node


def _in_other_graph(path: NewPath, nodes: Mapping[str, fx.Node], layers: Mapping[fx.Node, LayerSite]) -> NewPath | None:
    """The place of new layers in the graph of another example; None if one of the layers beside them does not run."""
    if path.reads not in nodes or path.writes not in {"", *nodes}:
        return None
    reader = nodes[path.reads]
    source = layers[reader].inputs
    if not path.writes:
        return replace(path, reader=source.next, writer=source, source=source)
    writer = nodes[path.writes]
    if source in dependent(writer):
        raise GrowthError(
            f"the new layers {path.name} lead from what {path.reads} reads to {path.writes}, which in another example "
            "comes before it. Leave this place out."
        )
    return replace(path, reader=reader, writer=writer, source=source)


def crossed(writer: fx.Node, reader: fx.Node) -> list[fx.Node]:
    """The nodes that run after a layer has written and before another one reads; none if it reads before."""
    nodes, node = [], writer.next
    while node is not reader:
        if node.op == "root":
            return []
        nodes.append(node)
        node = node.next
    return nodes


def dependent(origin: fx.Node) -> set[fx.Node]:
    """Every node that needs this one.

    Args:
        origin: a node of a graph.

    Returns:
        Those nodes, without the origin.
    """
    nodes, waiting = set(), [origin]
    while waiting:
        users = [user for user in waiting.pop().users if user not in nodes]
        nodes.update(users)
        waiting += users
    return nodes


def layer_specs(module: nn.Module) -> dict[str, dict[str, object]]:
    """The layers of a path as plain values.

    Returns:
        Layer -> the name of its class in ``torch.nn``, as ``"type"``, and its arguments.

    Raises:
        StoreError: a layer is not torch's own.
    """
    layers = dict(module.named_children()) if isinstance(module, nn.Sequential) else {"": module}
    return {name: {"type": _type_name(layer), **_arguments(layer)} for name, layer in layers.items()}


def _type_name(layer: nn.Module) -> str:
    name = type(layer).__name__
    if getattr(nn, name, None) is not type(layer):
        raise StoreError(
            f"a new layer of type {name} cannot be saved: a file holds no code, and only layers of torch.nn can be "
            "built again from their names. Save the model itself with torch.save, or grow with an activation of "
            "torch.nn."
        )
    return name


def _arguments(layer: nn.Module) -> dict[str, object]:
    names = [name for name in inspect.signature(type(layer).__init__).parameters if name not in ("self", "device")]
    arguments = {name: getattr(layer, name) for name in names if hasattr(layer, name) and name != "dtype"}
    return {name: value is not None if name == "bias" else value for name, value in arguments.items()}


def rebuilt(layers: Mapping[str, Mapping[str, Any]], inputs: int, outputs: int) -> nn.Module:
    """The inverse of :func:`layer_specs`, for other numbers of channels at both ends; all weights are zero."""
    arguments = {name: dict(layer) for name, layer in layers.items()}
    weighted = [layer for layer in arguments.values() if WIDTHS & layer.keys()]
    for layer, side, size in ((weighted[0], "in_", inputs), (weighted[-1], "out_", outputs)):
        layer.update({name: size for name in WIDTHS & layer.keys() if name.startswith(side)})
    modules = {name: _built(_layer_type(layer.pop("type")), layer) for name, layer in arguments.items()}
    return zeroed(modules[""] if "" in modules else nn.Sequential(OrderedDict(modules)))


def _layer_type(name: str) -> type[nn.Module]:
    kind = getattr(nn, name)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"torch.nn.{name} is no layer")
    return kind


def _built(kind: type[nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    """Draws no random numbers."""
    return skip_init(kind, **arguments) if WIDTHS & arguments.keys() else kind(**arguments)


def zeroed(module: nn.Module) -> nn.Module:
    """Makes all parameters of a module zero.

    Args:
        module: is changed in place.

    Returns:
        The module.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module
