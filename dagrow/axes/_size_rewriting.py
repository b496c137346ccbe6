"""Sizes that a model's forward holds, as a wider axis needs them: in attributes, or in a forward written anew."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dagrow._pytree import leaf_values
from dagrow.axes._grouping import AxisLayout
from dagrow.axes._union_find import narrow
from dagrow.layers import op_name
from dagrow.tracing import AttributeInt, AttributePath, Program

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  #: of a node
Attributes = Mapping[str, Mapping[str, Any]]  #: module -> its attributes


def changed_attributes(literals: Mapping[fx.Node, Arguments]) -> dict[AttributePath, int]:
    """What numbers that modules state become in the arguments of nodes."""
    found: dict[AttributePath, int] = {}
    for node, arguments in literals.items():
        for old, new in zip(leaf_values((node.args, node.kwargs)), leaf_values(arguments), strict=False):
            if isinstance(old, AttributeInt) and isinstance(new, int) and old != new:
                found[old.place] = new
    return found


def with_attributes(arguments: Arguments, restated: Mapping[AttributePath, int]) -> Arguments:
    """A node's arguments with other numbers for those that modules state."""
    if not restated:
        return arguments

    def number(value: Any) -> Any:
        return restated.get(value.place, value) if isinstance(value, AttributeInt) else value

    args, kwargs = fx.node.map_aggregate(arguments, number)  # type: ignore[misc]
    return tuple(args), dict(kwargs)


def resolve_sizes(
    program: Program,
    literals: Mapping[fx.Node, Arguments],
    attributes: Attributes,
    resized: Mapping[AttributePath, int],
    restated: Mapping[AttributePath, int],
) -> tuple[Mapping[fx.Node, Arguments], Attributes, bool]:
    """What changes in a forward: arguments of nodes, attributes, and whether it must be written anew.

    If every size that changes came unchanged from an attribute of a module, which is not computed with, the attributes
    change and the model's own forward goes on.

    Args:
        literals: node -> its arguments in the grown network, where they differ but for stated numbers.
        attributes: that change in any case.
        resized: attributes that layers restate, and what they become.
        restated: attributes that change with all their uses in the graph.
    """
    follow = all(value == restated.get(place) for place, value in resized.items() if place in program.stated)
    written = bool(literals) or not follow or bool(program.computed & {*resized, *restated})
    uses = [node for place in restated for node in program.stated[place]]
    found = {node: (node.args, dict(node.kwargs)) for node in uses} | dict(literals)
    found = {node: with_attributes(arguments, restated) for node, arguments in found.items()}
    if written:
        return found, attributes, True
    changed = {path: dict(names) for path, names in attributes.items()}
    for (path, name, index), value in restated.items():
        names = changed.setdefault(path, {})
        names[name] = (
            value
            if index is None
            else _replaced(names.get(name, getattr(program.model.get_submodule(path), name)), index, value)
        )
    return found, changed, False


def _replaced(items: Sequence[int], index: int, value: int) -> Sequence[int]:
    return type(items)([*items[:index], value, *items[index + 1 :]])  # type: ignore[call-arg]


Shapes = Sequence[torch.Size | None]


def carrying(labels: Tensor, members: Tensor) -> list[int]:
    """The dimensions along which members of an axis differ."""
    found = []
    for dim in range(labels.ndim):
        first = labels.select(dim, 0).unsqueeze(dim)
        if labels.shape[dim] > 1 and bool((members & (labels != first)).any()):
            found.append(dim)
    return found


def expected(layout: AxisLayout, labels: Tensor, k: int) -> torch.Size | None:
    """The shape of some labels with k more units, where one dimension holds all units of the axis; else None."""
    thin = layout.found.classes.roots(narrow(labels))
    members = layout.members[thin]
    dims = carrying(thin, members) if labels.numel() else []
    if len(dims) != 1:
        return None
    count = int(members.movedim(dims[0], 0).flatten(1).any(dim=1).sum())
    if count % layout.width:  # a part of the axis: what it must be is seen from the labels
        return None
    shape = list(labels.shape)
    shape[dims[0]] += count * k // layout.width
    return torch.Size(shape)


