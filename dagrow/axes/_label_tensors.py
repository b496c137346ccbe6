"""Tensors of labels: what is repeated along a dimension stays repeated.

In come tensors of whole numbers, out go others. Most are the same along most of their dimensions, which have stride 0
then and cost nothing.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NO_CHANNEL = -1  #: the label of entries that belong to no channel: masks, scalars, positions


def unexpanded(tensor: Tensor) -> Tensor:
    """The tensor with every repeated (stride 0) dimension cut to one entry."""
    strides = tensor.stride()
    if 0 not in strides or not tensor.numel():
        return tensor
    return tensor.as_strided([size if step else 1 for size, step in zip(tensor.shape, strides, strict=True)], strides)


def thinned(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """The tensor with some dimensions cut to one entry."""
    return tensor[tuple(slice(0, 1) if d in dims else slice(None) for d in range(tensor.ndim))]


def expanded_along(labels: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Labels along one dimension of a shape, whose size there may be another, the same at all positions."""
    column = labels.view([-1 if d == dim else 1 for d in range(len(shape))])
    return column.expand([len(labels) if d == dim else size for d, size in enumerate(shape)])


def is_repeated(tensor: Tensor, dims: object) -> bool:
    """Whether entries are the same along some dimensions, to be seen without looking."""
    return all(tensor.stride(d) == 0 for d in (dims if isinstance(dims, (tuple, list)) else (dims,)))


def distinguishing_dims(labels: Tensor, members: Tensor) -> list[int]:
    """The dimensions along which some labels, the members of an axis, differ."""
    dims = []
    for dim in range(labels.ndim):
        first = labels.select(dim, 0).unsqueeze(dim)
        if labels.shape[dim] > 1 and bool((members & (labels != first)).any()):
            dims.append(dim)
    return dims


def reshaped(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A reshape that keeps repeated what is repeated along dimensions that stay as they are."""
    stay = _same_dims(tensor.shape, shape) if tensor.numel() else {}
    repeated = {before: after for before, after in stay.items() if tensor.stride(before) == 0}
    thin = thinned(tensor, [*repeated])
    thin_shape = [1 if d in repeated.values() else size for d, size in enumerate(shape)]
    return thin.reshape(thin_shape).expand(torch.Size(shape))


def _same_dims(before: Sequence[int], after: Sequence[int]) -> dict[int, int]:
    """Dimensions of a shape, none of them empty, that are dimensions of what it is reshaped to."""
    starts = {math.prod(after[:d]): d for d in range(len(after))}
    pairs = {d: starts.get(math.prod(before[:d])) for d in range(len(before))}
    return {d: e for d, e in pairs.items() if e is not None and after[e] == before[d] != 1}


def concatenated(parts: Sequence[Tensor], dim: int = 0, axis: int | None = None) -> Tensor:
    """A concatenation that keeps what is repeated in all parts repeated."""
    sizes = parts[0].shape
    dim = (dim if axis is None else axis) % len(sizes)
    repeated = [d for d in range(len(sizes)) if d != dim and all(_repeats(part, d, len(sizes)) for part in parts)]
    if any(part.shape[d] != sizes[d] for part in parts for d in repeated):
        raise RuntimeError("sizes of tensors must match except in the dimension of the concatenation")
    thin = [thinned(part, repeated) for part in parts]
    return torch.cat(thin, dim).expand([size if d in repeated else -1 for d, size in enumerate(sizes)])


def _repeats(part: Tensor, dim: int, ndim: int) -> bool:
    return part.ndim == ndim and part.stride(dim) == 0
