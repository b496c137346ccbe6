"""Sizes in the arguments of operations that move entries, as a wider axis needs them.

In come a node, its arguments and the shapes that its results must have, out go other arguments, or None where none
would do.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dagrow.axes._grouping import AxisLayout
from dagrow.axes._label_interpreter import Values
from dagrow.axes._label_tensors import distinguishing_dims, unexpanded
from dagrow.layers import op_name

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  #: of a node
Shapes = Sequence[torch.Size | None]
_ARITHMETIC = {"add", "sub", "mul", "floordiv", "mod", "neg"}


def expected_shape(layout: AxisLayout, labels: Tensor, k: int) -> torch.Size | None:
    """The shape of some labels with k more units, where one dimension holds all units of the axis; else None."""
    roots = layout.labelling.classes.roots(unexpanded(labels))
    is_member = layout.members[roots]
    dims = distinguishing_dims(roots, is_member) if labels.numel() else []
    if len(dims) != 1:
        return None
    count = int(is_member.movedim(dims[0], 0).flatten(1).any(dim=1).sum())
    if count % layout.width:  # a part of the axis: what it must be is seen from the labels
        return None
    shape = list(labels.shape)
    shape[dims[0]] += count * k // layout.width
    return torch.Size(shape)


def rewritten_arguments(
    node: fx.Node,
    arguments: Arguments,
    values: Values,
    before: Values,
    shapes: Shapes,
    is_new: Callable[[Tensor], Tensor],
) -> Arguments | None:
    """The node's arguments with the sizes that its results need.

    Args:
        node: an operation that moves entries.
        arguments: what it is called with.
        values: of nodes in the grown network.
        before: their labels of channels before.
        shapes: of the results.
        is_new: which labels are of new channels.

    Returns:
        The arguments; None if none would do.
    """
    name, (args, kwargs) = op_name(node), arguments
    if name in ("split", "split_with_sizes"):
        return _split(node, args, kwargs, shapes)
    (shape,) = shapes if len(shapes) == 1 else (None,)
    if name == "getitem" and shape is not None and isinstance(values[args[0]], Tensor):
        return _sliced(args, values[args[0]], before[args[0]], shape, is_new)
    if shape is None or kwargs or name not in ("view", "reshape", "expand", "unflatten"):
        return None
    result = node.meta["val"].shape
    if name == "unflatten":
        source, dim, sizes = args
        start = dim % (len(result) - len(sizes) + 1)
        sizes = _resized(sizes, result[start:], shape[start:], values, before)
        return None if sizes is None else ((source, dim, sizes), {})
    is_nested = isinstance(args[1], (tuple, list))
    sizes = tuple(args[1]) if is_nested else args[1:]
    if len(sizes) != len(shape):  # view(dtype)
        return None
    sizes = _resized(sizes, result, shape, values, before)
    return None if sizes is None else (((args[0], sizes) if is_nested else (args[0], *sizes)), {})


def _resized(
    sizes: Sequence[object], old: Sequence[int], new: Sequence[int], values: Values, before: Values
) -> tuple[object, ...] | None:
    """Sizes that a layout is made with, as they must be; None if one that follows the input would have to be fixed."""
    resized = []
    for size, size_before, size_after in zip(sizes, old, new, strict=False):
        size_now = values[size] if isinstance(size, fx.Node) else size
        is_fixed = _is_width(size, before) if isinstance(size, fx.Node) else size in (-1, size_before)
        if size_now not in (-1, size_after) and not is_fixed:
            return None
        resized.append(size if size_now in (-1, size_after) else size_after)
    return tuple(resized)


def _is_width(size: fx.Node, before: Values) -> bool:
    """Whether a size is computed from numbers of channels only, not from those of samples or positions."""
    name = op_name(size)
    if name in _ARITHMETIC:
        return all(_is_width(operand, before) for operand in size.all_input_nodes)
    if name == "getitem":
        source, dim = size.args
        return isinstance(source, fx.Node) and op_name(source) in ("shape", "size") and _varies(source, dim, before)
    return name == "size" and len(size.args) > 1 and _varies(size, size.args[1], before)


def _varies(shape: fx.Node, dim: object, before: Values) -> bool:
    """Whether a dimension of the tensor, whose shape this is, holds several channels."""
    labels = before[shape.all_input_nodes[0]]
    return isinstance(labels, Tensor) and isinstance(dim, int) and labels.shape[dim] > 1 and labels.stride(dim) != 0


def _split(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any], shapes: Shapes) -> Arguments:
    """A cut into parts of other sizes."""
    keyword = next((key for key in ("split_size", "split_size_or_sections", "split_sizes") if key in kwargs), None)
    sizes_before = kwargs[keyword] if keyword else args[1]
    dim: Any = kwargs.get("dim", args[-1] if len(args) > 1 + (keyword is None) else 0)
    parts = zip(node.meta["val"], shapes, strict=True)
    part_sizes = [part.shape[dim] if shape is None else shape[dim] for part, shape in parts]
    sizes = part_sizes[0] if isinstance(sizes_before, int) and len(set(part_sizes)) == 1 else part_sizes
    if keyword is not None:
        return args, {**kwargs, keyword: sizes}
    return (args[0], sizes, *args[2:]), dict(kwargs)


def _sliced(
    args: tuple[Any, ...], grown: Tensor, before: Tensor, shape: torch.Size, is_new: Callable[[Tensor], Tensor]
) -> Arguments | None:
    """A slice from the same old channel on, of the wanted length; None if it is cut by anything but numbers."""
    index = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
    if any(cut is None for cut in index) or grown.ndim != len(shape):
        return None
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index[at : at + 1] = [slice(None)] * (grown.ndim - len(index) + 1)
    for dim, cut in enumerate(index):
        if grown.shape[dim] == before.shape[dim] or cut == slice(None):
            continue
        if not isinstance(cut, slice) or cut.step not in (None, 1):
            return None
        if not all(bound is None or isinstance(bound, int) for bound in (cut.start, cut.stop)):
            return None
        first = cut.indices(before.shape[dim])[0]
        old = torch.nonzero(~is_new(unexpanded(grown)).movedim(dim, 0).flatten(1).any(1)).flatten()
        start = int(old[first]) if first else 0
        end = start + shape[dim]
        index[dim] = slice(start if cut.start else cut.start, None if cut.stop is None else end)
    return (args[0], tuple(index)), {}


def unflattened_sizes(dim: int, sizes: Sequence[int], node: fx.Node, shape: torch.Size) -> tuple[int, ...]:
    """The sizes of an ``unflatten``, as the wider axis needs them; a -1 stays."""
    start = dim % (node.meta["val"].ndim - len(sizes) + 1)
    return tuple(-1 if size == -1 else shape[start + i] for i, size in enumerate(sizes))
