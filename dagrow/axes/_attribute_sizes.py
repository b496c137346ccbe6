"""Sizes that modules state as attributes, and what a wider axis makes of them.

In come the arguments of nodes that change, out go the attributes that change, and whether the forward must be written
anew: if every size that changes came unchanged from an attribute, which is not computed with, the attributes change
and the model's own forward goes on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from dagrow._pytree import leaf_values
from dagrow.axes._channel_labels import Labelling
from dagrow.axes._grouping import AxisLayout
from dagrow.axes._label_interpreter import Values
from dagrow.axes._size_rewriting import Arguments
from dagrow.layers import EdgeRule, LayerSite, RiderRule
from dagrow.tracing import AttributeInt, AttributePath, Program

AttributeSizes = Mapping[AttributePath, int]  #: what whole numbers among the attributes of modules become
Attributes = Mapping[str, Mapping[str, Any]]  #: module -> its attributes


def changed_attributes(literals: Mapping[fx.Node, Arguments]) -> dict[AttributePath, int]:
    """What numbers that modules state become in the arguments of nodes."""
    changed: dict[AttributePath, int] = {}
    for node, arguments in literals.items():
        for old, new in zip(leaf_values((node.args, node.kwargs)), leaf_values(arguments), strict=False):
            if isinstance(old, AttributeInt) and isinstance(new, int) and old != new:
                changed[old.path] = new
    return changed


def with_attributes(arguments: Arguments, sizes: AttributeSizes) -> Arguments:
    """A node's arguments with other numbers for those that modules state."""
    if not sizes:
        return arguments

    def resized(value: fx.node.Argument) -> fx.node.Argument:
        return sizes.get(value.path, value) if isinstance(value, AttributeInt) else value

    args, kwargs = fx.node.map_aggregate(arguments, resized)  # type: ignore[misc]
    return tuple(args), dict(kwargs)


def layer_sizes(layer: LayerSite, labelling: Labelling, before: Labelling) -> dict[str, int]:
    """What the layer states as a module, in the network that was run on labels, where it was reached; else before."""
    name, rule = layer.name, layer.rule
    if isinstance(rule, EdgeRule):
        columns = labelling.columns.get(name, before.columns[name])
        return rule.attributes(len(columns), len(labelling.rows[name]))
    assert isinstance(rule, RiderRule)
    return rule.attributes(layer.module, len(labelling.entries[labelling.riders[name]]))


def resized_call(node: fx.Node, layer: LayerSite, sizes: Mapping[str, int], values: Values) -> Arguments | None:
    """The arguments of a function that is called with sizes, such as a number of groups, if they change; else None."""
    arguments = {**dict(zip(layer.names, node.args, strict=False)), **node.kwargs}
    stated = {name: fx.map_arg(arguments[name], lambda n: values[n]) for name in arguments.keys() & sizes.keys()}
    if all(size == sizes[name] for name, size in stated.items()):
        return None
    args = tuple(sizes.get(name, arg) for name, arg in zip(layer.names, node.args, strict=False))
    return args, {name: sizes.get(name, arg) for name, arg in node.kwargs.items()}


def resized_attributes(
    model: nn.Module, layers: Mapping[fx.Node, LayerSite], layout: AxisLayout, labelling: Labelling
) -> dict[AttributePath, int]:
    """Attributes that layers restate when they are widened, by their owners."""
    riders = {rider.name for rider in layout.entries if rider.rule is not None}
    resized: dict[AttributePath, int] = {}
    for layer in layers.values():
        if layer.name in layout.rows or layer.name in layout.columns or layer.name in riders:
            owner, sizes = model.get_submodule(layer.owner), layer_sizes(layer, layout.labelling, layout.labelling)
            for name, size in layer_sizes(layer, labelling, layout.labelling).items():
                if getattr(owner, name, None) == sizes[name]:  # the owner of a function's weight may state others
                    resized[layer.owner, name, None] = size
    return resized


def resolve_sizes(
    program: Program,
    literals: Mapping[fx.Node, Arguments],
    attributes: Attributes,
    resized: AttributeSizes,
    everywhere: AttributeSizes,
) -> tuple[Mapping[fx.Node, Arguments], Attributes, bool]:
    """What changes in a forward.

    Args:
        program: the graph of the forward.
        literals: node -> its arguments in the grown network, where they differ but for stated numbers.
        attributes: that change in any case.
        resized: attributes that layers restate, and what they become.
        everywhere: attributes that change with all their uses in the graph.

    Returns:
        Arguments of nodes, attributes of modules, and whether the forward must be written anew.
    """
    agree = all(size == everywhere.get(place) for place, size in resized.items() if place in program.attribute_uses)
    users = [node for place in everywhere for node in program.attribute_uses[place]]
    calls = {node: (node.args, dict(node.kwargs)) for node in users} | dict(literals)
    calls = {node: with_attributes(arguments, everywhere) for node, arguments in calls.items()}
    computed = frozenset().union(*(part.computed_attributes for part in program.every))
    if literals or not agree or computed & {*resized, *everywhere}:
        return calls, attributes, True
    changed = {path: dict(names) for path, names in attributes.items()}
    for (path, name, index), size in everywhere.items():
        names = changed.setdefault(path, {})
        if index is None:
            names[name] = size
        else:
            names[name] = _replaced(names.get(name, getattr(program.model.get_submodule(path), name)), index, size)
    return calls, changed, False


def _replaced(items: Sequence[int], index: int, value: int) -> Sequence[int]:
    return type(items)([*items[:index], value, *items[index + 1 :]])  # type: ignore[call-arg]
