"""Sums of products of features over a batch: from rows, or for convolutions at a fraction of that expense.

Rows of a convolution are patches, which repeat every entry of an image for every tap. Where all layers involved slide
over the same grid, the sums are taken from images instead: weight gradients and sums by lag, see
:mod:`dagrow.layers`. Everything else goes by rows, a few samples at a time.
"""

from dataclasses import dataclass
from math import prod

import torch
from einops import rearrange
from torch import Tensor

from dagrow.layers import Geometry
from dagrow.solvers import add_gram, complete
from dagrow.statistics._captures import Batch
from dagrow.statistics._features import Feature, InputFeatures
from dagrow.statistics._patch_products import Offsets, lagged, patch_gram
from dagrow.statistics._shifted_features import MovedFeatures, PulledGoal, TapFeatures

ENTRIES = 2**20  #: of rows that are held at once


def product(x: Feature, y: Feature, batch: Batch) -> Tensor:
    """The sums over samples and positions of ``x y^T`` in each fold ``[F, dx, dy]``."""
    for first, second, turned in ((x, y, False), (y, x, True)):
        found = _from_images(first, second, batch)
        if found is not None:
            return _in_order(found.mT if turned else found, batch)
    return _from_rows(x, y, batch)


def _in_order(found: Tensor, batch: Batch) -> Tensor:
    """Sums by group as sums by fold."""
    if batch.groups == list(range(batch.folds)):
        return found
    total = found.new_zeros(batch.folds, *found.shape[1:])
    total[batch.groups] = found
    return total


