"""Literal sizes in a graph, as a wider axis needs them."""

from collections.abc import Mapping, Sequence
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
    members = torch.isin(thin, layout.labels)
    dims = carrying(thin, members) if labels.numel() else []
    if len(dims) != 1:
        return None
    count = int(members.movedim(dims[0], 0).flatten(1).any(dim=1).sum())
    if count % layout.width:  # a part of the axis: what it must be is seen from the labels
        return None
    shape = list(labels.shape)
    shape[dims[0]] += count * k // layout.width
    return torch.Size(shape)


def rewritten(node: fx.Node, values: Mapping[fx.Node, Any], shapes: Shapes) -> Arguments | None:
    """The node's arguments with the sizes that its results need, or None.

    Args:
        values: of nodes in the grown network.
        shapes: of the results.
    """
    name = ops.op_name(node)
    if name in ("split", "split_with_sizes"):
        return _split(node, shapes)
    (shape,) = shapes if len(shapes) == 1 else (None,)
    if shape is None or node.kwargs:
        return None
    if name == "unflatten":
        source, dim, sizes = node.args
        if not isinstance(dim, int) or any(isinstance(size, fx.Node) for size in sizes):  # type: ignore[union-attr]
            return None
        return (source, dim, unflattened(dim, sizes, node, shape)), {}
    return _laid_out(node, values, shape) if name in ("view", "reshape", "expand") else None


def _laid_out(node: fx.Node, values: Mapping[fx.Node, Any], shape: torch.Size) -> Arguments | None:
    first: Any = node.args[1]
    nested = isinstance(first, (tuple, list))
    given = tuple(first) if nested else node.args[1:]
    if len(given) != len(shape):  # view(dtype)
        return None
    sizes = []
    for size, before, after in zip(given, node.meta["val"].shape, shape, strict=True):
        now = values[size] if isinstance(size, fx.Node) else size
        if not isinstance(size, fx.Node) and size not in (-1, before):
            return None
        sizes.append(size if now in (-1, after) else after)
    return ((node.args[0], tuple(sizes)) if nested else (node.args[0], *sizes)), {}


def _split(node: fx.Node, shapes: Shapes) -> Arguments | None:
    """A cut into parts of other sizes."""
    keywords = dict(node.kwargs)
    place = next((key for key in ("split_size", "split_size_or_sections", "split_sizes") if key in keywords), None)
    given: Any = keywords[place] if place else node.args[1]
    dim: Any = keywords.get("dim", node.args[-1] if len(node.args) > 1 + (place is None) else 0)
    parts = zip(node.meta["val"], shapes, strict=True)
    sizes = [part.shape[dim] if shape is None else shape[dim] for part, shape in parts]
    value = sizes[0] if isinstance(given, int) and len(set(sizes)) == 1 else sizes
    if place is not None:
        return node.args, {**keywords, place: value}
    return (node.args[0], value, *node.args[2:]), keywords


def unflattened(dim: int, given: Any, node: fx.Node, shape: torch.Size) -> tuple[int, ...]:
    """The sizes of an ``unflatten``, as the wider axis needs them; a -1 stays."""
    start = dim % (node.meta["val"].ndim - len(given) + 1)
    return tuple(-1 if size == -1 else shape[start + i] for i, size in enumerate(given))
