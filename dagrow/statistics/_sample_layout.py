"""Which rows of what a layer reads belong to which sample, found by changing one sample and looking at what follows.

Rows of a layer may be samples, samples with positions ``[n, s, c]`` or ``[s, n, c]``, all of them in one dimension
``[n s, c]``, or views one after another ``[2 n, c]``. Which it is no shape can tell: n may equal s. So the model is run
once more, with one sample replaced by a copy of another one, and the rows that change are that sample's.
"""

from dataclasses import dataclass
from math import inf, isfinite

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class SampleLayout:
    """One dimension of a tensor holds n samples, as ``outer n inner``.

    Attributes:
        dim: which.
        outer: entries of one sample that lie n samples apart, as views do that come one after another.
        inner: entries of one sample that lie side by side.
    """

    dim: int = 0
    outer: int = 1
    inner: int = 1

    def resized(self, size: int, n: int) -> "SampleLayout | None":
        """The same in another batch.

        Args:
            size: of the dimension.
            n: samples.

        Returns:
            The layout; None where it may be one or the other.
        """
        if self.outer * n * self.inner == size:
            return self
        if size % n or (self.outer > 1) == (self.inner > 1):
            return None
        return SampleLayout(self.dim, size // n, 1) if self.outer > 1 else SampleLayout(self.dim, 1, size // n)

    def samples_first(self, tensor: Tensor, n: int) -> Tensor:
        """A tensor with its samples in the first dimension, each with all of its rows.

        Args:
            tensor: in this layout.
            n: samples.

        Returns:
            ``[n r, ...]``; where the dimension held samples alone, it is moved to the front.
        """
        dim = self.dim
        parts = tensor.unflatten(dim, (self.outer, n, self.inner)).movedim(dim + 1, 0)
        if dim and self.outer == self.inner == 1:
            return parts.flatten(dim, dim + 2).contiguous()  # [n, *before, *after]
        return parts.flatten(0, dim + 2).contiguous()


def layout_of(changed: Tensor, n: int, allowed: Tensor, batch_dim: int) -> SampleLayout | None:
    """Where samples lie, if entries have changed and only some samples could have been the reason.

    Args:
        changed: entries that have ``[*dims]``.
        n: samples.
        allowed: samples that may have changed ``[n]``.
        batch_dim: the dimension that is looked at first.

    Returns:
        The layout; None if there is none by which other samples stay as they were. Where several are left, as too few
        entries have changed, samples come first and entries of one sample lie together.
    """
    where, allowed = torch.nonzero(changed).cpu(), allowed.cpu()
    for dim in sorted(range(changed.ndim), key=lambda dim: dim != batch_dim):
        size = changed.shape[dim]
        for outer in (o for o in range(1, size // n + 1) if size % (n * o) == 0):
            inner = size // (n * outer)
            if bool(allowed[where[:, dim] // inner % n].all()):
                return SampleLayout(dim, outer, inner)
    return None


def rows_changed(before: Tensor, after: Tensor, channel_dim: int) -> Tensor:
    """Which rows of an activation differ by more than rounding.

    Args:
        before: the activation.
        after: another one of the same shape.
        channel_dim: the dimension that holds the channels; rows are what lies before it.

    Returns:
        A mask over the dimensions before the channels.
    """
    if before.layout is not torch.strided:
        before, after = before.to_dense(), after.to_dense()
    if not before.is_floating_point():
        return (before != after).flatten(channel_dim).any(-1)
    if before.dtype.itemsize == 1:  # no arithmetic
        before, after = before.float(), after.float()
    difference = (before - after).abs_().flatten(channel_dim).amax(-1)
    largest = float(torch.linalg.vector_norm(before, inf))
    if not isfinite(largest):
        largest = float(torch.linalg.vector_norm(torch.where(torch.isfinite(before), before, 0), inf))
    return difference > torch.finfo(before.dtype).eps ** 0.5 * largest


@dataclass(frozen=True)
class Replacement:
    """A batch with one sample replaced by a copy of another.

    Attributes:
        batch: like the user's.
        sample: which was replaced.
    """

    batch: object
    sample: int

    @classmethod
    def of(cls, batch: object, n: int, batch_dim: int) -> "Replacement | None":
        """The copy is of a sample that differs the most.

        Args:
            batch: any nest of tensors.
            n: samples.
            batch_dim: the dimension along which they lie.

        Returns:
            The changed batch; None if all samples are alike.
        """
        sample = min(1, n - 1)  # not the first, which is the first row in every layout
        differing = torch.zeros(n, dtype=torch.long)
        for leaf in tree_leaves(batch):
            dim = sample_dim(leaf, n, batch_dim)
            if dim is not None:
                rows = leaf.detach().movedim(dim, 0).reshape(n, -1)
                differing += (rows != rows[sample]).sum(1).cpu()
        if not bool(differing.any()):
            return None
        other = int(differing.argmax())

        def replaced(leaf: object) -> object:
            dim = sample_dim(leaf, n, batch_dim)
            if dim is None or not isinstance(leaf, Tensor):
                return leaf
            copy = leaf.detach().clone()
            copy.select(dim, sample).copy_(leaf.detach().select(dim, other))
            return copy.requires_grad_(leaf.requires_grad)

        return cls(tree_map(replaced, batch), sample)


def first_samples(batch: object, n: int, count: int, batch_dim: int) -> object:
    """A part of a batch.

    Args:
        batch: any nest of tensors.
        n: samples.
        count: how many are kept.
        batch_dim: the dimension along which they lie.

    Returns:
        The first of them; what has no samples stays.
    """

    def kept(leaf: object) -> object:
        dim = sample_dim(leaf, n, batch_dim)
        return leaf if dim is None or not isinstance(leaf, Tensor) else leaf.narrow(dim, 0, count)

    return tree_map(kept, batch)


def sample_dim(leaf: object, n: int, batch_dim: int) -> int | None:
    """The dimension of a tensor of a batch along which samples lie: the usual one, or the first."""
    if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided:
        return None
    return next((dim for dim in (batch_dim, 0) if leaf.ndim > dim and leaf.shape[dim] == n), None)