def _from_rows(x: Feature, y: Feature, batch: Batch) -> Tensor:
    total, start, step = None, 0, 1
    while start < batch.samples:
        part = batch.part(slice(start, start + step))
        rows = _exact(x.rows(part))
        others = rows if x == y else _exact(y.rows(part))
        kind = torch.promote_types(rows.dtype, others.dtype)
        if total is None:
            total = rows.new_zeros(batch.folds, rows.shape[1], others.shape[1], dtype=kind)
        left, right = (values.to(kind).view(part.samples, -1, values.shape[1]) for values in (rows, others))
        for i, fold in enumerate(part.groups):
            own = slice(i, None, len(part.groups))
            if x == y:
                add_gram(total[fold], left[own].flatten(0, 1))
            else:
                total[fold] += left[own].flatten(0, 1).T @ right[own].flatten(0, 1)
        start += part.samples
        step = max(1, ENTRIES * part.samples // max(1, rows.numel() + others.numel()))
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
        return _pulled_by_lag(x, y, batch) if isinstance(y, PulledGoal) and x.arrival is y.arrival else None
    patches = _Patches.of(x, batch)
    if patches is None:
        return None
    others = patches if x == y else _Patches.of(y, batch)
    if others is not None and (others.edge, others.geometry) == (patches.edge, patches.geometry):
        return patches.with_patches(others)
    picture = y.picture(batch)
    if picture is None:
        return None
    return patches.with_picture(batch.grouped(_exact(picture)), isinstance(y, InputFeatures) and y.bias)


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
            edge, image, bias, geometry = x.consumer, x.image(batch), False, batch[x.consumer].geometry
        elif isinstance(x, InputFeatures):
            edge, image, bias, geometry = x.edge, x.image(batch), x.bias, x.slides(batch)
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

    def with_patches(self, other: "_Patches", lines: list[list[float]] | None = None) -> Tensor | None:
        """By lag, with weights for positions."""
        if not self.geometry.dense:
            return None
        lines = self.lines if lines is None else lines
        sums = patch_gram(self.image, other.image, self.geometry, lines, self.groups)
        found, core = self.framed(other.sums(lines), other.bias, lines)
        taps = (-1, *self.geometry.kernel)
        core.unflatten(2, taps).unflatten(1, taps).copy_(sums)
        return found

    def with_picture(self, picture: Tensor, bias: bool) -> Tensor | None:
        """A weight gradient, where the picture lies on the grid that the layer writes."""
        if list(picture.shape[2:]) != self.geometry.sizes(self.image.shape[2:]):
            return None
        picture = picture.to(self.image)
        crossed = self.geometry.crossed(self.image, picture, self.groups)
        sums = picture.sum((0, *range(2, picture.ndim))).unflatten(0, (self.groups, -1))
        found, core = self.framed(sums, bias, self.lines)
        core.copy_(crossed)
        return found

    def sums(self, lines: list[list[float]]) -> Tensor:
        """Weighted sums of patches over samples and positions ``[G, c taps]``."""
        return self.geometry.summed(self.image.sum(0).unflatten(0, (self.groups, -1)), lines).flatten(1)

    def framed(self, columns: Tensor, bias: bool, lines: list[list[float]]) -> tuple[Tensor, Tensor]:
        """Room for sums of products, and the same with those with the constant 1 beside it, where there is one."""
        rows = self.sums(lines)
        found = rows.new_empty(self.groups, rows.shape[1] + self.bias, columns.shape[1] + bias)
        core = found[:, : rows.shape[1], : columns.shape[1]]
        if bias:
            found[:, : rows.shape[1], -1] = rows
        if self.bias:
            found[:, -1, : columns.shape[1]] = columns
        if bias and self.bias:
            samples = torch.tensor([len(range(i, self.batch.samples, self.groups)) for i in range(self.groups)])
            each = len(self.image) // int(samples[0])  # images of a sample
            found[:, -1, -1] = samples.to(found) * each * prod(map(sum, lines))
        return found, core


def _weighted_gram(x: MovedFeatures, batch: Batch) -> Tensor | None:
    """``E w p p^T`` of a convolution whose output another one reads as it is."""
    if x.arrival.image is None:
        return None
    lines, patches = _lines(x.arrival.weights.view(x.arrival.image)), _Patches.of(x.source, batch)
    return None if lines is None or patches is None else patches.with_patches(patches, lines)


def _pulled_by_lag(x: MovedFeatures, y: PulledGoal, batch: Batch) -> Tensor | None:
    """``sum over t of p(t + e) v(t)^T``, for every tap e of a convolution that reads what another one writes."""
    goals, reader = y.goal.picture(batch), batch[y.goal.edges[0]].geometry
    patches = _Patches.of(x.source, batch)
    if patches is None or x.arrival.image is None or goals is None or reader is None or reader.stuffing is not None:
        return None
    writer = patches.geometry
    if any(step != 1 for step in (*writer.stride, *reader.stride)) or reader.mode != "zeros":
        return None
    goals = batch.grouped(_exact(goals)).to(patches.image)
    image, plain = writer.plain(patches.image)
    dims = [Offsets(reader.offsets(d), plain.offsets(d), (1.0,) * size) for d, size in enumerate(x.arrival.image)]
    groups, space = patches.groups, writer.space
    sums = lagged(goals, image, dims, groups)
    if writer.stuffing is not None:  # taps are counted from behind
        sums = sums.flip(tuple(range(sums.ndim - space, sums.ndim)))
    rows, columns = sums.shape[2 + space :], (*sums.shape[2 : 2 + space], sums.shape[1])
    found = image.new_empty(groups, prod(rows) + patches.bias, prod(columns))
    core = found[:, : prod(rows)].unflatten(2, columns).unflatten(1, rows)
    core.copy_(sums.permute(0, *range(2 + space, sums.ndim), *range(2, 2 + space), 1))
    if patches.bias:
        total = goals.sum(0).flatten(1)
        last = torch.stack([total[:, read >= 0].sum(1) for read in x.arrival.index.T])
        found[:, -1] = rearrange(last, "e (g o) -> g (e o)", g=groups)
    return found


def _outer(lines: list[list[float]]) -> Tensor:
    found = torch.ones((), dtype=torch.float64)
    for line in lines:
        found = found[..., None] * torch.tensor(line, dtype=torch.float64)
    return found


def _lines(weights: Tensor) -> list[list[float]] | None:
    """Weights as products over the dimensions; None if they are not, or if few of them are 1."""
    middle = [size // 2 for size in weights.shape]
    lines = []
    for d in range(weights.ndim):
        at = tuple(slice(None) if d == other else middle[other] for other in range(weights.ndim))
        lines.append(weights[at].tolist())
    usual = all(2 * sum(weight == 1 for weight in line) > len(line) for line in lines)
    return lines if usual and torch.allclose(_outer(lines), weights.double(), rtol=1e-6) else None
