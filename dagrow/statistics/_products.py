"""Sums of products of features over a batch: from rows, or for convolutions at a fraction of that expense.

Rows of a convolution are patches, which repeat every entry of an image for every tap. Where all layers involved slide
over the same grid, the sums are taken from images instead: weight gradients and sums by lag, see
:mod:`dagrow.statistics._patch_products`. Everything else goes by rows, a few samples at a time.
"""

from dataclasses import dataclass
from math import prod

import torch
from einops import rearrange
from torch import Tensor

from dagrow.layers import Geometry
from dagrow.solvers import add_gram, complete
from dagrow.statistics._captures import Batch
from dagrow.statistics._features import Feature, LayerInputs
from dagrow.statistics._patch_products import Offsets, lagged, patch_gram
from dagrow.statistics._shifted_features import MovedFeatures, PulledGoal, TapFeatures

ENTRIES = 2**20  #: of rows that are held at once


def product(x: Feature, y: Feature, batch: Batch) -> Tensor:
    """The sums over samples and positions of ``x y^T`` in each fold ``[F, dx, dy]``."""
    for first, second, turned in ((x, y, False), (y, x, True)):
        sums = _from_images(first, second, batch)
        if sums is not None:
            return _by_fold(sums.mT if turned else sums, batch)
    return _from_rows(x, y, batch)


def add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Adds ``x^T y`` ``[dx, dy]``; where y is x, without what :func:`complete` fills in."""
    if x is y:
        add_gram(total, x)
    else:
        total += x.T @ y


def _by_fold(sums: Tensor, batch: Batch) -> Tensor:
    """Sums by group as sums by fold."""
    if batch.groups == list(range(batch.folds)):
        return sums
    total = sums.new_zeros(batch.folds, *sums.shape[1:])
    total[batch.groups] = sums
    return total


def _from_rows(x: Feature, y: Feature, batch: Batch) -> Tensor:
    total, start, step = None, 0, 1
    while start < batch.samples:
        part = batch.subset(slice(start, start + step))
        left = _exact(x.rows(part))
        right = left if x == y else _exact(y.rows(part))
        dtype = torch.promote_types(left.dtype, right.dtype)
        if total is None:
            total = left.new_zeros(batch.folds, left.shape[1], right.shape[1], dtype=dtype)
        entries = left.numel() + right.numel()
        left = left.to(dtype).view(part.samples, -1, left.shape[1])
        right = left if x == y else right.to(dtype).view(part.samples, -1, right.shape[1])
        for fold, samples in part.fold_slices:
            rows = left[samples].flatten(0, 1)
            add_product(total[fold], rows, rows if x == y else right[samples].flatten(0, 1))
        start += part.samples
        step = max(1, ENTRIES * part.samples // max(1, entries))
    assert total is not None
    if x == y:
        complete(total)
    return total


def _exact(values: Tensor) -> Tensor:
    """At least single precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _from_images(x: Feature, y: Feature, batch: Batch) -> Tensor | None:
    """Sums ``[G, dx, dy]`` by group of samples; None where images are of no help."""
    if isinstance(x, MovedFeatures):
        if isinstance(y, MovedFeatures):
            return _weighted_gram(x, batch) if x is y else None
        return _pulled_by_lag(x, y, batch) if isinstance(y, PulledGoal) and x.position_map is y.position_map else None
    patches = _Patches.of(x, batch)
    if patches is None:
        return None
    others = patches if x == y else _Patches.of(y, batch)
    if others is not None and (others.edge, others.geometry) == (patches.edge, patches.geometry):
        return patches.times_patches(others, patches.lines)
    image = y.image(batch)
    if image is None:
        return None
    return patches.times_image(batch.grouped(_exact(image)), isinstance(y, LayerInputs) and y.bias)


