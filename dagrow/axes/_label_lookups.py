"""Labels of what is picked by the numbers in tensors, which a run on labels does not know.

Along the dimensions that such numbers pick from, labels must be alike: then all picks are. In come labels and an index
with labels in the places of its tensors, out go labels as they lie in what is picked.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dagrow._pytree import tensors_in
from dagrow.axes._label_tensors import thinned


def moves_by_numbers(name: str | None, args: tuple, kwargs: dict) -> bool:
    """Whether an operation that moves entries does so by the numbers in a tensor."""
    others = tensors_in((args[1:], kwargs))
    return bool(others) and name not in ("expand_as", "reshape_as", "view_as")


def gathered(labels: Tensor, dim: int, index: Tensor) -> Tensor:
    """Labels that are alike along a dimension, picked there: by an index of as many dimensions, or of one."""
    if index.ndim == labels.ndim:
        sizes = [min(sizes) for sizes in zip(labels.shape, index.shape, strict=True)]
        labels = labels[tuple(slice(None) if d == dim else slice(size) for d, size in enumerate(sizes))]
    return thinned(labels, [dim]).expand(
        [index.shape[min(dim, index.ndim - 1)] if d == dim else -1 for d in range(labels.ndim)]
    )


def indexed_dims(index: tuple, meta_index: tuple, ndim: int) -> list[int]:
    """The dimensions that are indexed by tensors.

    Args:
        index: one entry for each dimension, or for several.
        meta_index: the same, with the types of tensors.
        ndim: of what is indexed.

    Returns:
        From 0 on.
    """
    counts = list(_dims_of(meta_index))
    counts = [ndim - sum(counts) if part is Ellipsis else count for part, count in zip(index, counts, strict=True)]
    return [sum(counts[:i]) + d for i, part in enumerate(index) if isinstance(part, Tensor) for d in range(counts[i])]


def _dims_of(meta_index: tuple) -> Iterator[int]:
    """How many dimensions each entry of an index speaks of; an ellipsis of none so far."""
    for part in meta_index:
        is_mask = isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)
        yield part.ndim if is_mask else int(part is not None and part is not Ellipsis)


def indexed(labels: Tensor, index: tuple, meta_index: tuple, meta: Tensor, result: Tensor) -> Tensor:
    """Labels at an index, whose tensors pick from dimensions along which labels are alike.

    Args:
        labels: what is indexed.
        index: with labels in the places of its tensors.
        meta_index: the same, with the types of tensors.
        meta: what is indexed, without entries.
        result: what came out, without entries, as a mask tells no number.

    Returns:
        The labels.
    """
    masks = [isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in meta_index]

    def first(parts: tuple, count: int, device: str) -> tuple[Any, ...]:
        found: list[Any] = []
        for part, whole, is_mask in zip(parts, meta_index, masks, strict=True):
            if is_mask:
                found += [torch.zeros(count, dtype=torch.long, device=device)] * whole.ndim
            else:
                found.append(
                    torch.zeros(part.shape, dtype=torch.long, device=device) if isinstance(part, Tensor) else part
                )
        return tuple(found)

    single = meta[first(meta_index, 1, "meta")].numel() if any(masks) else 1
    return labels[first(index, result.numel() // max(1, single) if any(masks) else 1, "cpu")]
