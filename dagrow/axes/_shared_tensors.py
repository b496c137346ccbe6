"""Labels of a graph in which tensors act at several places, or whose convolutions have groups.

Tensors that act at several places cannot grow at one of them. Convolutions with groups are read in one of two ways:
they grow by whole groups, or by a channel in each group.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from dagrow.axes._channel_labels import Labelling, Rider, label
from dagrow.layers import UNIT_DIM_OPS, BlockConvolutionRule, EdgeRule, GroupedRule, LayerSite, op_name, parameter_of
from dagrow.tracing import tensor_at


def labelled(
    graph: fx.Graph, model: nn.Module, layers: Mapping[fx.Node, LayerSite]
) -> tuple[dict[fx.Node, LayerSite], Labelling]:
    """The graph run on labels. Convolutions whose groups are frozen are taken as edges, within whose groups what is
    around them may still grow."""
    found = _run(graph, model, layers)
    rules = {
        rider.name: BlockConvolutionRule(rider.rule.space, groups=int(rider.module.groups))  # type: ignore[arg-type]
        for rider in found.entries
        if isinstance(rider.rule, GroupedRule)
        and rider.module is not None
        and not rider.rule.transposed
        and rider.rule.group(rider.module)[0] > 1
        and _frozen(found, rider)
    }
    if not rules:
        return dict(layers), found
    read = {node: replace(layer, rule=rules.get(layer.name, layer.rule)) for node, layer in layers.items()}
    return read, _run(graph, model, read)


def _run(graph: fx.Graph, model: nn.Module, layers: Mapping[fx.Node, LayerSite]) -> Labelling:
    found = label(graph, model, layers)
    freeze_shared(graph, model, layers, found)
    return found


def _frozen(found: Labelling, rider: Rider) -> bool:
    return bool((found.classes.numbers(found.classes.roots(found.entries[rider])) > 0).any())


def freeze_shared(graph: fx.Graph, model: nn.Module, layers: Mapping[fx.Node, LayerSite], found: Labelling) -> None:
    """Freezes what the tensors of a layer write, read or carry if they do not belong to the layer alone."""
    owners: dict[int, list[str]] = {}
    for name, owned in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        owners.setdefault(id(owned), []).append(name)
    readers = _readers(graph, model, layers)
    for layer in {layer.name: layer for layer in layers.values() if layer.name in found.rows}.values():
        rule = layer.rule
        assert isinstance(rule, EdgeRule)
        paths = [layer.path(entry) for entry in rule.dims if getattr(layer.module, entry, None) is not None]
        cause = _sharing(layer.name, paths, model, owners, readers) or rule.refusal(layer.module)
        if cause:
            found.shared.setdefault(layer.name, cause)
            found.classes.freeze(found.rows[layer.name], cause)
            found.classes.freeze(found.columns[layer.name], cause)
    for rider, labels in found.entries.items():
        user = None if rider.rule is None else rider.name
        cause = _sharing(user, rider.tensors, model, owners, readers)
        if cause:
            found.classes.freeze(labels, cause)


def _readers(graph: fx.Graph, model: nn.Module, layers: Mapping[fx.Node, LayerSite]) -> dict[str, set[str | None]]:
    """For each parameter and buffer the layers that it is of; None for other uses."""
    found: dict[str, set[str | None]] = {}
    held = dict(model.named_parameters(remove_duplicate=False))
    for node in graph.nodes:
        if node.op == "get_attr":
            for value, user in _uses(node, held):
                layer = layers.get(user)
                own = layer is not None and layer.inputs is not value and str(node.target) in layer.paths.values()
                found.setdefault(str(node.target), set()).add(layer.name if layer is not None and own else None)
        elif node.op == "call_module":
            module = model.get_submodule(str(node.target))
            for name, _ in (*module.named_parameters(str(node.target)), *module.named_buffers(str(node.target))):
                found.setdefault(name, set()).add(layers[node].name if node in layers else None)
    return found


def _uses(node: fx.Node, held: Mapping[str, Tensor]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Who uses a parameter, or what is the same parameter laid out otherwise."""
    waiting = [node]
    while waiting:
        value = waiting.pop()
        for user in value.users:
            origin = parameter_of(user, held)
            if op_name(user) in UNIT_DIM_OPS or (origin is not None and origin.node is node):
                waiting.append(user)
            elif not _reads_no_width(user, value.meta["val"].shape, node.meta["val"].shape):
                yield value, user


def _reads_no_width(node: fx.Node, shape: torch.Size, whole: torch.Size) -> bool:
    """Whether a node reads a fact about a parameter that is the same however wide it is, such as the size of a kernel.

    Args:
        shape, whole: of what it reads, and of the parameter itself.
    """
    if op_name(node) in ("dtype", "device", "ndim", "dim", "is_floating_point"):
        return True
    if op_name(node) == "size":
        taken: list[Any] = list(node.args[1:])
    else:
        read = op_name(node) == "shape" and all(op_name(user) == "getitem" for user in node.users)
        taken = [user.args[1] for user in node.users] if read else []
    if not taken or not all(isinstance(index, int) for index in taken):
        return False
    ends = [index % len(shape) - len(shape) for index in taken]  # -1 is the last, whatever came and went before it
    return all(2 - len(whole) <= end and shape[end:] == whole[end:] for end in ends)


def _sharing(
    user: str | None,
    paths: Iterable[str],
    model: nn.Module,
    owners: Mapping[int, list[str]],
    readers: Mapping[str, set[str | None]],
) -> str | None:
    """Why one of a layer's tensors does not belong to it alone, or None."""
    for path in paths:
        name = path.removeprefix(".")
        names = owners.get(id(tensor_at(model, name)), [])
        if not names:
            return f"{name} is computed, not a parameter"
        if len(names) > 1:
            return f"{name} is shared with {', '.join(other for other in names if other != name)}"
        if any(reader != user for reader in readers.get(name, ())):
            return f"{name} is also used elsewhere"
    return None