@dataclass(frozen=True)
class _Patches:
    """What a convolution reads of images ``[m, G c, *space]``, with the constant 1 or without."""

    edge: str
    geometry: Geometry
    image: Tensor
    bias: bool
    batch: Batch

    @classmethod
    def of(cls, x: Feature, batch: Batch) -> "_Patches | None":
        if isinstance(x, TapFeatures):
            edge, image, bias, geometry = x.consumer, x.inputs(batch), False, batch[x.consumer].geometry
        elif isinstance(x, LayerInputs):
            edge, image, bias, geometry = x.edge, x.inputs(batch), x.bias, x.geometry_in(batch)
        else:
            return None
        if geometry is None or image is None:
            return None
        return cls(edge, geometry, batch.grouped(_exact(image)), bias, batch)

    @property
    def groups(self) -> int:
        return len(self.batch.groups)

    @property
    def lines(self) -> list[list[float]]:
        """The weight 1 for every position of the output."""
        return [[1.0] * size for size in self.geometry.sizes(self.image.shape[2:])]

    def times_patches(self, other: "_Patches", lines: list[list[float]]) -> Tensor | None:
        """By lag, with weights for positions: for each dimension a line, whose products they are."""
        if not self.geometry.dense:
            return None
        gram = patch_gram(self.image, other.image, self.geometry, lines, self.groups)
        products, core = self._with_constants(other.sums(lines), other.bias, lines)
        taps = (-1, *self.geometry.kernel)
        core.unflatten(2, taps).unflatten(1, taps).copy_(gram)
        return products

    def times_image(self, image: Tensor, bias: bool) -> Tensor | None:
        """A weight gradient, where the image lies on the grid that the layer writes."""
        if list(image.shape[2:]) != self.geometry.sizes(self.image.shape[2:]):
            return None
        image = image.to(self.image)
        crossed = self.geometry.crossed(self.image, image, self.groups)
        sums = image.sum((0, *range(2, image.ndim))).unflatten(0, (self.groups, -1))
        products, core = self._with_constants(sums, bias, self.lines)
        core.copy_(crossed)
        return products

    def sums(self, lines: list[list[float]]) -> Tensor:
        """Weighted sums of patches over samples and positions ``[G, c taps]``."""
        return self.geometry.summed(self.image.sum(0).unflatten(0, (self.groups, -1)), lines).flatten(1)

    def _with_constants(self, columns: Tensor, bias: bool, lines: list[list[float]]) -> tuple[Tensor, Tensor]:
        """Room for products, in which those with the constant 1 are there already; and the part without them.

        Args:
            columns: sums of what patches are multiplied with ``[G, d]``.
            bias: whether that has the constant 1, too.
            lines: weights of positions.

        Returns:
            The products, and a view of the part.
        """
        rows = self.sums(lines)
        products = rows.new_empty(self.groups, rows.shape[1] + self.bias, columns.shape[1] + bias)
        core = products[:, : rows.shape[1], : columns.shape[1]]
        if bias:
            products[:, : rows.shape[1], -1] = rows
        if self.bias:
            products[:, -1, : columns.shape[1]] = columns
        if bias and self.bias:
            samples = [len(range(i, self.batch.samples, self.groups)) for i in range(self.groups)]
            images = len(self.image) // samples[0]  # of a sample
            products[:, -1, -1] = products.new_tensor(samples) * images * prod(map(sum, lines))
        return products, core


def _weighted_gram(x: MovedFeatures, batch: Batch) -> Tensor | None:
    """``E w p p^T`` of a convolution whose output another one reads as it is."""
    if x.position_map.image is None:
        return None
    lines, patches = _lines(x.position_map.weights.view(x.position_map.image)), _Patches.of(x.source, batch)
    return None if lines is None or patches is None else patches.times_patches(patches, lines)


def _pulled_by_lag(x: MovedFeatures, y: PulledGoal, batch: Batch) -> Tensor | None:
    """``sum over t of p(t + e) v(t)^T``, for every tap e of a convolution that reads what another one writes."""
    goals, reader = y.goal.image(batch), batch[y.goal.edges[0]].geometry
    patches, sizes = _Patches.of(x.source, batch), x.position_map.image
    if patches is None or sizes is None or goals is None or reader is None:
        return None
    if reader.stuffing is not None or reader.mode != "zeros":
        return None
    writer = patches.geometry
    goals = batch.grouped(_exact(goals)).to(patches.image)
    image, plain = writer.plain(patches.image)
    dims = [
        Offsets(reader.offsets(dim), plain.offsets(dim), (1.0,) * size, (reader.stride[dim], writer.stride[dim]))
        for dim, size in enumerate(sizes)
    ]
    rows = (image.shape[1] // patches.groups, *writer.kernel)
    columns = (*reader.kernel, goals.shape[1] // patches.groups)
    products = image.new_empty(patches.groups, prod(rows) + patches.bias, prod(columns))
    core = products[:, : prod(rows)].unflatten(2, columns).unflatten(1, rows)
    if writer.stuffing is None:
        lagged(goals, image, dims, patches.groups, core)
    else:  # taps are counted from behind
        behind = range(2, 2 + writer.space)
        core.copy_(lagged(goals, image, dims, patches.groups, torch.empty_like(core)).flip(tuple(behind)))
    if patches.bias:
        by_position = goals.sum(0).flatten(1)
        by_tap = torch.stack([by_position[:, cell >= 0].sum(1) for cell in x.position_map.index.T])
        products[:, -1] = rearrange(by_tap, "e (g o) -> g (e o)", g=patches.groups)
    return products


def _lines(weights: Tensor) -> list[list[float]] | None:
    """Weights as products over the dimensions; None if they are not, or if few of them are 1."""
    lines = []
    for dim in range(weights.ndim):
        middle = tuple(slice(None) if dim == other else size // 2 for other, size in enumerate(weights.shape))
        lines.append(weights[middle].tolist())
    usual = all(2 * sum(weight == 1 for weight in line) > len(line) for line in lines)
    return lines if usual and torch.allclose(_outer(lines), weights.double(), rtol=1e-6) else None


def _outer(lines: list[list[float]]) -> Tensor:
    """The products of one entry of each line."""
    products = torch.ones((), dtype=torch.float64)
    for line in lines:
        products = products[..., None] * torch.tensor(line, dtype=torch.float64)
    return products
