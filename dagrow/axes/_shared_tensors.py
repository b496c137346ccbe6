"""Labels of a graph in which tensors act at several places: label once, freeze what is shared, label again.

In come a graph and its layers, out go the layers as they grow, and a labelling. Tensors that act at several places
cannot grow at one of them. Convolutions with groups grow by whole groups; where these are frozen, the graph is labelled
again with such a convolution as an edge, which grows by a channel in each group.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from dagrow.axes._channel_labels import Labelling, Rider, label
from dagrow.layers import UNIT_DIM_OPS, BlockConvolutionRule, EdgeRule, GroupedRule, LayerSite, op_name, parameter_of
from dagrow.tracing import tensor_at


def labelled(
    graph: fx.Graph, model: nn.Module, layers: Mapping[fx.Node, LayerSite], also: Sequence[fx.Graph] = ()
) -> tuple[dict[fx.Node, LayerSite], Labelling]:
    """Runs a graph on labels, and freezes what shared tensors write, read or carry.

    Args:
        graph: of the model's forward.
        model: the model.
        layers: those that a rule knows, by their nodes.
        also: graphs of the same model for further examples, whose layers are among them.

    Returns:
        The layers, convolutions whose groups are frozen as edges, within whose groups what is around them may still
        grow; and the labelling.
    """
    graphs = (graph, *also)
    labelling = _label_and_freeze(graphs, model, layers)
    rules = {rider.name: rule for rider in labelling.entries if (rule := _rule_within_groups(labelling, rider))}
    if not rules:
        return dict(layers), labelling
    layers = {node: replace(layer, rule=rules.get(layer.name, layer.rule)) for node, layer in layers.items()}
    return layers, _label_and_freeze(graphs, model, layers)


def _rule_within_groups(labelling: Labelling, rider: Rider) -> EdgeRule | None:
    """The rule of a convolution that grows within its groups, if it cannot grow by a group."""
    rule, module = rider.rule, rider.module
    if not isinstance(rule, GroupedRule) or module is None or rule.transposed or rule.group(module)[0] == 1:
        return None
    roots = labelling.classes.roots(labelling.entries[rider])
    is_frozen = bool((labelling.classes.reason_numbers(roots) > 0).any())
    return BlockConvolutionRule(rule.space, groups=int(module.groups)) if is_frozen else None  # type: ignore[arg-type]


def _label_and_freeze(graphs: Sequence[fx.Graph], model: nn.Module, layers: Mapping[fx.Node, LayerSite]) -> Labelling:
    graph, *also = graphs
    labelling = label(graph, model, layers, also)
    sharing = _Sharing.of(graphs, model, layers)
    calls = {name: reason for each in graphs for name, reason in _varying_calls(each, layers).items()}
    for layer in {layer.name: layer for layer in layers.values() if layer.name in labelling.rows}.values():
        rule = layer.rule
        assert isinstance(rule, EdgeRule)
        names = [layer.path(entry) for entry in rule.dims if getattr(layer.module, entry, None) is not None]
        reason = rule.refusal(layer.module) or sharing.reason(layer.name, names) or calls.get(layer.name)
        if reason:
            labelling.shared.setdefault(layer.name, reason)
            labelling.classes.freeze(labelling.rows[layer.name], reason)
            labelling.classes.freeze(labelling.columns[layer.name], reason)
    for rider, labels in labelling.entries.items():
        reason = sharing.reason(None if rider.rule is None else rider.name, rider.tensors) or calls.get(rider.name)
        if reason:
            labelling.classes.freeze(labels, reason)
    return labelling


def _varying_calls(graph: fx.Graph, layers: Mapping[fx.Node, LayerSite]) -> dict[str, str]:
    """Layers and tensors used directly that are called more often for more samples, and how it is said."""
    marked = [node for node in graph.nodes if "calls" in node.meta]
    return {layers[node].name if node in layers else str(node.target): node.meta["calls"] for node in marked}


@dataclass(frozen=True)
class _Sharing:
    """Who uses the parameters and buffers of a model.

    Attributes:
        model: the model.
        names: id of a parameter or buffer -> all its names.
        readers: name -> the layers that it is of; None for other uses.
    """

    model: nn.Module
    names: Mapping[int, list[str]]
    readers: Mapping[str, set[str | None]]

    @classmethod
    def of(cls, graphs: Sequence[fx.Graph], model: nn.Module, layers: Mapping[fx.Node, LayerSite]) -> "_Sharing":
        names: dict[int, list[str]] = {}
        buffers = model.named_buffers(remove_duplicate=False)
        for name, tensor in (*model.named_parameters(remove_duplicate=False), *buffers):
            names.setdefault(id(tensor), []).append(name)
        readers: dict[str, set[str | None]] = {}
        for graph in graphs:
            for name, reader in _reads(graph, model, layers):
                readers.setdefault(name, set()).add(reader)
        return cls(model, names, readers)

    def reason(self, user: str | None, paths: Iterable[str]) -> str | None:
        """Why one of the tensors of a layer, or one used directly, does not belong to it alone, or None."""
        for path in paths:
            name = path.removeprefix(".")
            names = self.names.get(id(tensor_at(self.model, name)), [])
            if not names:
                return f"{name} is computed, not a parameter"
            if tensor_at(self.model, name).is_complex():
                return f"{name} holds complex numbers"
            if len(names) > 1:
                return f"{name} is shared with {', '.join(other for other in names if other != name)}"
            if any(reader != user for reader in self.readers.get(name, ())):
                return f"{name} is also used elsewhere"
        return None


def _reads(graph: fx.Graph, model: nn.Module, layers: Mapping[fx.Node, LayerSite]) -> Iterator[tuple[str, str | None]]:
    """The uses of parameters and buffers: names, and the layer that each is of, or None."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for node in graph.nodes:
        if node.op == "get_attr":
            name = str(node.target)
            for value, user in _uses(node, parameters):
                layer = layers.get(user)
                is_own = layer is not None and layer.inputs is not value and name in layer.paths.values()
                yield name, layer.name if layer is not None and is_own else None
        elif node.op == "call_module":
            path = str(node.target)
            module = model.get_submodule(path)
            for name, _ in (*module.named_parameters(path), *module.named_buffers(path)):
                yield name, layers[node].name if node in layers else None