def rewritten(
    node: fx.Node,
    arguments: Arguments,
    values: Mapping[fx.Node, Any],
    before: Mapping[fx.Node, Any],
    shapes: Shapes,
    is_old: Callable[[Tensor], Tensor],
) -> Arguments | None:
    """The node's arguments with the sizes that its results need, or None.

    Args:
        values, before: of nodes in the grown network, and labels of channels in that before.
        shapes: of the results.
        is_old: which labels are not of new channels.
    """
    name, (args, kwargs) = op_name(node), arguments
    if name in ("split", "split_with_sizes"):
        return _split(node, args, kwargs, shapes)
    (shape,) = shapes if len(shapes) == 1 else (None,)
    if name == "getitem" and shape is not None and isinstance(values[args[0]], Tensor):
        return _sliced(args, values[args[0]], before[args[0]], shape, is_old)
    if shape is None or kwargs or name not in ("view", "reshape", "expand", "unflatten"):
        return None
    if name == "unflatten":
        source, dim, sizes = args
        start = dim % (node.meta["val"].ndim - len(sizes) + 1)
        found = _resized(sizes, node.meta["val"].shape[start:], shape[start:], values, before)
        return None if found is None else ((source, dim, found), {})
    nested = isinstance(args[1], (tuple, list))
    given = tuple(args[1]) if nested else args[1:]
    if len(given) != len(shape):  # view(dtype)
        return None
    found = _resized(given, node.meta["val"].shape, shape, values, before)
    return None if found is None else (((args[0], found) if nested else (args[0], *found)), {})


def _resized(
    given: Sequence[Any],
    old: Sequence[int],
    new: Sequence[int],
    values: Mapping[fx.Node, Any],
    before: Mapping[fx.Node, Any],
) -> tuple[Any, ...] | None:
    """Sizes that a layout is made with, as they must be; None if one that follows the input would have to be fixed."""
    sizes = []
    for size, was, after in zip(given, old, new, strict=False):
        now = values[size] if isinstance(size, fx.Node) else size
        fixed = _is_width(size, before) if isinstance(size, fx.Node) else size in (-1, was)
        if now not in (-1, after) and not fixed:
            return None
        sizes.append(size if now in (-1, after) else after)
    return tuple(sizes)


def _is_width(size: fx.Node, before: Mapping[fx.Node, Any]) -> bool:
    """Whether a size is computed from numbers of channels only, not from those of samples or positions."""
    name = op_name(size)
    if name in _ARITHMETIC:
        return all(_is_width(operand, before) for operand in size.all_input_nodes)
    if name == "getitem":
        source, dim = size.args
        return isinstance(source, fx.Node) and op_name(source) in ("shape", "size") and _along(source, dim, before)
    return name == "size" and len(size.args) > 1 and _along(size, size.args[1], before)


def _along(shape: fx.Node, dim: Any, before: Mapping[fx.Node, Any]) -> bool:
    """Whether a dimension of the tensor, whose shape this is, holds several channels."""
    labels = before[shape.all_input_nodes[0]]
    return isinstance(labels, Tensor) and isinstance(dim, int) and labels.shape[dim] > 1 and labels.stride(dim) != 0


_ARITHMETIC = {"add", "sub", "mul", "floordiv", "mod", "neg"}


def _split(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any], shapes: Shapes) -> Arguments:
    """A cut into parts of other sizes."""
    place = next((key for key in ("split_size", "split_size_or_sections", "split_sizes") if key in kwargs), None)
    given: Any = kwargs[place] if place else args[1]
    dim: Any = kwargs.get("dim", args[-1] if len(args) > 1 + (place is None) else 0)
    parts = zip(node.meta["val"], shapes, strict=True)
    sizes = [part.shape[dim] if shape is None else shape[dim] for part, shape in parts]
    value = sizes[0] if isinstance(given, int) and len(set(sizes)) == 1 else sizes
    if place is not None:
        return args, {**kwargs, place: value}
    return (args[0], value, *args[2:]), dict(kwargs)


def _sliced(
    args: tuple[Any, ...], grown: Tensor, before: Tensor, shape: torch.Size, is_old: Callable[[Tensor], Tensor]
) -> Arguments | None:
    """A slice from the same old channel on, of the wanted length; None if it is cut by anything but numbers."""
    cuts = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
    if any(cut is None for cut in cuts) or grown.ndim != len(shape):
        return None
    if Ellipsis in cuts:
        at = cuts.index(Ellipsis)
        cuts[at : at + 1] = [slice(None)] * (grown.ndim - len(cuts) + 1)
    for dim, cut in enumerate(cuts):
        if grown.shape[dim] == before.shape[dim] or cut == slice(None):
            continue
        if not isinstance(cut, slice) or cut.step not in (None, 1):
            return None
        if not all(bound is None or isinstance(bound, int) for bound in (cut.start, cut.stop)):
            return None
        first = cut.indices(before.shape[dim])[0]
        kept = torch.nonzero(is_old(narrow(grown)).movedim(dim, 0).flatten(1).all(1)).flatten()
        start = int(kept[first]) if first else 0
        end = start + shape[dim]
        cuts[dim] = slice(start if cut.start else cut.start, None if cut.stop is None else end)
    return (args[0], tuple(cuts)), {}


def unflattened(dim: int, given: Any, node: fx.Node, shape: torch.Size) -> tuple[int, ...]:
    """The sizes of an ``unflatten``, as the wider axis needs them; a -1 stays."""
    start = dim % (node.meta["val"].ndim - len(given) + 1)
    return tuple(-1 if size == -1 else shape[start + i] for i, size in enumerate(given))
