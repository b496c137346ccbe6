"""Literal sizes in a graph, as a wider axis needs them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dagrow import ops
from dagrow.axes import Layout
from dagrow.classes import narrow
from dagrow.settling import Arguments

__all__ = ["carrying", "expected", "rewritten", "unflattened"]

Shapes = Sequence[torch.Size | None]


def carrying(labels: Tensor, members: Tensor) -> list[int]:
    """The dimensions along which members of an axis differ."""
    found = []
    for dim in range(labels.ndim):
        first = labels.select(dim, 0).unsqueeze(dim)
        if labels.shape[dim] > 1 and bool((members & (labels != first)).any()):
            found.append(dim)
    return found


def expected(layout: Layout, labels: Tensor, k: int) -> torch.Size | None:
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
    node: fx.Node, arguments: Arguments, values: Mapping[fx.Node, Any], before: Mapping[fx.Node, Any], shapes: Shapes,
    is_old: Callable[[Tensor], Tensor],
) -> Arguments | None:  # fmt: skip
    """The node's arguments with the sizes that its results need, or None.

    Args:
        values, before: of nodes in the grown network, and labels of channels in that before.
        shapes: of the results.
        is_old: which labels are not of new channels.
    """
    name, (args, kwargs) = ops.op_name(node), arguments
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
    given: Sequence[Any], old: Sequence[int], new: Sequence[int], values: Mapping[fx.Node, Any],
    before: Mapping[fx.Node, Any],
) -> tuple[Any, ...] | None:  # fmt: skip
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
    name = ops.op_name(size)
    if name in _ARITHMETIC:
        return all(_is_width(operand, before) for operand in size.all_input_nodes)
    if name == "getitem":
        source, dim = size.args
        return isinstance(source, fx.Node) and ops.op_name(source) in ("shape", "size") and _along(source, dim, before)
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