def _uses(node: fx.Node, parameters: Mapping[str, Tensor]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Who uses a parameter, or what is the same parameter laid out otherwise."""
    waiting = [node]
    while waiting:
        value = waiting.pop()
        for user in value.users:
            origin = parameter_of(user, parameters)
            if op_name(user) in UNIT_DIM_OPS or (origin is not None and origin.node is node):
                waiting.append(user)
            elif not _reads_no_width(user, value.meta["val"].shape, node.meta["val"].shape):
                yield value, user


def _reads_no_width(node: fx.Node, shape: torch.Size, whole: torch.Size) -> bool:
    """Whether a node reads a fact about a parameter that is the same however wide it is, such as the size of a kernel.

    Args:
        node: the reader.
        shape: of what it reads.
        whole: the shape of the parameter itself.

    Returns:
        Whether it is such a fact.
    """
    name = op_name(node)
    if name in ("dtype", "device", "ndim", "dim", "is_floating_point"):
        return True
    indices: list[object] = []
    if name == "size":
        indices = list(node.args[1:])
    elif name == "shape" and all(op_name(user) == "getitem" for user in node.users):
        indices = [user.args[1] for user in node.users]
    ends = [index % len(shape) - len(shape) for index in indices if isinstance(index, int)]  # -1 is the last, always
    if not ends or len(ends) < len(indices):
        return False
    return all(2 - len(whole) <= end and shape[end:] == whole[end:] for end in ends)
